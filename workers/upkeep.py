"""What dead workers left behind, and RQ's registries: looked after by every worker, now and then.

It stands in for RQ's own upkeep, which judges leases by this machine's clock and charges everybody for a death.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import cast

import structlog
from redis import Redis
from redis.client import Pipeline
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.job_lifecycle import record_job_failure
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.worker_registration import clean_worker_registry

from app import events, metrics
from app.jobs import atomically
from workers.leases import Leases, model_of

log = structlog.get_logger()


class Upkeep:
    """Of these queues. Any number of workers may run it at once: each thing it does is one transaction."""

    def __init__(self, connection: "Redis", queues: Sequence[Queue], leases: Leases):
        self.connection, self.queues, self.leases = connection, queues, leases
        self.strays: dict[str, dict[str, float]] = {}  # by queue: popped and not claimed, since we first looked
        for queue in queues:
            for standing in ("queued", "failed"):  # an alert on an increase needs the zero before it
                metrics.TAKEN_OVER.labels(model_of(queue), standing)

    def run(self, take_over: bool) -> None:
        """`take_over`: those who hold leases have had the chance to renew them."""
        take_over = take_over and not self.server_was_away()
        for queue in self.queues:
            for registry in (queue.finished_job_registry, queue.failed_job_registry):
                registry.cleanup(self.leases.clock.time())
            if take_over:
                self.take_over(queue)
            self.put_back_strays(queue)
            clean_worker_registry(queue)

    def server_was_away(self) -> bool:
        """Whether it has been back for less than a lease: then nobody is late yet."""
        return int(self.connection.info("server")["uptime_in_seconds"]) < self.leases.seconds

    def take_over(self, queue: Queue) -> None:
        """What dead workers held is queued again or, if it kills its workers, has failed."""
        for execution in self.leases.run_out(queue):
            try:
                job = Job.fetch(execution.job_id, self.connection, JSONSerializer)
            except NoSuchJobError:
                self.connection.zrem(queue.started_job_registry.key, execution.composite_key)
                continue
            execution.worker_name = job.worker_name or ""
            now = self.leases.take_away(queue, execution, cast(int, job.failure_ttl))
            if now == "held":
                continue
            if now == "failed":
                self.bury(job, f"the worker process {job.worker_name} ended while it drew this alone")
            if now != "gone":
                metrics.TAKEN_OVER.labels(model_of(queue), now).inc()
                log.warning("taken_over", generation=job.id, worker=job.worker_name, now=now)
            with self.connection.pipeline() as pipe:
                execution.delete(job, pipe)
                pipe.execute()

    def bury(self, job: Job, reason: str) -> None:
        """RQ's record of a job that failed otherwise than by an outcome of ours."""
        with self.connection.pipeline() as pipe:
            record_job_failure(job, reason, pipe)
            pipe.execute()
        metrics.REQUESTS.labels(job.origin.rpartition(".")[0], "failed").inc()

    def put_back_strays(self, queue: Queue) -> None:
        """What a worker popped and died before it claimed it: in front again, if it is there for a lease."""
        popped = [events.text(id) for id in self.connection.lrange(queue.intermediate_queue_key, 0, -1)]
        seen, now = self.strays.get(queue.name, {}), time.monotonic()
        self.strays[queue.name] = {id: seen.get(id, now) for id in popped}
        for id, since in self.strays[queue.name].items():
            if now - since > self.leases.seconds:
                atomically(self.connection, partial(put_back, id, queue), Job.key_for(id))


def put_back(id: str, queue: Queue, pipe: Pipeline) -> None:
    queued = pipe.hget(Job.key_for(id), "status") == b"queued"
    pipe.multi()
    pipe.lrem(queue.intermediate_queue_key, 0, id)
    if queued:
        pipe.lpush(queue.key, id)
