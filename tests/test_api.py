"""The public contract, over HTTP: submit, watch, fetch, cancel, list."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import jsonschema
import pytest
from openapi_spec_validator import validate
from PIL import Image
from prometheus_client.metrics import MetricWrapperBase
from redis import Redis
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from app import events, metrics
from app.local import EmbeddedRedis, LocalService
from app.main import create_app
from app.settings import Settings
from models.catalog import CARDS, read_cards
from tests.conftest import local_settings
from tests.test_bad_input import GOOD, URL, picture, problem_of

WAIT = {"Prefer": "wait=60"}
LONG = {"prompt": "a whale", "num_inference_steps": 100, "n": 8, "width": 256, "height": 256}


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    """A service without workers: what is queued stays queued."""
    with LocalService(local_settings(tmp_path_factory.mktemp("idle")), workers=0) as service:
        yield service


@pytest.fixture
def waiting(idle: LocalService) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=idle.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def drawn(service: LocalService) -> dict[str, Any]:
    """Two pictures, done."""
    request = GOOD | {"n": 2, "num_inference_steps": 6, "seed": 7, "preview_every": 2, "metadata": {"for": "a test"}}
    with httpx2.Client(base_url=service.url, timeout=60) as http:
        done = polled(http, http.post(URL, json=request).headers["location"])
    assert done["status"] == "succeeded", done
    return done


class Sent(NamedTuple):
    name: str
    id: str | None
    data: dict[str, Any]


def sent(lines: Iterator[str]) -> Iterator[Sent]:
    """Server-sent events, as browsers read them."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            yield Sent(fields["event"], fields.get("id"), json.loads(fields["data"]))
            fields = {}


