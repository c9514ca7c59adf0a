"""Nothing is kept for ever: files in the blob store go when Redis has forgotten their generation or evaluation."""

import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import islice, takewhile

import structlog
from obstore.exceptions import BaseError as BlobStoreError
from redis import Redis
from redis.exceptions import RedisError
from rq.job import Job

from app.jobs import age_of, is_id
from app.storage import BlobStore

log = structlog.get_logger()

FOLDERS = ("generations", "evaluations", "uploads")  # of uploads Redis knows nothing: they go by their age
LOCK = "darkroom:sweep"
SWEEPS = 4  # in each `result_ttl`, so that a file outlives its generation by a quarter at most
SOONEST, LATEST = timedelta(minutes=1), timedelta(hours=1)  # between two sweeps, whatever the `result_ttl`
GRACE = timedelta(minutes=10)  # pictures are stored before their generation is queued, and a slow store takes its time
CHUNK = 500  # folders that Redis is asked about at once
AT_ONCE = 8  # folders deleted at once: in S3 each takes two requests


class Sweeper:
    """Sweeps now and then, one of all workers at a time."""

    def __init__(self, connection: "Redis", blobs: BlobStore, result_ttl: timedelta):
        self.connection, self.blobs = connection, blobs
        self.keep = max(result_ttl, GRACE)
        self.pause = int(min(max(result_ttl / SWEEPS, SOONEST), LATEST).total_seconds())
        self.next_look = 0.0

    def run(self, stopped: threading.Event) -> None:
        """Until told otherwise, in a thread of its own: deleting takes time."""
        while not stopped.wait(self.pause / SWEEPS):
            self.maybe_sweep()

    def maybe_sweep(self) -> int:
        """Sweep if it is time and nobody else does; returns how many generations' files went.

        Cheap if not. What fails is logged, and tried again the next time.
        """
        if time.monotonic() < self.next_look:
            return 0
        self.next_look = time.monotonic() + self.pause / SWEEPS
        try:
            if not self.connection.set(LOCK, 1, nx=True, ex=self.pause):  # held by who sweeps, or did a moment ago
                return 0
            return sum(self._held(sweep(self.connection, self.blobs, self.keep)))
        except (RedisError, BlobStoreError, OSError) as error:
            log.warning("sweep_failed", error=str(error))
            return 0

    def _held(self, counts: Iterable[int]) -> Iterator[int]:
        for count in counts:
            self.connection.expire(LOCK, self.pause)
            log.info("swept", generations=count)
            yield count


def sweep(connection: "Redis", blobs: BlobStore, keep: timedelta) -> Iterator[int]:
    """Remove the folders of what is older than `keep` and has been forgotten by Redis.

    Yields how many, chunk by chunk. To be stopped anywhere, or to run twice at once, does no harm.
    """
    before = time.time() - keep.total_seconds()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for folder in FOLDERS:
            ids = filter(is_id, blobs.folders(folder))
            old = takewhile(lambda id: age_of(id) < before, ids)  # ids sort by age
            while chunk := list(islice(old, CHUNK)):
                known = zip(chunk, exist(connection, chunk), strict=True)
                forgotten = [f"{folder}/{id}" for id, is_known in known if not is_known]
                yield sum(threads.map(partial(remove, blobs), forgotten))
    blobs.delete_unfinished(older_than=keep)


def remove(blobs: BlobStore, folder: str) -> bool:
    with suppress(FileNotFoundError):  # another sweeper was faster; if it dies now, the next has the rest
        blobs.delete(folder)
        return True
    return False


def exist(connection: "Redis", ids: Iterable[str]) -> list[bool]:
    """Whether Redis knows of each."""
    with connection.pipeline(transaction=False) as pipe:
        for id in ids:
            pipe.exists(Job.key_for(id))
        return [bool(known) for known in pipe.execute()]
