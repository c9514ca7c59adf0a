"""The process that evaluates: an ordinary RQ worker, for jobs of minutes that need no GPU of their own.

A job draws through the queue as any client does, each picture under an idempotency key: begun again, it finds what it
had drawn. CLIP then judges in this process.
"""

import hashlib
import os
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any, cast

import structlog
from redis import Redis
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.worker import Worker

from app.connection import connect
from app.errors import NotCancelable, QueueFull, ServiceError
from app.evaluation import evaluate
from app.evaluations import CANCELED, QUEUE, EvaluationRequest
from app.jobs import Jobs
from app.parts import die_with_parent
from app.schemas import GenerationRequest
from app.settings import Settings, read_settings
from app.storage import evaluation_folder, open_store
from models.catalog import Catalog

log = structlog.get_logger()

LOOK = 0.25  # seconds between two looks at a generation
PULSE = 5  # seconds between signs of life
UPKEEP = 15  # seconds between two looks for jobs whose process has gone: RQ takes it for gone after a minute


class NotDrawn(Exception):
    """A generation ended without its picture."""


class Canceled(Exception):
    """Nobody wants the evaluation any more."""


class Evaluator(Worker):
    """Ends when it is told to: a job takes minutes, and goes on where it was under another."""

    def handle_warm_shutdown_request(self) -> None:
        self.kill_horse()


def serve(settings: Settings, redis_url: str) -> None:
    """Evaluate until told to stop."""
    connection = Redis.from_url(redis_url)
    worker = Evaluator(
        [QUEUE],
        connection=connection,
        serializer=JSONSerializer,
        job_monitoring_interval=PULSE,
        maintenance_interval=UPKEEP,
        worker_ttl=2 * UPKEEP,  # and RQ waits for a job for 15 s less than that, before it looks after others
        log_job_description=False,
    )
    log.info("evaluator_starts")
    worker.work(logging_level="WARNING")


def run(request: dict[str, Any], owner: str) -> None:
    """The job. What is wrong with the request or its pictures is its outcome; of anything else it dies."""
    die_with_parent(os.getppid())
    settings = read_settings()
    connection = connect(cast(str, settings.redis_url), settings.redis_timeout)
    job = Job.fetch(os.environ["RQ_JOB_ID"], connection=connection, serializer=JSONSerializer)
    jobs = Jobs(connection, open_store(settings.blobs), Catalog.read(settings.models, settings.cards_dir), settings)
    asked, drawing = EvaluationRequest.model_validate(request), Drawing(job, jobs, owner)

    def tell(model: str, done: int, of: int) -> None:
        job.meta["done"] = asked.models.index(model) * of + done
        job.save_meta()

    def save(name: str, data: bytes) -> None:
        jobs.blobs.save(f"{evaluation_folder(job.id)}/{name}", data)

    try:
        scores = evaluate(drawing.draw, save, asked.read(), asked.models, asked.given, tell, settings.judge)
    except Canceled:
        drawing.cancel()
        return
    except (NotDrawn, ServiceError) as error:
        drawing.cancel()
        job.meta["error"] = {"type": "not-drawn", "detail": str(error)}
    else:
        job.meta["scores"] = [asdict(one) for one in scores]
    job.save_meta()
    log.info("evaluated", evaluation=job.id, models=asked.models, error=job.meta.get("error"))


class Drawing:
    """The generations of one evaluation."""

    def __init__(self, job: Job, jobs: Jobs, owner: str):
        self.job, self.jobs, self.owner = job, jobs, owner
        self.under_way = set[str]()

    def draw(self, request: dict[str, Any]) -> bytes:
        """One picture, as a PNG; waits for it as long as it takes.

        Raises:
            NotDrawn, Canceled.
        """
        key = hashlib.sha256(repr((self.job.id, sorted(request.items()))).encode()).hexdigest()
        asked = GenerationRequest.model_validate(request)
        while True:
            self._go_on()
            try:
                generation, _ = self.jobs.submit(asked, self.owner, key)
                break
            except QueueFull as full:
                time.sleep(min(5.0, float(full.headers["Retry-After"])))
        self.under_way.add(generation.id)
        while generation.status in ("queued", "running"):
            time.sleep(LOOK)
            self._go_on()
            generation = self.jobs.fetch(generation.id, self.owner)
        self.under_way.discard(generation.id)
        if generation.status != "succeeded":
            why = generation.error.detail if generation.error else generation.status
            raise NotDrawn(f"{asked.model} on {asked.prompt!r}: {why}")
        record = self.jobs.record(generation.id, self.owner)
        return self.jobs.blobs.open(record.meta["images"][0]["key"])

    def _go_on(self) -> None:
        if self.jobs.connection.hexists(self.job.key, CANCELED):
            raise Canceled

    def cancel(self) -> None:
        """Those that are still being drawn."""
        for id in self.under_way:
            with suppress(NotCancelable):
                self.jobs.cancel(id, self.owner)