@contextmanager
def listening(http: httpx2.Client, id: str, **headers: str) -> Generator[Iterator[Sent]]:
    with http.stream("GET", f"{URL}/{id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        yield sent(answer.iter_lines())


def heard(http: httpx2.Client, id: str, **headers: str) -> list[Sent]:
    with listening(http, id, **headers) as stream:
        return list(stream)


def polled(http: httpx2.Client, location: str) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while (shown := http.get(location).json())["status"] not in events.ENDED:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return shown


# -- submit and poll


def test_a_generation_is_accepted_polled_and_fetched(http: httpx2.Client):
    accepted = http.post(URL, json=GOOD)
    assert accepted.status_code == 202
    assert int(accepted.headers["retry-after"]) >= 1
    assert accepted.headers["location"] == f"{URL}/{accepted.json()['id']}"
    assert accepted.json()["status"] in ("queued", "running")

    done = polled(http, accepted.headers["location"])
    assert done["status"] == "succeeded"
    assert done["progress"] == {"step": 2, "steps": 2, "stage": None}
    assert done["attempts"] == 1
    assert done["error"] is None
    assert done["warnings"] == []
    assert done["position"] is None
    assert all(seconds >= 0 for seconds in done["timings"].values())
    assert {"queued", "running"} <= done["timings"].keys()

    file = http.get(done["images"][0]["url"])
    assert Image.open(io.BytesIO(file.content)).size == (64, 64)


def test_what_was_left_open_is_decided_and_told(http: httpx2.Client):
    parameters = http.post(URL, json={"prompt": " a dog "}).json()["parameters"]
    assert parameters["prompt"] == "a dog"
    assert parameters["model"] == "emoji-sd"
    assert (parameters["width"], parameters["height"]) == (128, 128)
    assert parameters["num_inference_steps"] == 20
    assert parameters["guidance_scale"] == 3.0
    assert parameters["scheduler"] == "dpmpp_2m"
    assert parameters["seed"] >= 0
    assert parameters["strength"] is None


def test_zero_is_a_seed_and_a_guidance_scale(http: httpx2.Client):
    parameters = http.post(URL, json=GOOD | {"seed": 0, "guidance_scale": 0}).json()["parameters"]
    assert (parameters["seed"], parameters["guidance_scale"]) == (0, 0.0)


def test_a_whole_number_may_have_a_decimal_point(http: httpx2.Client):
    whole = GOOD | {"seed": 7, "n": 2, "preview_every": 1, "expires_in": 60}
    spelled = {name: float(value) if isinstance(value, int) else value for name, value in whole.items()}
    assert '"width": 64.0' in json.dumps(spelled)
    parameters = http.post(URL, json=spelled).json()["parameters"]
    assert {name: parameters[name] for name in whole} == whole
    assert isinstance(parameters["width"], int)


def test_a_picture_that_was_sent_is_shown_by_its_hash_only(http: httpx2.Client):
    request = GOOD | {"image": picture(), "mask": picture(mode="L", colour=255)}
    parameters = http.post(URL, json=request).json()["parameters"]
    assert parameters["image"].startswith("sha256:")
    assert parameters["mask"].startswith("sha256:")
    assert parameters["strength"] == 1.0


def test_metadata_comes_back_as_it_was(http: httpx2.Client):
    labels = {"für": "dich 🦊", "": "empty", "a.b": "\n"}
    assert http.post(URL, json=GOOD | {"metadata": labels}).json()["parameters"]["metadata"] == labels


def test_pictures_have_consecutive_seeds(http: httpx2.Client, drawn: dict[str, Any]):
    assert [image["seed"] for image in drawn["images"]] == [7, 8]
    first, second = (http.get(image["url"]).content for image in drawn["images"])
    assert first != second


def test_a_generation_that_expires_is_not_drawn(waiting: httpx2.Client):
    id = waiting.post(URL, json=GOOD | {"expires_in": 1}).json()["id"]
    time.sleep(1.05)
    assert waiting.get(f"{URL}/{id}").json()["status"] == "expired"
    assert heard(waiting, id)[-1].name == "expired"


# -- wait for it


def test_who_prefers_to_wait_gets_it_done(http: httpx2.Client):
    answer = http.post(URL, json=GOOD, headers={"Prefer": "respond-async, wait=60"})
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait=60"
    assert "retry-after" not in answer.headers
    assert answer.json()["status"] == "succeeded"


def test_when_the_time_is_up_it_is_answered_as_it_stands(waiting: httpx2.Client):
    began = time.monotonic()
    answer = waiting.post(URL, json=GOOD, headers={"Prefer": "wait=1"})
    assert 0.9 < time.monotonic() - began < 3
    assert answer.status_code == 202
    assert answer.headers["preference-applied"] == "wait=1"
    assert answer.json()["status"] == "queued"


@pytest.mark.parametrize("prefer", ["wait=soon", "wait=-1", "wait=0", "handling=lenient", "await=5", ""])
def test_a_preference_that_we_do_not_know_is_left(waiting: httpx2.Client, prefer: str):
    answer = waiting.post(URL, json=GOOD, headers={"Prefer": prefer})
    assert answer.status_code == 202
    assert "preference-applied" not in answer.headers


def test_nobody_waits_longer_than_the_setting_allows(tmp_path: Path):
    with LocalService(local_settings(tmp_path, max_wait=1), workers=0) as service:
        answer = httpx2.post(service.url + URL, json=GOOD, headers={"Prefer": "wait=600"})
    assert answer.headers["preference-applied"] == "wait=1"


# -- once is enough


def test_the_same_key_and_body_get_the_first_answer_again(http: httpx2.Client):
    key = {"Idempotency-Key": "once is enough"}
    first = http.post(URL, json=GOOD, headers=key)
    assert "idempotent-replayed" not in first.headers
    again = http.post(URL, json=dict(reversed(GOOD.items())), headers=key | WAIT)
    assert again.status_code == 200
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["id"] == first.json()["id"]


def test_a_request_may_be_repeated_without_a_key(http: httpx2.Client):
    assert http.post(URL, json=GOOD).json()["id"] != http.post(URL, json=GOOD).json()["id"]


# -- watch


def test_events_come_in_order_with_previews_and_end_with_the_generation(http: httpx2.Client):
    id = http.post(URL, json=GOOD | {"num_inference_steps": 8, "preview_every": 3}).json()["id"]
    heard_now = heard(http, id)
    names = [event.name for event in heard_now]
    assert names[:2] == ["queued", "running"]
    assert names[-1] == "succeeded"
    assert names.count("succeeded") == 1
    ids = [tuple(int(part) for part in event.id.split("-")) for event in heard_now if event.id]
    assert len(ids) == len(heard_now)
    assert ids == sorted(set(ids))
    steps = [event.data["step"] for event in heard_now if event.name == "progress"]
    assert steps == sorted(set(steps))
    assert steps[-1] == 8
    previews = [event.data for event in heard_now if event.name == "preview"]
    assert [preview["step"] for preview in previews] == [3, 6]
    assert all(preview["steps"] == 8 for preview in previews)
    for preview in previews:
        file = http.get(preview["url"])
        assert file.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(file.content)).size == (64, 64)
    assert heard_now[-1].data == http.get(f"{URL}/{id}").json()


def test_a_broken_stream_goes_on_where_it_was(http: httpx2.Client, drawn: dict[str, Any]):
    everything = heard(http, drawn["id"])
    for i in (0, 2, len(everything) - 2):
        assert heard(http, drawn["id"], **{"Last-Event-ID": everything[i].id or ""}) == everything[i + 1 :]


