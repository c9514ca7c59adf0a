"""Dead letters: the generations that failed, of all owners, for operators to read and to queue again."""

from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple, cast

import structlog
from redis import Redis
from redis.client import Pipeline
from rq.executions import ExecutionRegistry
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from app import events, webhooks
from app.errors import NotFound, NotRequeueable
from app.jobs import BELL, Replies, atomically, failure, is_id, now, read_records
from app.schemas import Failure

log = structlog.get_logger()

CHUNK = 100  # generations that Redis is asked for at once


class Dead(NamedTuple):
    id: str
    model: str
    owner: str
    reason: Failure
    attempts: int
    created_at: datetime
    ended_at: datetime | None  # None: it was given up by others than the worker that had it


def dead(connection: "Redis") -> Iterator[Dead]:
    """Those that failed and are still remembered, queue by queue, the oldest failure first."""
    for queue in Queue.all(connection=connection, serializer=JSONSerializer):
        failed = cast(list[bytes], connection.zrange(FailedJobRegistry(queue=queue).key, 0, -1))
        ids = [id.decode() for id in failed]
        for i in range(0, len(ids), CHUNK):
            chunk = ids[i : i + CHUNK]
            for id, record in zip(chunk, read_records(connection, chunk), strict=True):
                if record and (reason := failure(record)):  # RQ counts those that expired among them; we do not
                    model = record.parameters.model
                    yield Dead(id, model, record.owner, reason, record.attempts, record.created_at, record.ended_at)


def traceback_of(connection: "Redis", id: str) -> str:
    """What its last attempt ended with.

    Raises:
        NotFound: there is no such generation, or no attempt of it has ended.
    """
    result = Job(id, connection=connection, serializer=JSONSerializer).latest_result() if is_id(id) else None
    if result is None:
        raise NotFound(f"there is no traceback of a generation {id[:64]!r}")
    return result.exc_string or ""


def requeue(connection: "Redis", id: str, max_attempts: int) -> None:
    """Queue a failed generation again, at the end, with its id, its seed and the number of its attempts so far.

    It may be attempted as often as a new one. Its events begin anew: whoever follows them would stop at the old end.

    Raises:
        NotFound: there is none with this id.
        NotRequeueable: it has not failed, or is failing this moment.
    """
    key = Job.key_for(id)

    def write(pipe: Pipeline) -> None:
        status, origin = cast(Replies, pipe.hmget(key, "status", "origin"))
        if status is None or origin is None:
            raise NotFound(f"there is no generation {id[:64]!r}")
        queue = Queue(events.text(origin), connection=connection, serializer=JSONSerializer)
        failed = FailedJobRegistry(queue=queue).key
        record = next(read_records(connection, [id]))
        if record is None or record.status != "failed" or pipe.zscore(failed, id) is None:
            standing = record.status if record else "gone"
            raise NotRequeueable(f"generation {id} is {standing}; only what has failed is queued again")
        if pipe.zcard(ExecutionRegistry(id, connection).key):  # who found that it failed has more to write
            raise NotRequeueable(f"generation {id} is failing this moment; try again")
        pipe.multi()
        pipe.hset(key, mapping={"status": JobStatus.QUEUED.value, "meta": "{}", "enqueued_at": now()})
        pipe.hset(key, "retries_left", max_attempts - 1)
        pipe.hdel(key, "started_at", "ended_at", "worker_name", "exc_info", "deaths", "alone")
        pipe.persist(key)
        pipe.zrem(failed, id)
        pipe.sadd(Queue.redis_queues_keys, queue.key)
        queue.push_job_id(id, pipeline=pipe)
        pipe.delete(events.stream(id))
        events.record(pipe, id, "queued", {"status": "queued"})
        webhooks.tell_again(pipe, id)
        webhooks.tell(pipe, id, "queued")
        pipe.publish(BELL, "queued")

    atomically(connection, write, key)
    log.info("requeued", generation=id)
