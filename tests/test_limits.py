"""Nobody can take more than there is of anything: slow and vanished clients, crowds of listeners, and a restart."""

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
from redis import Redis

from app.local import EmbeddedRedis, LocalService, free_port, port_open
from app.parts import Part
from tests.conftest import local_settings
from tests.lab import until
from tests.test_bad_input import GOOD, URL, hashed, problem_of

PATIENCE = 1.0  # seconds, of a server that is as impatient as it can be


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    """An API alone that waits a second for clients and has places for three listeners."""
    settings = local_settings(
        tmp_path_factory.mktemp("impatient"), client_timeout=PATIENCE, max_listeners=3, api_keys=(("ann", hashed("k")),)
    )
    with LocalService(settings, workers=0) as service:
        yield service


KEY = {"Authorization": "Bearer k"}


@pytest.fixture
def http(impatient: LocalService) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=impatient.url, timeout=30, headers=KEY) as client:
        yield client


def dial(service: LocalService, *lines: str, small: bool = False) -> socket.socket:
    """A client of which nothing is expected."""
    there = socket.socket()
    if small:
        there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    there.settimeout(10)
    there.connect((service.settings.host, int(service.url.rpartition(":")[2])))
    there.sendall("".join(f"{line}\r\n" for line in lines).encode())
    return there


def until_closed(there: socket.socket) -> tuple[bytes, float]:
    began, said = time.monotonic(), b""
    try:
        while data := there.recv(65536):
            said += data
    except ConnectionResetError:
        pass
    return said, time.monotonic() - began


# -- slow clients

POST = (f"POST {URL} HTTP/1.1", "Host: x", "Content-Type: application/json", "Authorization: Bearer k")


def test_a_body_that_stops_coming_is_not_waited_for(impatient: LocalService):
    with dial(impatient, *POST, "Content-Length: 1000", "", '{"prompt": ') as there:
        said, seconds = until_closed(there)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert json.loads(said.partition(b"\r\n\r\n")[2])["type"] == "urn:darkroom:problem:body-too-slow"
    assert PATIENCE * 0.9 < seconds < 4 * PATIENCE


def test_a_slow_body_that_keeps_coming_is_waited_for(impatient: LocalService):
    body = json.dumps(GOOD).encode()
    with dial(impatient, *POST, f"Content-Length: {len(body)}", "Connection: close", "") as there:
        for i in range(0, len(body), 20):
            time.sleep(PATIENCE / 2)
            there.sendall(body[i : i + 20])
        assert until_closed(there)[0].startswith(b"HTTP/1.1 202 ")


@pytest.mark.parametrize("lines", [(), ("GET /livez HTTP/1.1", "Host: x")], ids=["nothing", "half-a-head"])
def test_a_client_that_does_not_get_to_its_request_is_cut(impatient: LocalService, lines: tuple[str, ...]):
    with dial(impatient, *lines) as there:
        said, seconds = until_closed(there)
    assert said == b""
    assert seconds < 4 * PATIENCE


def test_a_connection_between_two_requests_is_kept_but_not_in_the_middle_of_one(impatient: LocalService):
    get = ("GET /livez HTTP/1.1", "Host: x", "")

    def answered(there: socket.socket) -> bool:
        said = b""
        while not said.endswith(b"\r\n\r\nok"):
            said += there.recv(65536)
        return said.startswith(b"HTTP/1.1 200 ")

    with dial(impatient, *get) as there:
        assert answered(there)
        time.sleep(3 * PATIENCE)
        there.sendall(b"\r\n".join(line.encode() for line in (*get, "")))
        assert answered(there)
        there.sendall(b"GET /livez HTTP/1.1\r\nHost:")
        said, seconds = until_closed(there)
    assert said == b""
    assert seconds < 4 * PATIENCE


def test_a_client_that_does_not_read_its_answers_is_cut(impatient: LocalService):
    lines = ("GET /openapi.json HTTP/1.1", "Host: x", "") * 1000  # 80 MB of answers
    with dial(impatient, *lines, small=True) as there:
        time.sleep(4 * PATIENCE)
        said, _ = until_closed(there)
    assert 0 < len(said) < 20_000_000
    assert not re.search(rb"HTTP/1.1 [^2]", said)