def test_who_listens_after_the_end_gets_the_end_at_once(http: httpx2.Client, drawn: dict[str, Any]):
    last = heard(http, drawn["id"])[-1]
    began = time.monotonic()
    again = heard(http, drawn["id"], **{"Last-Event-ID": last.id or ""})
    assert time.monotonic() - began < 2
    assert [(event.name, event.data) for event in again] == [("succeeded", drawn)]


def test_many_may_listen_at_once(idle: LocalService):
    """More than a hundred, which is where redis-py stops unless it is told."""
    with httpx2.Client(base_url=idle.url, timeout=30, limits=httpx2.Limits(max_connections=200)) as http:
        id = http.post(URL, json=GOOD).json()["id"]
        with ExitStack() as stack:
            streams = [stack.enter_context(listening(http, id)) for _ in range(120)]
            assert {next(stream).name for stream in streams} == {"queued"}
            http.delete(f"{URL}/{id}")
            assert {next(stream).name for stream in streams} == {"canceled"}


# -- away with it


def test_a_queued_generation_is_canceled(waiting: httpx2.Client, idle: LocalService):
    first, second = (waiting.post(URL, json=GOOD).json() for _ in range(2))
    assert second["position"] == first["position"] + 1
    answer = waiting.delete(f"{URL}/{first['id']}")
    assert answer.status_code == 200
    assert answer.json()["status"] == "canceled"
    assert waiting.get(f"{URL}/{second['id']}").json()["position"] == first["position"]
    with Redis.from_url(idle.redis_url) as redis:
        assert redis.lpos("rq:queue:emoji-sd.normal", first["id"]) is None


def test_a_running_generation_is_canceled_between_two_steps(http: httpx2.Client):
    id = http.post(URL, json=LONG).json()["id"]
    with listening(http, id) as stream:
        assert next(event for event in stream if event.name == "progress").data["step"] < 100
        assert http.delete(f"{URL}/{id}").json()["status"] == "canceled"
        assert [event.name for event in stream if event.name != "progress"] == ["canceled"]
    stopped_at = http.get(f"{URL}/{id}").json()
    assert stopped_at["status"] == "canceled"
    assert stopped_at["images"] == []
    assert http.post(URL, json=GOOD, headers=WAIT).json()["status"] == "succeeded"


def test_to_cancel_twice_is_no_error(waiting: httpx2.Client):
    id = waiting.post(URL, json=GOOD).json()["id"]
    assert waiting.delete(f"{URL}/{id}").json() == waiting.delete(f"{URL}/{id}").json()


def test_what_has_ended_cannot_be_canceled(http: httpx2.Client, drawn: dict[str, Any]):
    problem_of(http.delete(f"{URL}/{drawn['id']}"), 409, "not-cancelable")
    assert http.get(f"{URL}/{drawn['id']}").json() == drawn


# -- list


def test_generations_are_listed_newest_first_page_by_page(waiting: httpx2.Client):
    ids = [waiting.post(URL, json=GOOD).json()["id"] for _ in range(5)]
    listed, pages, link = [], 0, f"{URL}?limit=2&status=queued&model=emoji-sd"
    while link and pages < 3:
        answer = waiting.get(link)
        page = answer.json()
        listed += [generation["id"] for generation in page["data"]]
        pages += 1
        assert f"cursor={page['next_cursor']}" in answer.headers["link"]
        assert answer.headers["link"].endswith('>; rel="next"')
        link = answer.headers["link"].partition(">")[0].removeprefix("<")
    assert listed[:5] == ids[::-1]
    assert len(set(listed)) == 6


def test_a_last_page_says_so(waiting: httpx2.Client):
    waiting.post(URL, json=GOOD)
    answer = waiting.get(URL, params={"limit": 100})
    assert answer.json()["next_cursor"] is None
    assert "link" not in answer.headers


def test_a_list_can_be_filtered(waiting: httpx2.Client):
    id = waiting.post(URL, json=GOOD).json()["id"]
    waiting.delete(f"{URL}/{id}")
    assert waiting.get(URL, params={"status": "canceled"}).json()["data"][0]["id"] == id
    assert id not in [shown["id"] for shown in waiting.get(URL, params={"status": "queued"}).json()["data"]]
    assert waiting.get(URL, params={"model": "sdxl"}).json()["data"] == []


# -- pictures


