"""What the blob store keeps, and for how long."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
from obstore.exceptions import BaseError as BlobStoreError
from redis import Redis
from rq.job import Job

from app import retention
from app.jobs import new_id
from app.retention import Sweeper, sweep
from app.storage import BlobStore, image_key, input_key, open_store
from tests.lab import until
from tests.test_storage import bucket, s3_endpoint, store  # noqa: F401

GRACE = timedelta(minutes=1)


def stored(blobs: BlobStore, age: float) -> str:
    id = new_id(time.time() - age)
    blobs.save(input_key(id, "image"), b"sent")
    blobs.save(image_key(f"{id}/a1b2c3d4", 0, "png"), b"drawn")
    return id


def known(connection: "Redis", id: str) -> None:
    connection.hset(Job.key_for(id), "status", "finished")


def test_what_redis_has_forgotten_goes_and_the_rest_stays(store: BlobStore, connection: "Redis"):  # noqa: F811
    forgotten, kept, fresh = stored(store, 7200), stored(store, 7200), stored(store, 5)
    known(connection, kept)
    store.save("generations/not-an-id/of-ours", b"somebody's")
    assert sweep(connection, store, GRACE) == 1
    assert set(store.folders("generations")) == {kept, fresh, "not-an-id"}
    assert forgotten not in set(store.folders("generations"))
    assert store.open(image_key(f"{kept}/a1b2c3d4", 0, "png")) == b"drawn"
    assert sweep(connection, store, GRACE) == 0


def test_many_are_asked_for_at_once(tmp_path: Path, connection: "Redis", monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retention, "AT_ONCE", 3)
    blobs = open_store(tmp_path.as_uri())
    ids = [stored(blobs, 7200) for _ in range(10)]
    known(connection, ids[4])
    assert sweep(connection, blobs, GRACE) == 9
    assert list(blobs.folders("generations")) == [ids[4]]


def test_half_written_files_of_killed_writers_go_too(tmp_path: Path, connection: "Redis"):
    blobs = open_store(tmp_path.as_uri())
    id = stored(blobs, 7200)
    (tmp_path / "generations" / id / "1.png#1").write_bytes(b"hal")  # obstore's name for what is being written
    sweep(connection, blobs, GRACE)
    assert not (tmp_path / "generations" / id).exists()


def test_a_sweep_that_was_killed_half_way_is_finished_by_the_next(tmp_path: Path, connection: "Redis"):
    class Dying(BlobStore):
        def delete(self, prefix: str) -> None:
            super().delete(f"{prefix}/inputs")
            raise BlobStoreError("killed here")

    blobs = open_store(tmp_path.as_uri())
    ids = [stored(blobs, 7200) for _ in range(3)]
    with pytest.raises(BlobStoreError):
        sweep(connection, Dying(blobs.store), GRACE)
    assert len(list(blobs.list("generations"))) == 2 * len(ids) - 1
    sweep(connection, blobs, GRACE)
    assert not list(blobs.list("generations"))


def test_one_of_several_sweepers_sweeps_and_one_that_fails_tries_again(
    tmp_path: Path, connection: "Redis", monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retention, "SOONEST", timedelta(seconds=0.2))
    blobs = open_store(tmp_path.as_uri())
    sweepers = [Sweeper(connection, blobs, timedelta(seconds=1)) for _ in range(3)]
    (tmp_path / "generations").write_text("no folder")  # the store fails
    time.sleep(0.5)
    (tmp_path / "generations").unlink()
    stored(blobs, 7200)
    until(lambda: not list(blobs.folders("generations")))
    for sweeper in sweepers:
        sweeper.close()
        sweeper.thread.join()