def test_a_client_that_reads_slowly_gets_all_of_it(impatient: LocalService):
    count = 100  # 8 MB
    lines = ("GET /openapi.json HTTP/1.1", "Host: x", "") * (count - 1)
    last = ("GET /openapi.json HTTP/1.1", "Host: x", "Connection: close", "")
    with dial(impatient, *lines, *last, small=True) as there:
        said = b""
        for _ in range(12):
            time.sleep(PATIENCE / 4)
            for _ in range(50):
                said += there.recv(65536)
        said += until_closed(there)[0]
    assert said.count(b"HTTP/1.1 200 OK") == count


def test_who_listens_in_silence_is_not_taken_for_slow(impatient: LocalService, http: httpx2.Client):
    id = http.post(URL, json=GOOD).json()["id"]
    with http.stream("GET", f"{URL}/{id}/events") as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: queued"
        time.sleep(3 * PATIENCE)
        http.delete(f"{URL}/{id}")
        assert "event: canceled" in list(lines)


# -- crowds


def test_beyond_so_many_listeners_a_stream_is_refused_and_a_wait_is_answered_at_once(http: httpx2.Client):
    id = http.post(URL, json=GOOD).json()["id"]
    with ExitStack() as stack:
        streams = [stack.enter_context(http.stream("GET", f"{URL}/{id}/events")).iter_lines() for _ in range(3)]
        assert {next(lines) for lines in streams} == {"event: queued"}
        refused = http.get(f"{URL}/{id}/events")
        problem_of(refused, 503, "too-many-listeners")
        assert int(refused.headers["retry-after"]) >= 1
        began = time.monotonic()
        answer = http.post(URL, json=GOOD, headers={"Prefer": "wait=20"})
        assert time.monotonic() - began < 2
        assert answer.status_code == 202
        assert "preference-applied" not in answer.headers
    until(lambda: has_room(http, id), 5)  # the places of those who went are free again


def has_room(http: httpx2.Client, id: str) -> bool:
    with ExitStack() as stack:
        streams = [stack.enter_context(http.stream("GET", f"{URL}/{id}/events")) for _ in range(3)]
        return all(stream.status_code == 200 for stream in streams)


def test_a_listener_that_vanishes_leaves_its_place(impatient: LocalService, http: httpx2.Client):
    id = http.post(URL, json=GOOD).json()["id"]
    for _ in range(3):
        head = (f"GET {URL}/{id}/events HTTP/1.1", "Host: x", "Authorization: Bearer k", "")
        with dial(impatient, *head) as there:
            assert there.recv(100).startswith(b"HTTP/1.1 200 ")
    until(lambda: has_room(http, id), 5)


# -- who is asking


def test_without_a_key_a_body_is_not_even_read(impatient: LocalService):
    lines = [line for line in POST if not line.startswith("Authorization")]
    with dial(impatient, *lines, "Content-Length: 1000000", "", "{") as there:
        began = time.monotonic()
        assert there.recv(100).startswith(b"HTTP/1.1 401 ")
        assert time.monotonic() - began < PATIENCE / 2


@pytest.mark.parametrize(
    ("id", "believed"), [("a-B.c_9", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False)]
)
def test_the_lines_that_are_logged_for_a_request_have_its_id(
    valkey: EmbeddedRedis, tmp_path: Path, capfd: pytest.CaptureFixture[str], id: str, believed: bool
):
    logging_api = LocalService(
        local_settings(tmp_path, redis_url=valkey.url).model_copy(update={"log_level": "info"}), 0
    )
    with logging_api as service:
        accepted = httpx2.post(service.url + URL, json=GOOD, headers={"X-Request-ID": id}).json()["id"]
        httpx2.post(service.url + URL, json=GOOD)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"queued"' in line]
    assert [line["generation"] == accepted for line in lines] == [True, False]
    assert [line.get("request_id") for line in lines] == [id if believed else None, None]


