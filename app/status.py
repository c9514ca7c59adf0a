"""Which workers there are and what they hold: what each says of itself with its heartbeat; and what waits for them."""

from typing import cast

from redis import Redis
from redis.client import Pipeline
from rq.worker_registration import get_keys

from app.jobs import PRIORITIES, Jobs, pace_key, queue_name, seconds_for
from app.schemas import ModelStatus, Priority, ServiceStatus, WorkerStatus


def announce(pipe: Pipeline, worker: WorkerStatus, seconds: int) -> None:
    """Let everybody know, for so many seconds."""
    pipe.set(place(worker.name), worker.model_dump_json(), ex=seconds)


def withdraw(pipe: Pipeline, name: str) -> None:
    pipe.delete(place(name))


def place(name: str) -> str:
    return f"darkroom:worker:{name}"


def status(jobs: Jobs) -> ServiceStatus:
    """As it is now."""
    queues, names = jobs.waiting(), jobs.catalog.names
    with jobs.connection.pipeline(transaction=False) as pipe:
        for model in names:
            pipe.hvals(pace_key(model))
        paces = dict(zip(names, pipe.execute(), strict=True))
    models = list[ModelStatus]()
    for model in names:
        waiting = {priority: queues[queue_name(model, priority)] for priority in PRIORITIES}
        counts: dict[Priority, int] = {priority: waiting[priority][0] for priority in PRIORITIES}
        models.append(
            ModelStatus(
                name=model,
                waiting=counts,
                oldest=round(max(seconds for _, seconds in waiting.values()), 1),
                eta=seconds_for(sum(counts.values()), paces[model]),
            )
        )
    return ServiceStatus(workers=workers(jobs.connection), models=models)


def workers(connection: Redis) -> list[WorkerStatus]:
    """Those that have said something lately. RQ knows others: those that evaluate, and those that died just now."""
    names = sorted(key.rpartition(":")[2] for key in get_keys(connection=connection))
    said = cast(list[bytes | None], connection.mget([place(name) for name in names])) if names else []
    return [WorkerStatus.model_validate_json(text) for text in said if text]