def test_a_picture_is_served_with_headers_that_keep_it_safe_and_cached(http: httpx2.Client, drawn: dict[str, Any]):
    file = http.get(drawn["images"][1]["url"])
    assert file.headers["content-type"] == "image/png"
    assert file.headers["etag"].startswith('"')
    assert file.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert file.headers["x-content-type-options"] == "nosniff"
    assert file.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert file.headers["content-disposition"] == f'inline; filename="{drawn["id"]}-1.png"'
    assert file.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize("form", ["{0}", "W/{0}", '"other", {0}', '"other",W/{0} , "more"', "*"])
def test_who_has_a_picture_is_told_so(http: httpx2.Client, drawn: dict[str, Any], form: str):
    url = drawn["images"][0]["url"]
    etag = http.get(url).headers["etag"]
    answer = http.get(url, headers={"If-None-Match": form.format(etag)})
    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == etag


def test_who_has_another_picture_gets_this_one(http: httpx2.Client, drawn: dict[str, Any]):
    for tag in ('"other"', "", 'W/"other"', drawn["id"]):
        assert http.get(drawn["images"][0]["url"], headers={"If-None-Match": tag}).status_code == 200


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ("bytes=0-9", slice(0, 10)),
        ("bytes=10-19", slice(10, 20)),
        ("bytes=100-", slice(100, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=0-999999999", slice(0, None)),
        ("bytes=-999999999", slice(0, None)),
    ],
)
def test_a_part_of_a_picture(http: httpx2.Client, drawn: dict[str, Any], wanted: str, part: slice):
    url = drawn["images"][0]["url"]
    whole = http.get(url).content
    answer = http.get(url, headers={"Range": wanted})
    begin, end, _ = part.indices(len(whole))
    assert answer.status_code == 206
    assert answer.headers["content-range"] == f"bytes {begin}-{end - 1}/{len(whole)}"
    assert int(answer.headers["content-length"]) == end - begin
    assert answer.content == whole[part]


@pytest.mark.parametrize("wanted", ["bytes=9999999-", "bytes=-0", "bytes=5-2"])
def test_a_part_that_there_is_not(http: httpx2.Client, drawn: dict[str, Any], wanted: str):
    url = drawn["images"][0]["url"]
    answer = http.get(url, headers={"Range": wanted})
    problem_of(answer, 416, "range-not-satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(http.get(url).content)}"
    assert "cache-control" not in answer.headers


@pytest.mark.parametrize(
    "wanted", ["bytes=0-4, 10-14", "lines=0-4", "bytes=", "bytes=-", "bytes=a-b", f"bytes=0-{'9' * 5000}", "0-4"]
)
def test_a_range_that_we_do_not_serve_gets_the_whole(http: httpx2.Client, drawn: dict[str, Any], wanted: str):
    url = drawn["images"][0]["url"]
    answer = http.get(url, headers={"Range": wanted})
    assert (answer.status_code, answer.content) == (200, http.get(url).content)


def test_a_part_is_only_of_the_picture_that_is_meant(http: httpx2.Client, drawn: dict[str, Any]):
    url = drawn["images"][0]["url"]
    whole = http.get(url)
    same = http.get(url, headers={"Range": "bytes=0-9", "If-Range": whole.headers["etag"]})
    other = http.get(url, headers={"Range": "bytes=0-9", "If-Range": '"other"'})
    assert (same.status_code, other.status_code) == (206, 200)
    assert other.content == whole.content


def test_head_is_get_without_the_body(http: httpx2.Client, drawn: dict[str, Any]):
    for path in (drawn["images"][0]["url"], f"{URL}/{drawn['id']}", "/v1/models", "/livez", "/readyz"):
        got, head = http.get(path), http.head(path, headers={"Range": "bytes=0-4"})
        assert (head.status_code, head.content) == (200, b"")
        for name in ("content-length", "content-type", "etag"):
            assert head.headers.get(name) == got.headers.get(name)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "avif"])
def test_every_format_can_be_read(http: httpx2.Client, kind: str):
    request = GOOD | {"output_format": kind, "width": 96, "height": 64}
    made = http.post(URL, json=request, headers=WAIT).json()
    file = http.get(made["images"][0]["url"])
    assert file.headers["content-type"] == f"image/{kind}"
    assert file.headers["content-disposition"].endswith(f'.{kind}"')
    with Image.open(io.BytesIO(file.content)) as image:
        image.load()
        assert image.format == kind.upper()
        assert image.size == (96, 64) == (made["images"][0]["width"], made["images"][0]["height"])


def test_a_png_says_how_it_was_made(http: httpx2.Client, drawn: dict[str, Any]):
    with Image.open(io.BytesIO(http.get(drawn["images"][1]["url"]).content)) as image:
        text = image.info["parameters"]
    assert text.startswith("a dog\n")
    assert "Steps: 6, Sampler: DPM++ 2M, CFG scale: 3.0, Seed: 8, Size: 64x64, Model: emoji-sd" in text


