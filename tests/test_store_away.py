"""The blob store away, full or not to be written to: clients are told so, and nothing is queued or half stored."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from redis import Redis
from starlette.testclient import TestClient

from app.local import EmbeddedRedis
from app.main import create_app
from app.storage import BlobStore, generation_folder, image_key
from tests.conftest import local_settings
from tests.proxy import Proxy
from tests.test_bad_input import GOOD, URL, picture, problem_of

WITH_PICTURES = GOOD | {"image": picture(), "mask": picture(mode="L", colour=255)}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system or be somebody else")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@contextmanager
def api(valkey: EmbeddedRedis, tmp_path: Path, blob_url: str) -> Generator[TestClient]:
    """An API that reaches Redis whoever it runs as."""
    with Proxy(valkey.url) as proxy:
        app = create_app(local_settings(tmp_path, blob_url=blob_url), proxy.redis_url)
        with TestClient(app, raise_server_exceptions=False) as http:
            yield http


@pytest.fixture
def http(valkey: EmbeddedRedis, connection: "Redis", tmp_path: Path, root: Path) -> Iterator[TestClient]:
    with api(valkey, tmp_path, root.as_uri()) as http:
        yield http


def is_refused(http: TestClient, connection: "Redis") -> None:
    """With pictures, that is; what needs no store is accepted."""
    answer = http.post(URL, json=WITH_PICTURES)
    problem_of(answer, 503, "store-unavailable")
    assert "retry-after" in answer.headers
    assert connection.keys("rq:job:*") == []
    assert http.post(URL, json=GOOD).status_code == 202
    connection.flushall()


def is_accepted(http: TestClient) -> None:
    answer = http.post(URL, json=WITH_PICTURES)
    assert answer.status_code == 202, answer.text


def files(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]


@needs_root
def test_on_a_full_disk_nothing_is_queued_and_no_half_of_a_picture_stays(
    http: TestClient, connection: "Redis", root: Path
):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", root], check=True)
    try:
        (root / "filling").write_bytes(bytes(60_000))  # a page is left: for the image, and not for the mask
        for _ in range(3):
            is_refused(http, connection)
            assert files(root) == ["filling"]
        (root / "filling").unlink()
        is_accepted(http)
        assert sorted(path.rpartition("/")[2] for path in files(root)) == ["image.png", "mask.png"]
    finally:
        subprocess.run(["umount", root], check=True)


@needs_root
def test_a_store_that_may_not_be_written_to(http: TestClient, connection: "Redis", root: Path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", root], check=True)
    try:
        is_refused(http, connection)
        assert files(root) == []
    finally:
        subprocess.run(["umount", root], check=True)
    is_accepted(http)


def test_a_directory_that_has_gone(http: TestClient, connection: "Redis", root: Path):
    shutil.rmtree(root)
    root.write_bytes(b"in its place")
    is_refused(http, connection)
    problem_of(http.get("/readyz"), 503, "store-unavailable")
    root.unlink()
    root.mkdir()
    assert http.get("/readyz").status_code == 200
    is_accepted(http)


# -- S3


class Broken(BaseHTTPRequestHandler):
    """Answers every request with `status`."""

    status = 500

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(self.status)
        self.send_header("content-length", "0")
        self.end_headers()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def log_message(self, format: str, *_: object) -> None:
        pass


@pytest.fixture(params=[500, 503, 403])
def broken_s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    handler = type("Handler", (Broken,), {"status": request.param})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_REGION", "eu-central-1")
        yield "s3://bucket/prefix"
        server.shutdown()


def test_an_s3_that_answers_with_errors(valkey: EmbeddedRedis, connection: "Redis", tmp_path: Path, broken_s3: str):
    with api(valkey, tmp_path, broken_s3) as http:
        began = time.monotonic()
        is_refused(http, connection)
        assert time.monotonic() - began < 25  # obstore tries three times, for ten seconds at most; then it is deleted
        problem_of(http.get("/readyz"), 503, "store-unavailable")
        problem_of(http.get(drawn(http, connection, None)), 503, "store-unavailable")


# -- what was drawn


def drawn(http: TestClient, connection: "Redis", blobs: BlobStore | None) -> str:
    """Where a picture is, of a generation that has succeeded."""
    id = http.post(URL, json=GOOD).json()["id"]
    key = image_key(id, 0, "png")
    if blobs:
        blobs.save(key, b"a picture")
    meta = {"images": [{"key": key, "seed": 0, "width": 64, "height": 64, "format": "png", "etag": "e"}]}
    connection.hset(f"rq:job:{id}", mapping={"status": "finished", "meta": json.dumps(meta)})
    return f"{URL}/{id}/images/0"


def test_a_picture_of_a_store_that_is_away_is_not_said_to_have_gone(http: TestClient, connection: "Redis", root: Path):
    blobs: BlobStore = http.app.state.jobs.blobs  # type: ignore[attr-defined]
    url = drawn(http, connection, blobs)
    assert http.get(url).content == b"a picture"
    root.rename(root.with_name("away"))
    problem_of(http.get(url), 503, "store-unavailable")
    root.with_name("away").rename(root)
    assert http.get(url).content == b"a picture"
    blobs.delete(generation_folder(url.split("/")[-3]))
    problem_of(http.get(url), 404, "not-found")


@needs_root
def test_a_picture_that_may_not_be_read(http: TestClient, connection: "Redis"):
    url = drawn(http, connection, http.app.state.jobs.blobs)  # type: ignore[attr-defined]
    os.seteuid(65534)
    try:
        problem_of(http.get(url), 503, "store-unavailable")
    finally:
        os.seteuid(0)
