"""What failed, for operators: over all owners, with the traceback, and the way back into the queue."""

from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple, cast

from redis import Redis
from redis.client import Pipeline
from rq.job import Job
from rq.queue import Queue
from rq.registry import FailedJobRegistry
from rq.results import Result
from rq.serializers import JSONSerializer

from app import events
from app.errors import NotFound, NotRequeueable
from app.jobs import BELL, PRIORITIES, Replies, atomically, failure, queue_name, read_records
from app.schemas import Failure
from models.catalog import Catalog


class DeadLetter(NamedTuple):
    id: str
    owner: str
    model: str
    attempts: int
    failed_at: datetime | None
    error: Failure


def dead_letters(connection: "Redis", catalog: Catalog) -> Iterator[DeadLetter]:
    """Newest first, as long as they are kept."""
    ids = list[str]()
    for queue in queues(connection, catalog):
        registry = FailedJobRegistry(queue=queue)
        ids += registry.get_job_ids(cleanup=False)
    ids.sort(reverse=True)
    for id, record in zip(ids, read_records(connection, ids), strict=True):
        if record is not None and (error := failure(record)):
            yield DeadLetter(id, record.owner, record.parameters.model, record.attempts, record.ended_at, error)


def traceback(connection: "Redis", id: str) -> str:
    """What the worker saw.

    Raises:
        NotFound: there is no such job, or it has not failed.
    """
    result = Result.fetch_latest(Job(id, connection=connection, serializer=JSONSerializer), serializer=JSONSerializer)
    if result is None or not result.exc_string:
        raise NotFound(f"generation {id!r} has left no traceback")
    return result.exc_string


def requeue(connection: "Redis", id: str) -> None:
    """Back into its queue, as if it had just come in; what it was charged with is forgiven, once.

    Raises:
        NotFound: there is none.
        NotRequeueable: it has not failed.
    """
    key = Job.key_for(id)

    def write(pipe: Pipeline) -> None:
        status, origin, retries = cast(Replies, pipe.hmget(key, "status", "origin", "retries_left"))
        if origin is None:
            raise NotFound(f"there is no generation {id!r}")
        if status != b"failed":
            raise NotRequeueable(f"generation {id} has not failed")
        queue = Queue(origin.decode(), connection=connection, serializer=JSONSerializer)
        pipe.multi()
        pipe.zrem(queue.failed_job_registry.key, id)
        pipe.hdel(key, "meta", "ended_at", "deaths")
        pipe.hset(key, mapping={"status": "queued", "retries_left": max(1, int(retries or 0))})
        pipe.persist(key)
        pipe.rpush(queue.key, id)
        events.record(pipe, id, "queued", {"status": "queued"})
        pipe.persist(events.stream(id))
        pipe.publish(BELL, "queued")

    atomically(connection, write, key)


def queues(connection: "Redis", catalog: Catalog) -> Iterator[Queue]:
    for card in catalog:
        for priority in PRIORITIES:
            yield Queue(queue_name(card.name, priority), connection=connection, serializer=JSONSerializer)