def test_a_picture_that_there_is_not(http: httpx2.Client, drawn: dict[str, Any]):
    problem_of(http.get(f"{URL}/{drawn['id']}/images/2"), 404)
    problem_of(http.get(f"{URL}/{drawn['id']}/previews/0/3"), 404)
    problem_of(http.get(f"{URL}/{drawn['id']}/previews/2/2"), 404)


# -- models


def test_models_say_all_that_a_form_needs(http: httpx2.Client):
    models = http.get("/v1/models").json()["data"]
    assert [model["name"] for model in models] == list(Settings.model_fields["models"].default)
    model = models[0]
    assert model == http.get("/v1/models/emoji-sd").json()
    card = next(card for card in read_cards(CARDS) if card.name == "emoji-sd")
    assert model == card.public().model_dump()
    assert model["defaults"]["scheduler"] in model["schedulers"]
    assert "memory_mib" not in model


# -- the documentation of it


@pytest.fixture(scope="module")
def document(service: LocalService) -> dict[str, Any]:
    return httpx2.get(f"{service.url}/openapi.json").json()


def conforms(document: dict[str, Any], name: str, shown: Any) -> None:
    jsonschema.validate(shown, document | {"$ref": f"#/components/schemas/{name}"}, jsonschema.Draft202012Validator)


def test_the_openapi_document_is_valid_and_lists_every_problem(document: dict[str, Any]):
    validate(document)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    schema = answer["content"]["application/problem+json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/Problem"}, (path, method, status)
                    assert list(answer["content"]) == ["application/problem+json"]
            if path.startswith("/v1/"):
                assert {"401", "422", "503"} <= operation["responses"].keys(), (path, method)
    assert {"400", "413", "415"} <= document["paths"][URL]["post"]["responses"].keys()
    for path in ("/{id}/images/{number}", "/{id}/previews/{number}/{step}"):
        file = document["paths"][URL + path]["get"]
        assert {"200", "206", "304", "404", "416"} <= file["responses"].keys()
        assert {"Range", "If-Range", "If-None-Match"} <= {parameter["name"] for parameter in file["parameters"]}


def test_answers_are_as_documented(http: httpx2.Client, document: dict[str, Any], drawn: dict[str, Any]):
    conforms(document, "Generation", drawn)
    conforms(document, "Generation", http.post(URL, json=GOOD).json())
    conforms(document, "GenerationList", http.get(URL).json())
    conforms(document, "ModelList", http.get("/v1/models").json())
    conforms(document, "Problem", http.get(f"{URL}/nope").json())
    conforms(document, "Problem", http.post(URL, json={"prompt": ""}).json())
    conforms(document, "GenerationRequest", GOOD)


def test_the_docs_are_there(http: httpx2.Client):
    assert "swagger" in http.get("/docs").text


# -- how it runs


def test_the_api_needs_no_torch():
    heavy = ("torch", "transformers", "diffusers", "numpy", "workers")
    code = f"import sys, app.main, app.cli, app.drawing; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_probes_answer(http: httpx2.Client):
    assert (http.get("/livez").text, http.get("/readyz").text) == ("ok", "ready")


def test_a_bug_is_a_problem_and_its_traceback_is_logged(valkey: EmbeddedRedis, tmp_path: Path):
    app = create_app(local_settings(tmp_path), valkey.url)
    with TestClient(app, raise_server_exceptions=False) as client, Redis.from_url(valkey.url) as redis:
        id = client.post(URL, json=GOOD).json()["id"]
        redis.hset(f"rq:job:{id}", "data", b"garbage")
        with capture_logs() as logged:
            answer = client.get(f"{URL}/{id}")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["title"] == "Internal error"
    assert "garbage" not in answer.text
    (entry,) = [entry for entry in logged if entry["event"] == "unhandled_error"]
    assert (entry["method"], entry["path"]) == ("GET", f"{URL}/{id}")
    assert isinstance(entry["exc_info"], Exception)


def test_every_metric_is_there_after_one_generation(http: httpx2.Client, drawn: dict[str, Any]):
    text = http.get("/metrics").text
    ours = {next(iter(it.describe())).name for it in vars(metrics).values() if isinstance(it, MetricWrapperBase)}
    missing = {name for name in ours if f"\n{name}" not in f"\n{text}"}
    assert not missing
    assert 'darkroom_requests_total{model="emoji-sd",status="succeeded"}' in text
    assert 'darkroom_queue_depth{queue="emoji-sd.high"} 0.0' in text
    assert 'darkroom_images_total{format="png"}' in text
