"""A worker's patience with Redis: with a real one that is killed, stopped, loading, demoted or full."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, ConnectionError
from redis.retry import Retry

from app.jobs import atomically
from app.parts import spawn
from tests.lab import Server, until
from workers.connection import RedisAway, connect

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("away"))
    yield server
    server.part.process.send_signal(signal.SIGCONT)
    server.stop()


@pytest.fixture(autouse=True)
def _as_it_was(server: Server) -> Iterator[None]:
    yield
    server.part.process.send_signal(signal.SIGCONT)
    if server.part.process.poll() is not None:
        server.restart()
    with Redis.from_url(server.url) as own:
        own.replicaof("NO", "ONE")
        own.config_set("maxmemory", 0)


def stop(server: Server) -> None:
    server.part.process.send_signal(signal.SIGSTOP)


def demote(server: Server) -> None:
    with Redis.from_url(server.url) as own:
        own.replicaof("127.0.0.1", 1)


def fill(server: Server) -> None:
    with Redis.from_url(server.url) as own:
        own.config_set("maxmemory", 1)


def wake(server: Server) -> None:
    server.part.process.send_signal(signal.SIGCONT)


def promote(server: Server) -> None:
    with Redis.from_url(server.url) as own:
        own.replicaof("NO", "ONE")


def empty(server: Server) -> None:
    with Redis.from_url(server.url) as own:
        own.config_set("maxmemory", 0)


def loading(server: Server) -> bool:
    try:
        Redis.from_url(server.url, retry=Retry(NoBackoff(), 0)).ping()
    except BusyLoadingError:
        return True
    except ConnectionError:
        pass  # not there yet
    return False


Change = Callable[[Server], None]
AWAY = {
    "killed": (Server.kill, Server.restart),
    "black-holed": (stop, wake),
    "read-only": (demote, promote),
    "full": (fill, empty),
}


@pytest.mark.parametrize(("leaves", "returns"), AWAY.values(), ids=AWAY)
@pytest.mark.parametrize("known", [True, False], ids=["connected", "connecting"])
def test_a_redis_that_is_away_is_waited_for_and_then_no_longer(
    server: Server, leaves: Change, returns: Change, known: bool
):
    redis = connect(server.url, outage=2, answer=0.4)
    if known:
        redis.ping()
    leaves(server)
    began = time.monotonic()
    with pytest.raises(RedisAway, match="away for 2 s"):
        redis.set("a", 1)
    assert 2 <= time.monotonic() - began < 5
    returns(server)
    redis.set("a", 2)
    assert redis.get("a") == b"2"


@pytest.mark.parametrize(("leaves", "returns"), AWAY.values(), ids=AWAY)
def test_a_redis_that_comes_back_in_time_has_not_been_missed(server: Server, leaves: Change, returns: Change):
    redis = connect(server.url, outage=20, answer=0.4)
    redis.ping()
    leaves(server)
    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(redis.pipeline().set("a", 3).set("b", 4).execute)
        time.sleep(1.5)
        assert not answers.done()
        returns(server)
        assert answers.result() == [True, True]


def test_a_redis_that_is_loading_is_waited_for(server: Server):
    redis = connect(server.url, outage=20)
    with redis.pipeline(transaction=False) as pipe:
        for i in range(8000):
            pipe.set(f"key:{i}", "x" * 100)
        pipe.execute()
    server.kill()
    slowly = ["--key-load-delay", "500", "--loading-process-events-interval-bytes", "1024"]
    server.part.process = spawn([*server.part.command, *slowly], dict(os.environ), signal.SIGTERM)
    until(lambda: loading(server), 10)
    redis.set("a", 5)
    assert redis.dbsize() > 8000


def test_a_transaction_on_a_redis_that_may_only_be_read_ends(server: Server):
    """Watched keys can be read, so nothing but its refusal to write says that it is away."""
    redis = connect(server.url, outage=1)

    def write(pipe):
        pipe.get("a")
        pipe.multi()
        demote(server)
        pipe.set("a", 1)

    with pytest.raises(Exception, match="read only replica"):
        atomically(redis, write, "a")


def test_no_answer_to_a_subscriber_is_no_failure(server: Server):
    with connect(server.url, outage=1, answer=0.2).pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe("bell")
        assert pubsub.get_message(timeout=1.5) is None
        connect(server.url).publish("bell", "rings")
        until(lambda: pubsub.get_message(timeout=0.1), 5)


WORKER = """
import sys
from app import logs
from app.settings import Settings
from workers.main import run
settings = Settings(data_dir=sys.argv[2], log_format="json", torch_threads=1, max_rows=2)
logs.set_up(settings)
run(settings, sys.argv[1], outage=2)
"""


@pytest.mark.parametrize("leaves", [Server.kill, stop], ids=["killed", "black-holed"])
def test_a_worker_without_redis_ends_with_one_clear_line(server: Server, tmp_path: Path, leaves: Change):
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, server.url, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    with Redis.from_url(server.url) as own:
        own.flushall()
        until(lambda: own.hlen("darkroom:pace:emoji-sd") or worker.poll() is not None, 90)
    leaves(server)
    _, said = worker.communicate(timeout=60)
    assert worker.returncode == os.EX_TEMPFAIL, said
    assert "Redis has been away for 2 s" in said
    assert "Traceback" not in said
    assert len(said.splitlines()) < 12, said
