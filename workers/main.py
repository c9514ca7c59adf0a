"""A worker process: settings, models, studio and EngineWorker, wired together."""

import os
import socket
import threading
import time
from collections.abc import Callable

import structlog
import torch
import uvicorn
from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from app import metrics
from app.retention import Sweeper
from app.settings import Settings
from app.storage import open_store
from models.catalog import Catalog, ModelCard
from models.families import FAMILIES, Resident
from models.loading import load_pipeline
from workers.journal import Journal
from workers.leases import Clock
from workers.reporter import Reporter
from workers.residency import MIB, Residency
from workers.studio import Studio
from workers.worker import EngineWorker

log = structlog.get_logger()

OUTAGE = (
    60  # tries, at most a second apart: a worker rides out about a minute without Redis, then ends and is restarted
)


def run(settings: Settings, redis_url: str) -> None:
    """Serve until told to stop; in-flight generations are finished first."""
    device = settings.device if settings.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(settings.torch_threads or torch.get_num_threads())  # before other threads ask for fewer
    catalog = Catalog.read(settings.models, settings.cards_dir)
    connection = connect(redis_url)
    reporter = Reporter(connect(redis_url))
    blobs, clock = open_store(settings.blobs), Clock()
    sweeper = Sweeper(connect(redis_url), blobs, settings.result_ttl)
    residency = Residency(
        catalog,
        lambda card: resident(card, device),
        settings.memory_mib or 0.8 * memory_mib(device),
        settings.pinned_models,
        settings.max_rows,
    )
    journal = None
    if settings.journal_interval:
        journal = Journal(blobs, torch.device(device), settings.journal_interval, settings.journal_mib * MIB)
    studio = Studio(residency, blobs, journal, reporter, clock, settings.preview_size)
    worker = EngineWorker(
        catalog.names,
        studio=studio,
        connection=connection,
        clock=clock,
        lease=settings.lease,
        max_attempts=settings.max_attempts,
        warm_bonus=settings.warm_bonus,
        stop_grace=settings.stop_grace,
        name=f"{socket.gethostname()}.{os.getpid()}",
    )
    if settings.worker_port:
        serve_health(
            settings.host, settings.worker_port, lambda: alive(worker) and studio.is_warm(catalog.default.name)
        )
    log.info("worker_starts", device=device, models=catalog.names, budget_mib=round(residency.budget_mib))
    load_first(residency, [*settings.pinned_models, catalog.default.name])
    try:
        worker.work()
    finally:
        sweeper.close()
        studio.close()
        reporter.close()
        log.info("worker_ends")


def load_first(residency: Residency, models: list[str]) -> None:
    """Load and warm up before the first job is admitted: the default model, and those that stay."""
    for model in dict.fromkeys(models):
        residency.want(model, busy=())
        while residency.loading:
            residency.loading[1].exception()  # waits; what went wrong is told by `arrived`
            residency.arrived()
        if failure := residency.failure(model):
            raise SystemExit(str(failure))


def resident(card: ModelCard, device: str) -> Resident:
    return FAMILIES[card.family](card, load_pipeline(card, device))


def connect(url: str) -> "Redis":
    return Redis.from_url(url, retry=Retry(ExponentialBackoff(cap=1, base=0.05), OUTAGE), socket_connect_timeout=2)


def memory_mib(device: str) -> float:
    """Of the device, all of it."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB
    return torch.cuda.mem_get_info()[1] / MIB


def alive(worker: EngineWorker) -> bool:
    """Whether the loop still turns: it beats every second, and between two beats lies at most a step."""
    return time.monotonic() - worker.next_beat < worker.lease


def serve_health(host: str, port: int, ready: Callable[[], bool]) -> None:
    """/livez, /readyz and /metrics, in a thread of their own."""

    def livez(_: Request) -> Response:
        return PlainTextResponse("ok")

    def readyz(_: Request) -> Response:
        return PlainTextResponse("ready") if ready() else PlainTextResponse("not ready", 503)

    def scrape(_: Request) -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")

    routes = [Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", scrape)]
    server = uvicorn.Server(
        uvicorn.Config(Starlette(routes=routes), host=host, port=port, log_config=None, access_log=False)
    )
    threading.Thread(target=server.run, name="health", daemon=True).start()