def test_a_bug_is_logged_with_the_id_of_its_request(
    valkey: EmbeddedRedis, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    with (
        LocalService(local_settings(tmp_path, redis_url=valkey.url), 0) as service,
        Redis.from_url(valkey.url) as redis,
    ):
        id = httpx2.post(service.url + URL, json=GOOD).json()["id"]
        redis.hset(f"rq:job:{id}", "data", b"garbage")
        assert httpx2.get(f"{service.url}{URL}/{id}", headers={"X-Request-ID": "7"}).status_code == 500
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "unhandled_error" in line]
    assert json.loads(line)["request_id"] == "7"


# -- a restart


@pytest.fixture
def restarted(tmp_path: Path) -> Iterator[LocalService]:
    with LocalService(local_settings(tmp_path, redis_timeout=10), workers=0) as service:  # however busy the machine is
        yield service


def terminated(service: LocalService) -> float:
    """How long it took."""
    began = time.monotonic()
    api = service.parts["api"].process
    api.terminate()
    api.wait(30)
    return time.monotonic() - began


def test_who_waits_while_the_api_stops_is_answered_as_it_stands(restarted: LocalService):
    def wait() -> httpx2.Response:
        return httpx2.post(restarted.url + URL, json=GOOD, headers={"Prefer": "wait=50"}, timeout=60)

    with ThreadPoolExecutor(20) as clients, Redis.from_url(restarted.redis_url) as redis:
        waiting = [clients.submit(wait) for _ in range(20)]
        until(lambda: redis.info("clients")["blocked_clients"] == 20, 30, lambda: str(redis.info("clients")))
        assert terminated(restarted) < 5
        answers = [future.result() for future in waiting]
        assert {answer.status_code for answer in answers} == {202}
        assert {answer.json()["status"] for answer in answers} == {"queued"}
        assert redis.llen("rq:queue:emoji-sd.normal") == len({answer.json()["id"] for answer in answers}) == 20


def test_who_listens_while_the_api_stops_reads_a_whole_stream_without_an_end(restarted: LocalService):
    id = httpx2.post(restarted.url + URL, json=GOOD).json()["id"]
    with httpx2.stream("GET", f"{restarted.url}{URL}/{id}/events", timeout=60) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: queued"
        assert terminated(restarted) < 5
        assert not [line for line in lines if line.startswith("event: ")]  # and no half of a chunk: that would raise


def test_of_those_who_are_answered_while_the_api_stops_nobody_sees_an_error(restarted: LocalService):
    """Connections of their own, as nginx makes them: each is refused before it has sent anything, or answered."""
    stopped = False

    def submit_on() -> list[int]:
        statuses = []
        while not stopped:
            try:
                statuses.append(httpx2.post(restarted.url + URL, json=GOOD, timeout=30).status_code)
            except httpx2.ConnectError:
                continue
        return statuses

    with ThreadPoolExecutor(8) as clients:
        posting = [clients.submit(submit_on) for _ in range(8)]
        time.sleep(1)
        try:
            terminated(restarted)
        finally:
            stopped = True
        statuses = [status for future in posting for status in future.result()]
    assert set(statuses) == {202}  # some, and no other


def test_an_api_that_stops_answers_whoever_got_through_to_it(tmp_path: Path):
    """Also those whom the kernel has let in and nobody has accepted yet: more than half of the stops met some."""
    answered, lost = list[bytes](), list[str]()

    def ask(port: int) -> None:
        while True:
            try:
                connection = socket.create_connection(("127.0.0.1", port), 5)
            except OSError:
                return
            with connection:
                try:
                    connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    (answered if (data := connection.recv(100)) else lost).append(data or "nothing came")
                except OSError as error:
                    lost.append(str(error))

    for _ in range(4):
        port = free_port("127.0.0.1")
        environment = (
            os.environ | local_settings(tmp_path, port=port).environment() | {"REDIS_URL": "redis://127.0.0.1:1"}
        )
        api = Part(
            "API", [sys.executable, "-m", "app.cli", "api"], environment, lambda _, at=port: port_open("127.0.0.1", at)
        )
        api.wait(30)
        clients = [threading.Thread(target=ask, args=(port,)) for _ in range(12)]
        for client in clients:
            client.start()
        time.sleep(0.5)
        api.stop()
        for client in clients:
            client.join()
    assert lost == []
    assert len(answered) > 100
