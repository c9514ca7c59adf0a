"""Blobs go when their generations have gone: Redis forgets by itself, a blob store must be told."""

import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import structlog
from obstore.exceptions import BaseError as BlobStoreError
from redis import Redis
from redis.exceptions import RedisError
from rq.job import Job

from app.jobs import age_of, is_id
from app.storage import BlobStore, generation_folder

log = structlog.get_logger()

LOCK = "darkroom:sweeping"
SHORTEST_GRACE, LONGEST_GRACE = timedelta(minutes=1), timedelta(hours=1)  # pictures are stored before they are queued
SHARE = 10  # a tenth of the time that results are kept lies between two sweeps,
SOONEST, LATEST = timedelta(seconds=10), timedelta(minutes=10)  # but neither less nor more than this
AT_ONCE = 500  # generations asked for in one round trip


class Sweeper:
    """Sweeps now and then, in a thread of its own; of all workers one at a time."""

    def __init__(self, connection: "Redis", blobs: BlobStore, result_ttl: timedelta):
        self.connection, self.blobs = connection, blobs
        self.grace = min(max(result_ttl, SHORTEST_GRACE), LONGEST_GRACE)
        self.pause = min(max(result_ttl / SHARE, SOONEST), LATEST).total_seconds()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="sweeper", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.stopped.set()

    def _run(self) -> None:
        while not self.stopped.wait(self.pause):
            try:
                if self.connection.set(LOCK, "1", nx=True, px=int(self.pause * 1000)):
                    swept = sweep(self.connection, self.blobs, self.grace)
                    log.info("swept", generations=swept)
            except (RedisError, BlobStoreError, OSError) as error:
                log.warning("not_swept", error=str(error))  # the next one does it


def sweep(connection: "Redis", blobs: BlobStore, grace: timedelta) -> int:
    """Delete what the store has of generations that Redis no longer knows; returns how many.

    Those younger than `grace` may not have come to Redis yet. Killed half-way, the next sweep does the rest.
    """
    swept, before = 0, time.time() - grace.total_seconds()
    for ids in batches(id for id in blobs.folders("generations") if is_id(id) and age_of(id) < before):
        with connection.pipeline(transaction=False) as pipe:
            for id in ids:
                pipe.exists(Job.key_for(id))
            known = pipe.execute()
        for id, exists in zip(ids, known, strict=True):
            if not exists:
                blobs.delete(generation_folder(id))
                swept += 1
    return swept


def batches(ids: Iterator[str]) -> Iterator[list[str]]:
    batch = list[str]()
    for id in ids:
        batch.append(id)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
