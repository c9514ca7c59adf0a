"""Which workers there are and what they hold: what each says of itself with its heartbeat; and what waits for them."""

from typing import cast

from redis import Redis
from redis.client import Pipeline
from rq.worker_registration import get_keys

from app.jobs import PRIORITIES, Jobs, queue_name
from app.schemas import QueueStatus, ServiceStatus, WorkerStatus


def announce(pipe: Pipeline, worker: WorkerStatus, seconds: int) -> None:
    """Let everybody know, for so many seconds."""
    pipe.set(place(worker.name), worker.model_dump_json(), ex=seconds)


def withdraw(pipe: Pipeline, name: str) -> None:
    pipe.delete(place(name))


def place(name: str) -> str:
    return f"darkroom:worker:{name}"


def status(jobs: Jobs) -> ServiceStatus:
    """As it is now."""
    waiting = jobs.waiting()
    queues = list[QueueStatus]()
    for model in jobs.catalog.names:
        for priority in PRIORITIES:
            length, seconds = waiting[queue_name(model, priority)]
            queues.append(QueueStatus(model=model, priority=priority, waiting=length, oldest_seconds=round(seconds, 3)))
    return ServiceStatus(workers=workers(jobs.connection), queues=queues)


def workers(connection: Redis) -> list[WorkerStatus]:
    """Those that have said something lately. RQ knows others: those that evaluate, and those that died just now."""
    names = sorted(key.rpartition(":")[2] for key in get_keys(connection=connection))
    said = cast(list[bytes | None], connection.mget([place(name) for name in names])) if names else []
    return [WorkerStatus.model_validate_json(text) for text in said if text]
