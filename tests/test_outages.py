"""Redis away, in every way it can be: clients are told in 2 s, what was stored stays accepted, and all comes back."""

import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from redis import ConnectionError, Redis

from app.events import PATIENCE
from app.local import LocalService
from app.scripts import SUBMIT
from tests.conftest import local_settings
from tests.lab import Server, until
from tests.proxy import Proxy
from tests.test_bad_input import GOOD, URL, problem_of

IN_TIME = 2.0  # seconds: as `redis_timeout` says


class Away:
    """An API without workers, its Valkey, and the network in between."""

    def __init__(self, server: Server, proxy: Proxy, service: LocalService):
        self.server, self.proxy, self.service = server, proxy, service
        self.redis = Redis.from_url(server.url)
        self.http = httpx2.Client(base_url=service.url, timeout=30)
        self.id = self.http.post(URL, json=GOOD).json()["id"]

    def close(self) -> None:
        self.http.close()
        self.redis.close()

    # -- the ways

    @contextmanager
    def cut(self) -> Generator[None]:
        self.proxy.cut()
        yield
        self.proxy.heal()

    @contextmanager
    def black_hole(self) -> Generator[None]:
        self.proxy.black_hole()
        yield
        self.proxy.heal()

    @contextmanager
    def stopped(self) -> Generator[None]:
        os.kill(self.server.part.process.pid, signal.SIGSTOP)
        yield
        os.kill(self.server.part.process.pid, signal.SIGCONT)

    @contextmanager
    def killed(self) -> Generator[None]:
        self.server.kill()
        yield
        self.server.restart()

    @contextmanager
    def loading(self) -> Generator[None]:
        """A Valkey that is busy reading what it had: tens of thousands of keys, at a millisecond each."""
        with self.redis.pipeline(transaction=False) as pipe:
            for i in range(30_000):
                pipe.set(f"filling:{i}", i)
            pipe.execute()
        self.server.kill()
        usual = self.server.part.command
        self.server.part.command = [*usual, "--key-load-delay", "1000"]
        self.server.start()
        until(lambda: says(self.redis, "LOADING"))
        yield
        assert says(self.redis, "LOADING"), "it was done before we were"
        self.server.kill()
        self.server.part.command = usual
        self.server.restart()

    @contextmanager
    def replica(self) -> Generator[None]:
        """Of a primary that is not there: it answers what it knows, and takes nothing."""
        self.redis.replicaof("127.0.0.1", "1")
        yield
        self.redis.replicaof("NO", "ONE")

    @contextmanager
    def full(self) -> Generator[None]:
        self.redis.config_set("maxmemory", 1)
        yield
        self.redis.config_set("maxmemory", 0)


def says(redis: Redis, word: str) -> bool:
    try:
        redis.ping()
    except ConnectionError as error:
        return word in type(error).__name__.upper()
    return False


@pytest.fixture
def away(tmp_path: Path) -> Iterator[Away]:
    server = Server(tmp_path / "valkey")
    with Proxy(server.url) as proxy:
        settings = local_settings(tmp_path, redis_url=proxy.redis_url)
        with LocalService(settings, workers=0) as service:
            away = Away(server, proxy, service)
            yield away
            away.close()
    server.stop()


def asked(http: httpx2.Client, method: str, path: str, **what: Any) -> tuple[httpx2.Response, float]:
    began = time.monotonic()
    answer = http.request(method, path, **what)
    return answer, time.monotonic() - began


Request = tuple[str, str, dict[str, Any]]


def writing(id: str) -> list[Request]:
    return [
        ("POST", URL, {"json": GOOD}),
        ("POST", URL, {"json": GOOD, "headers": {"Idempotency-Key": "a", "Prefer": "wait=20"}}),
        ("DELETE", f"{URL}/{id}", {}),
    ]


def reading(id: str) -> list[Request]:
    return [
        ("GET", URL, {}),
        ("GET", f"{URL}/{id}", {}),
        ("GET", f"{URL}/{id}/events", {}),
        ("GET", f"{URL}/{id}/images/0", {}),
        ("GET", "/readyz", {}),
    ]


def refused_in_time(http: httpx2.Client, requests: list[Request]) -> None:
    with ThreadPoolExecutor(len(requests)) as clients:
        answers = [clients.submit(asked, http, method, path, **what) for method, path, what in requests]
        assert http.get("/livez").status_code == 200
        for answer, seconds in (future.result() for future in answers):
            problem_of(answer, 503, "store-unavailable")
            assert "retry-after" in answer.headers
            assert seconds < IN_TIME, f"{answer.request.method} {answer.url} took {seconds:.2f} s"


def comes_back(away: Away) -> None:
    until(lambda: away.http.get("/readyz").status_code == 200, IN_TIME)
    assert away.http.get(f"{URL}/{away.id}").json()["status"] == "queued"
    assert away.http.post(URL, json=GOOD).status_code == 202
    assert "darkroom_redis_up 1.0" in away.http.get("/metrics").text


