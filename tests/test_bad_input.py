"""Whatever a client sends, it is told precisely what was wrong, and nothing is queued or stored."""

import base64
import hashlib
import io
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from PIL import Image, ImageChops
from redis import Redis

from app.local import LocalService
from app.storage import generation_folder
from tests.conftest import local_settings

URL = "/v1/generations"
JSON = {"Content-Type": "application/json"}
GOOD = {"prompt": "a dog", "num_inference_steps": 2, "width": 64, "height": 64}
NOBODY = "0" * 32


def picture(
    size: tuple[int, int] = (64, 64), colour: Any = "red", mode: str = "RGB", kind: str = "png", **how: Any
) -> str:
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, kind, **how)
    return base64.b64encode(out.getvalue()).decode()


def problem_of(answer: httpx2.Response, status: int, kind: str | None = None) -> dict[str, Any]:
    """The answer's problem document, of the form that RFC 9457 asks for."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    problem = answer.json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert problem["type"].startswith("urn:darkroom:problem:")
    assert kind is None or problem["type"].removeprefix("urn:darkroom:problem:") == kind
    return problem


def fields_of(problem: dict[str, Any]) -> list[str]:
    assert all(error["detail"] for error in problem["errors"])
    return [error["field"] for error in problem["errors"]]


def accepted_so_far(service: LocalService) -> tuple[set[str], set[str]]:
    """The jobs that there are, and the pictures of none."""
    with Redis.from_url(service.redis_url) as redis:
        jobs = {key.decode().removeprefix("rq:job:") for key in redis.scan_iter("rq:job:*")}
    stored = {path.name for path in (service.settings.data_dir / "blobs").glob("generations/*")}
    return jobs, stored - jobs


Refused = Callable[..., dict[str, Any]]


@pytest.fixture
def refused(service: LocalService, http: httpx2.Client) -> Iterator[Refused]:
    """Posts a body and returns the problem document; in the end nothing has been queued or stored."""
    before = accepted_so_far(service)

    def post(body: Any, status: int = 422, kind: str = "invalid-request") -> dict[str, Any]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return problem_of(http.post(URL, content=content, headers=JSON), status, kind)

    yield post
    assert accepted_so_far(service) == before


WRONG = [
    *(("model", value) for value in ("none-such", 1, "", "m" * 65)),
    *(("foo", value) for value in (1, None)),
    *(("scheduler", value) for value in ("none-such", 0, "s" * 65)),
    *(("priority", value) for value in ("urgent", 1, None)),
    *(("output_format", value) for value in ("gif", "PNG", "mp4")),
    *((side, value) for side in ("width", "height") for value in (48, 272, 10**9, 100, 0, -64, 64.5, "64", True)),
    *(("num_inference_steps", value) for value in (0, -1, 101, 10**30, 2.5, "2", True, float("nan"), float("inf"))),
    *(("n", value) for value in (0, 9, -1, 1.5, "1", True, None, float("nan"), float("inf"), [])),
    *(("guidance_scale", value) for value in (-0.1, 20.5, "3", True, float("nan"), float("inf"), -float("inf"), {})),
    *(("seed", value) for value in (-1, 2**53, 10**400, 1.5, "1", True)),
    *(("prompt", value) for value in ("", " \t\n", None, 1, ["a"], "x" * 10_001, "a\0b", "\ud800")),
    *(("negative_prompt", value) for value in (None, 1, "x" * 10_001, "\0", "\udfff")),
    *(("preview_every", value) for value in (0, 1.5, True)),
    *(("reproducible", value) for value in ("yes", 1, None)),
    *(("expires_in", value) for value in (0, 604_801, "60")),
    *(("metadata", value) for value in (None, "a", [], {str(i): "" for i in range(17)})),
    *(("image", value) for value in ("", "***", "é", "AAAA", 1, "data:text/plain;base64,AAAA", "data:image/png,AAAA")),
    ("image", "https://example.com/a.png"),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda value: str(value)[:24])
def test_a_wrong_value_is_refused_and_its_field_is_named(refused: Refused, field: str, value: Any):
    assert fields_of(refused(GOOD | {field: value})) == [field]


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, ["prompt"]),
        (GOOD | {"mask": picture()}, ["mask"]),
        (GOOD | {"strength": 0.5}, ["strength"]),
        (GOOD | {"mask": picture(), "strength": 0.5}, ["mask", "strength"]),
        (GOOD | {"image": 1, "mask": picture()}, ["image"]),
        *((GOOD | {"image": picture(), "strength": value}, ["strength"]) for value in (0, -1, 1.01, "1", True)),
        (GOOD | {"image": picture(), "strength": float("nan")}, ["strength"]),
        (GOOD | {"image": picture(), "mask": "AAAA"}, ["mask"]),
        (GOOD | {"image": picture(), "mask": picture((64, 48))}, ["mask"]),
        (GOOD | {"metadata": {"colour": 1}}, ["metadata.colour"]),
        (GOOD | {"metadata": {"colour": "x" * 513}}, ["metadata.colour"]),
        (GOOD | {"metadata": {"k" * 65: "x"}}, ["metadata." + "k" * 64]),
        (GOOD | {"n": 0, "width": 48, "seed": -1}, ["n", "seed"]),
        (GOOD | {"n": 9, "width": 48, "scheduler": "x"}, ["width", "n", "scheduler"]),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_each_wrong_field_is_named(refused: Refused, body: dict[str, Any], fields: list[str]):
    assert fields_of(refused(body)) == fields


def test_a_million_wrong_fields_get_a_short_answer(refused: Refused):
    problem = refused(GOOD | {f"field {i}": i for i in range(100_000)} | {"f" * 10**6: 1})
    assert len(problem["errors"]) == 20
    assert len(json.dumps(problem)) < 10_000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{'prompt': 'a'}",
        b'{"prompt": "a"} and more',
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"prompt": "a", "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
        b"[]",
        b'"a dog"',
        b"1",
        b"null",
        b"NaN",
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
def test_what_is_no_json_object_is_malformed(refused: Refused, body: bytes):
    refused(body, 400, "malformed-body")


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_body_of_another_type_is_refused(http: httpx2.Client, refused: Refused, kind: str | None):
    headers = {} if kind is None else {"Content-Type": kind}
    problem_of(http.post(URL, content=json.dumps(GOOD), headers=headers), 415, "unsupported-media-type")


def test_json_may_name_its_charset(http: httpx2.Client):
    answer = http.post(URL, content=json.dumps(GOOD), headers={"Content-Type": "Application/JSON; charset=utf-8"})
    assert answer.status_code == 202


def test_of_a_key_given_twice_the_last_counts_as_in_every_parser(http: httpx2.Client):
    answer = http.post(URL, content=json.dumps(GOOD)[:-1] + ', "metadata": {"a": "1", "a": "2"}}', headers=JSON)
    assert answer.json()["parameters"]["metadata"] == {"a": "2"}


# -- the body's size


def test_a_body_that_is_declared_too_large_is_refused_before_it_is_sent(service: LocalService, refused: Refused):
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as raw:
        raw.sendall(f"POST {URL} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n".encode())
        raw.sendall(b"Content-Length: 99999999999999\r\n\r\n")
        answer = raw.recv(4096)
    assert b" 413 " in answer.partition(b"\r\n")[0]
    assert b"application/problem+json" in answer


def test_a_body_without_a_length_is_refused_once_it_is_too_large(http: httpx2.Client, refused: Refused):
    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(26):
            yield b"a" * 2**20

    problem_of(http.post(URL, content=chunks(), headers=JSON), 413, "body-too-large")


def test_a_large_body_that_is_allowed_is_read(refused: Refused):
    assert fields_of(refused(GOOD | {"image": "A" * (24 * 2**20)})) == ["image"]


# -- pictures


def of_stripes(kind: str, **how: Any) -> str:
    """Left red, right blue."""
    image, out = Image.new("RGB", (64, 64), "red"), io.BytesIO()
    image.paste("blue", (32, 0, 64, 64))
    image.save(out, kind, **how)
    return base64.b64encode(out.getvalue()).decode()


def animated() -> str:
    out, frames = io.BytesIO(), [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    frames[0].save(out, "gif", save_all=True, append_images=frames[1:])
    return base64.b64encode(out.getvalue()).decode()


@pytest.mark.parametrize(
    "image",
    [
        base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode(),
        base64.b64encode(b"%PDF-1.4 ").decode(),
        base64.b64encode(base64.b64decode(of_stripes("jpeg"))[:-200]).decode(),
        base64.b64encode(base64.b64decode(of_stripes("png"))[:60]).decode(),
        base64.b64encode(base64.b64decode(of_stripes("png"))[:20]).decode(),
        animated(),
        picture((20_000, 20_000), 0, "1"),
        picture((5000, 5000), 0, "1"),
        picture((64, 64), "red", "RGB", "tiff"),
    ],
    ids=["svg", "pdf", "cut jpeg", "cut png", "cut header", "animated", "bomb", "too many pixels", "tiff"],
)
def test_what_is_no_picture_of_ours_is_refused(refused: Refused, image: str):
    assert fields_of(refused(GOOD | {"image": image})) == ["image"]
    assert fields_of(refused(GOOD | {"image": picture(), "mask": image})) == ["mask"]


def turned_by_exif() -> str:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise: the left side comes up
    return of_stripes("jpeg", exif=exif, quality=95)


@pytest.mark.parametrize(
    ("image", "at", "colour"),
    [
        (picture((64, 64), 65535, "I;16"), (5, 5), (255, 255, 255)),
        (picture((64, 64), 32896, "I;16"), (5, 5), (128, 128, 128)),
        (picture((64, 64), (0, 255, 255, 0), "CMYK", "jpeg", quality=100), (5, 5), (255, 0, 0)),
        (turned_by_exif(), (60, 5), (255, 0, 0)),
        (turned_by_exif(), (5, 60), (0, 0, 255)),
        (picture((64, 64), (255, 0, 0, 0), "RGBA"), (5, 5), (255, 255, 255)),
        ("data:image/webp;base64," + picture((64, 64), "red", "RGB", "webp", lossless=True), (5, 5), (255, 0, 0)),
    ],
    ids=["16 bit", "16 bit grey", "cmyk", "turned, above", "turned, below", "see-through", "data url"],
)
def test_unusual_pictures_are_converted(
    service: LocalService, http: httpx2.Client, image: str, at: tuple[int, int], colour: tuple[int, int, int]
):
    made = http.post(URL, json=GOOD | {"image": image, "strength": 0.6}, headers={"Prefer": "wait=60"}).json()
    assert made["status"] == "succeeded", made
    stored = service.settings.data_dir / "blobs" / generation_folder(made["id"]) / "inputs" / "image.png"
    with Image.open(stored) as kept:
        assert kept.mode == "RGB"
        far = ImageChops.difference(kept, Image.new("RGB", kept.size, colour)).getpixel(at)
        assert isinstance(far, tuple)
        assert max(far) < 12


def test_what_the_text_encoder_cannot_take_is_cut_and_the_client_is_told(http: httpx2.Client):
    request = GOOD | {"prompt": "a dog, " * 40 + "zebra"}
    made = http.post(URL, json=request, headers={"Prefer": "wait=60"}).json()
    assert made["status"] == "succeeded", made
    assert len(made["warnings"]) == 1
    assert "zebra" in made["warnings"][0]


# -- ids, queries, headers


@pytest.mark.parametrize("id", ["abc", NOBODY, "F" * 32, "%00", "0" * 5000, "..%2f..", "é"])
@pytest.mark.parametrize("rest", ["", "/events", "/images/0", "/previews/0/1"])
def test_an_id_that_is_none_is_not_found(http: httpx2.Client, id: str, rest: str):
    problem_of(http.get(f"{URL}/{id}{rest}"), 404, "not-found")
    if not rest:
        problem_of(http.delete(f"{URL}/{id}"), 404, "not-found")


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("?limit=0", "limit"),
        ("?limit=101", "limit"),
        ("?limit=x", "limit"),
        ("?cursor=x", "cursor"),
        ("?cursor=", "cursor"),
        ("?status=done", "status"),
        ("?statsu=failed", "statsu"),
        (f"/{NOBODY}/images/x", "number"),
        (f"/{NOBODY}/images/-1", "number"),
        (f"/{NOBODY}/images/{'9' * 5000}", "number"),
        (f"/{NOBODY}/previews/0/{'9' * 300}", "step"),
    ],
)
def test_a_wrong_query_is_refused(http: httpx2.Client, path: str, field: str):
    assert fields_of(problem_of(http.get(URL + path), 422)) == [field]


@pytest.mark.parametrize("last", ["x", "1", "1-", "-1", "9" * 20 + "-0", "$", "+"])
def test_a_last_event_id_that_is_not_ours_is_refused(http: httpx2.Client, last: str):
    id = http.post(URL, json=GOOD).json()["id"]
    answer = http.get(f"{URL}/{id}/events", headers={"Last-Event-ID": last})
    assert fields_of(problem_of(answer, 422)) == ["Last-Event-ID"]


@pytest.mark.parametrize("key", ["", "k" * 257])
def test_an_idempotency_key_has_a_length(http: httpx2.Client, refused: Refused, key: str):
    answer = http.post(URL, json=GOOD, headers={"Idempotency-Key": key})
    assert fields_of(problem_of(answer, 422)) == ["Idempotency-Key"]


def test_an_idempotency_key_is_for_one_request(http: httpx2.Client):
    key = {"Idempotency-Key": "one request"}
    assert http.post(URL, json=GOOD, headers=key).status_code == 202
    problem_of(http.post(URL, json=GOOD | {"seed": 1}, headers=key), 422, "idempotency-key-reused")


@pytest.mark.parametrize(
    "path", ["/page", "/nope", "/v1", f"{URL}/", f"{URL}/{NOBODY}/nope", "/v1/models/nope", "/%00"]
)
def test_an_unknown_path_is_not_found(http: httpx2.Client, path: str):
    problem_of(http.get(path), 404, "not-found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", URL, "GET, POST"),
        ("DELETE", URL, "GET, POST"),
        ("POST", f"{URL}/{NOBODY}", "GET, DELETE"),
        ("POST", "/livez", "GET"),
        ("HEAD", f"{URL}/{NOBODY}/events", "GET"),
        ("PROPFIND", "/v1/models", "GET"),
    ],
)
def test_a_method_that_is_none_is_told_which_are(http: httpx2.Client, method: str, path: str, allowed: str):
    answer = http.request(method, path)
    assert answer.headers["allow"] == allowed
    if method != "HEAD":
        assert problem_of(answer, 405)["title"] == "Method not allowed"


# -- who asks


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    """A service of two keys, and nobody to draw."""
    keys = (("ann", hashed("ann's key")), ("bob", hashed("bob's key")))
    with LocalService(local_settings(tmp_path_factory.mktemp("locked"), api_keys=keys), workers=0) as service:
        yield service


def as_caller(service: LocalService, key: str) -> httpx2.Client:
    return httpx2.Client(base_url=service.url, headers={"Authorization": f"Bearer {key}"}, timeout=30)


@pytest.mark.parametrize(
    "sent", [None, "Bearer none-such", "Bearer", "Basic YW5uOmtleQ==", f"Bearer {hashed('x')}", "é"]
)
@pytest.mark.parametrize(
    "path", [URL, f"{URL}/{NOBODY}", f"{URL}/{NOBODY}/events", "/v1/models", "/v1/models/emoji-sd"]
)
def test_without_a_known_key_nothing_is_told(locked: LocalService, path: str, sent: str | None):
    headers = [] if sent is None else [(b"Authorization", sent.encode("latin-1"))]
    answer = httpx2.get(locked.url + path, headers=headers)
    problem_of(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_hash_of_a_key_is_no_key(locked: LocalService):
    with as_caller(locked, hashed("ann's key")) as thief:
        problem_of(thief.get(URL), 401)


def test_without_a_known_key_nothing_is_queued(locked: LocalService):
    before = accepted_so_far(locked)
    problem_of(httpx2.post(locked.url + URL, json=GOOD), 401)
    assert accepted_so_far(locked) == before


def test_the_generations_of_another_key_do_not_exist(locked: LocalService):
    with as_caller(locked, "ann's key") as ann, as_caller(locked, "bob's key") as bob:
        id = ann.post(URL, json=GOOD, headers={"Idempotency-Key": "1"}).json()["id"]
        for path in ("", "/events", "/images/0", "/previews/0/1"):
            problem_of(bob.get(f"{URL}/{id}{path}"), 404)
        problem_of(bob.delete(f"{URL}/{id}"), 404)
        assert id not in [generation["id"] for generation in bob.get(URL).json()["data"]]
        assert bob.get(f"{URL}?cursor={'f' * 32}").json()["data"] == []
        assert bob.post(URL, json=GOOD, headers={"Idempotency-Key": "1"}).json()["id"] != id
        assert ann.get(f"{URL}/{id}").json()["status"] == "queued"
        assert [generation["id"] for generation in ann.get(URL).json()["data"]] == [id]


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/openapi.json"])
def test_probes_need_no_key(locked: LocalService, path: str):
    assert httpx2.get(locked.url + path).status_code == 200


# -- too many


def test_a_full_queue_says_when_to_come_back(tmp_path: Path):
    settings = local_settings(tmp_path, max_queued=2)
    with LocalService(settings, workers=0) as service, httpx2.Client(base_url=service.url) as http:
        assert 'darkroom_refused_total{model="emoji-sd"} 0.0' in http.get("/metrics").text
        assert [http.post(URL, json=GOOD).status_code for _ in range(2)] == [202, 202]
        answer = http.post(URL, json=GOOD)
        problem_of(answer, 503, "queue-full")
        assert int(answer.headers["retry-after"]) >= 1
        assert 'darkroom_refused_total{model="emoji-sd"} 1.0' in http.get("/metrics").text


# -- and then


def test_after_all_that_a_good_request_still_works(http: httpx2.Client):
    made = http.post(URL, json=GOOD, headers={"Prefer": "wait=60"})
    assert made.status_code == 200
    assert made.json()["status"] == "succeeded"
