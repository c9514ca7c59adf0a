"""Files go when Redis has forgotten their generation: not sooner, not much later, and whatever happens meanwhile."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from redis import Redis
from rq.job import Job
from structlog.testing import capture_logs

from app import retention
from app.jobs import new_id
from app.local import EmbeddedRedis
from app.retention import GRACE, LOCK, Sweeper, sweep
from app.storage import BlobStore, generation_folder, image_key, input_key, open_store, preview_key
from tests.lab import until
from tests.proxy import Proxy
from tests.test_storage import bucket, s3_endpoint, store  # noqa: F401, fixtures

HOUR = timedelta(hours=1)


def put(blobs: BlobStore, connection: "Redis | None" = None, *, age: timedelta = 2 * HOUR) -> str:
    """A generation's files; Redis knows of it if it is told."""
    id = new_id(time.time() - age.total_seconds())
    for key in (image_key(id, 0, "png"), input_key(id, "image"), preview_key(id, 0, 3)):
        blobs.save(key, b"x")
    if connection:
        connection.hset(Job.key_for(id), "status", "finished")
    return id


def kept(blobs: BlobStore) -> set[str]:
    return set(blobs.folders("generations"))


def test_what_is_old_and_forgotten_goes_whole_and_everything_else_stays(store: BlobStore, connection: "Redis"):  # noqa: F811
    forgotten = [put(store) for _ in range(5)]
    known = put(store, connection)
    waiting = put(store, connection, age=timedelta(days=6))
    young = put(store, age=timedelta(minutes=59))
    store.save("generations/not-one-of-ours/images/0.png", b"x")
    store.save("elsewhere/a", b"x")
    assert sum(sweep(connection, store, HOUR)) == 5
    assert kept(store) == {known, waiting, young, "not-one-of-ours"}
    assert not [key for id in forgotten for key in store.list(generation_folder(id))]
    assert all(len(list(store.list(generation_folder(id)))) == 3 for id in (known, waiting, young))
    assert store.open("elsewhere/a") == b"x"
    assert sum(sweep(connection, store, HOUR)) == 0


def test_more_than_one_chunk(store: BlobStore, connection: "Redis", monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.setattr(retention, "CHUNK", 4)
    known = {put(store, connection) for _ in range(3)}
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: put(store), range(10)))
    assert list(sweep(connection, store, HOUR)).count(4) <= 3
    assert kept(store) == known


def test_an_empty_store(store: BlobStore, connection: "Redis"):  # noqa: F811
    assert sum(sweep(connection, store, HOUR)) == 0


def test_two_at_once_do_no_harm(store: BlobStore, connection: "Redis"):  # noqa: F811
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: put(store), range(40)))
        known = put(store, connection)
        list(threads.map(lambda _: sum(sweep(connection, store, HOUR)), range(4)))
    sum(sweep(connection, store, HOUR))
    assert kept(store) == {known}


# -- a directory


def test_what_killed_writers_left_goes_once_nobody_can_be_writing_it(tmp_path: Path, connection: "Redis"):
    blobs = open_store(tmp_path.as_uri())
    known, forgotten, empty = put(blobs, connection), put(blobs), new_id(time.time() - 7200)
    half, writing = image_key(known, 1, "png") + "#1", image_key(known, 2, "png") + "#1"
    for key in (half, writing, image_key(forgotten, 1, "png") + "#1", image_key(empty, 0, "png") + "#12"):
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(b"hal")
    os.utime(tmp_path / half, (0, 0))
    sum(sweep(connection, blobs, HOUR))
    assert kept(blobs) == {known}
    assert (tmp_path / writing).exists()
    assert not (tmp_path / half).exists()
    assert len(list(blobs.list(generation_folder(known)))) == 3


def sweep_slowly(url: str, folder: str) -> None:
    blobs = open_store(folder)
    removed = retention.remove
    retention.remove = lambda *what: time.sleep(0.02) or removed(*what)
    sum(sweep(Redis.from_url(url), blobs, HOUR))


def test_a_sweeper_killed_half_way_leaves_the_rest_to_the_next(
    tmp_path: Path, connection: "Redis", valkey: EmbeddedRedis
):
    blobs = open_store(tmp_path.as_uri())
    known = put(blobs, connection)
    for _ in range(200):
        put(blobs)
    process = multiprocessing.get_context("spawn").Process(target=sweep_slowly, args=(valkey.url, tmp_path.as_uri()))
    process.start()
    until(lambda: len(kept(blobs)) < 150)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert len(kept(blobs)) > 1
    sum(sweep(connection, blobs, HOUR))
    assert kept(blobs) == {known}


# -- now and then, and one of all


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return open_store(tmp_path.as_uri())


def test_one_of_all_workers_sweeps_and_only_when_it_is_time(blobs: BlobStore, connection: "Redis"):
    sweepers = [Sweeper(connection, blobs, HOUR) for _ in range(8)]
    put(blobs)
    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(lambda sweeper: sweeper.maybe_sweep(), sweepers)) == [0] * 7 + [1]
    put(blobs)
    assert [Sweeper(connection, blobs, HOUR).maybe_sweep() for _ in range(3)] == [0, 0, 0]
    assert 0 < connection.ttl(LOCK) <= HOUR.total_seconds() / 4  # if it died meanwhile, another follows
    connection.delete(LOCK)
    assert [sweeper.maybe_sweep() for sweeper in sweepers] == [0] * 8  # they do not even ask so soon
    assert Sweeper(connection, blobs, HOUR).maybe_sweep() == 1


def test_what_is_being_submitted_is_not_swept_however_short_results_are_kept(blobs: BlobStore, connection: "Redis"):
    submitting, forgotten = put(blobs, age=GRACE / 2), put(blobs, age=2 * GRACE)
    assert Sweeper(connection, blobs, timedelta(seconds=1)).maybe_sweep() == 1
    assert kept(blobs) == {submitting}
    assert forgotten not in kept(blobs)


def test_without_redis_nothing_is_swept_and_the_next_time_it_is(
    blobs: BlobStore, connection: "Redis", valkey: EmbeddedRedis
):
    put(blobs)
    with Proxy(valkey.url) as proxy, Redis.from_url(proxy.redis_url, retry=None) as through_it:
        sweeper = Sweeper(through_it, blobs, HOUR)
        proxy.cut_at(b"EXISTS")
        with capture_logs() as logged:
            assert sweeper.maybe_sweep() == 0
        assert [line["event"] for line in logged] == ["sweep_failed"]
        assert len(kept(blobs)) == 1
        proxy.heal()
        connection.delete(LOCK)
        sweeper.next_look = 0
        assert sweeper.maybe_sweep() == 1