Way = Callable[[Away], AbstractContextManager[None]]
NOTHING_WORKS: list[Way] = [Away.cut, Away.black_hole, Away.stopped, Away.killed, Away.loading]
ONLY_READING_WORKS: list[Way] = [Away.replica, Away.full]


def name(way: Way) -> str:
    return way.__name__


@pytest.mark.parametrize("way", NOTHING_WORKS, ids=name)
def test_without_redis_every_client_is_told_so_in_time_and_it_comes_back_without_a_restart(away: Away, way: Way):
    with way(away):
        for _ in range(2):  # with connections from before, and without
            refused_in_time(away.http, writing(away.id) + reading(away.id))
    comes_back(away)


@pytest.mark.parametrize("way", NOTHING_WORKS, ids=name)
def test_metrics_are_there_without_redis_and_say_that_it_is_away(away: Away, way: Way):
    assert "darkroom_redis_up 1.0" in away.http.get("/metrics").text
    with way(away):
        answer, seconds = asked(away.http, "GET", "/metrics")
        assert answer.status_code == 200
        assert seconds < IN_TIME
        assert "darkroom_redis_up 0.0" in answer.text
        assert "darkroom_build_info" in answer.text
        assert "darkroom_queue_depth" not in answer.text


@pytest.mark.parametrize("way", ONLY_READING_WORKS, ids=name)
def test_a_redis_that_takes_nothing_more_is_away_for_those_who_bring_something(away: Away, way: Way):
    with way(away):
        refused_in_time(away.http, writing(away.id))
        assert away.http.get(f"{URL}/{away.id}").json()["status"] == "queued"
        assert len(away.http.get(URL).json()["data"]) == 1  # nothing of what was refused is there
    comes_back(away)


def test_many_clients_at_once_are_told_in_time(away: Away):
    """More than there are threads, each of which waits for Redis."""
    limits = httpx2.Limits(max_connections=200)
    with httpx2.Client(base_url=away.service.url, timeout=30, limits=limits) as http, away.black_hole():
        refused_in_time(http, reading(away.id) * 30)
    comes_back(away)


# -- what was stored is acknowledged, and what was not is not


def queued(away: Away) -> list[str]:
    return [id.decode() for id in away.redis.lrange("rq:queue:emoji-sd.normal", 0, -1)]


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "once"}], ids=["plain", "with-key"])
def test_what_was_stored_is_stored_once_though_the_answer_was_lost(away: Away, headers: dict[str, str]):
    before = queued(away)
    away.proxy.lose_answer_to(SUBMIT.sha.encode())
    answer = away.http.post(URL, json=GOOD, headers=headers)
    assert answer.status_code == 202
    assert "idempotent-replayed" not in answer.headers
    assert queued(away) == [*before, answer.json()["id"]]


def test_what_was_not_stored_is_not_acknowledged(away: Away):
    before = queued(away)
    away.proxy.cut_at(SUBMIT.sha.encode())
    problem_of(away.http.post(URL, json=GOOD), 503, "store-unavailable")
    assert queued(away) == before


# -- those who were listening


@pytest.mark.parametrize("way", [Away.cut, Away.black_hole, Away.killed], ids=name)
def test_who_waits_while_redis_goes_is_told_that_it_was_accepted(away: Away, way: Way):
    before = queued(away)
    with ThreadPoolExecutor(1) as client:
        waiting = client.submit(asked, away.http, "POST", URL, json=GOOD, headers={"Prefer": "wait=4"})
        until(lambda: len(queued(away)) > len(before) and away.redis.info("clients")["blocked_clients"])
        with way(away):
            answer, seconds = waiting.result(20)
    assert answer.status_code == 202
    assert answer.json()["status"] == "queued"
    assert answer.json()["id"] in queued(away)
    assert seconds < 4 + IN_TIME


@pytest.mark.parametrize(
    ("way", "noticed_in"),
    [(Away.cut, IN_TIME), (Away.killed, IN_TIME), (Away.black_hole, PATIENCE + IN_TIME)],
    ids=["cut", "killed", "black_hole"],
)
def test_a_stream_ends_without_an_end_while_redis_is_away_and_goes_on_later(away: Away, way: Way, noticed_in: float):
    with away.http.stream("GET", f"{URL}/{away.id}/events") as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: queued"
        last = next(line for line in lines if line.startswith("id: ")).removeprefix("id: ")
        with way(away):
            began = time.monotonic()
            rest = list(lines)
            assert time.monotonic() - began < noticed_in
    assert not [line for line in rest if line.startswith("event: ")]
    comes_back(away)
    away.http.delete(f"{URL}/{away.id}")
    heard = away.http.get(f"{URL}/{away.id}/events", headers={"Last-Event-ID": last}).text
    assert [line for line in heard.splitlines() if line.startswith("event: ")] == ["event: canceled"]
