"""A worker process: settings, models, studio and EngineWorker, wired together."""

import os
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog
import torch
import uvicorn
from redis import Redis
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
from models.loading import load_parts, load_pipeline
from models.prepare import decided
from workers import memory
from workers.connection import OUTAGE, RedisAway, connect
from workers.graphs import Graphs
from workers.journal import Journal
from workers.leases import Clock
from workers.outcomes import ModelUnavailable
from workers.passes import Eager
from workers.reporter import Reporter
from workers.residency import MIB, Residency
from workers.studio import Studio
from workers.watchdog import Watchdog
from workers.worker import EngineWorker

log = structlog.get_logger()


def run(settings: Settings, redis_url: str, last_words: Path | None = None, outage: float = OUTAGE) -> None:
    """Serve until told to stop; in-flight generations are finished first.

    Raises:
        SystemExit: `EX_CONFIG` if a model that must be there cannot be loaded; why is also written to `last_words`.
            `EX_TEMPFAIL` if Redis has been away for longer than `outage` seconds.
    """
    try:
        serve(settings, partial(connect, redis_url, outage))
    except ModelUnavailable as error:
        log.error("worker_gives_up", error=str(error))
        if last_words:
            last_words.write_text(str(error))
        raise SystemExit(os.EX_CONFIG) from None
    except RedisAway as error:
        log.error("worker_gives_up", error=str(error))
        raise SystemExit(os.EX_TEMPFAIL) from None


def serve(settings: Settings, connected: Callable[[], "Redis"]) -> None:
    """`connected` makes a connection for each thread that has something to say."""
    device = settings.device if settings.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(settings.torch_threads or torch.get_num_threads())  # before other threads ask for fewer
    if device == "cpu":
        memory.keep()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.data_dir.absolute() / "inductor"))  # outlives us
    catalog = Catalog.read(settings.models, settings.cards_dir)
    connection, reporter = connected(), Reporter(connected())
    blobs, clock = open_store(settings.blobs), Clock()
    sweeper, stopped = Sweeper(connected(), blobs, settings.result_ttl), threading.Event()
    threading.Thread(target=sweeper.run, args=(stopped,), name="sweeper", daemon=True).start()
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # its streams, events and graphs are those of this one
    runner = Graphs() if device.startswith("cuda") and settings.graphs else Eager(torch.device(device))
    residency = Residency(
        catalog,
        lambda card: resident(decided(card, device, settings.dtype), device),
        settings.memory_mib or 0.8 * memory_mib(device),
        settings.pinned_models,
        settings.max_rows,
        runner,
    )
    journal = None
    if settings.journal_interval:
        journal = Journal(blobs, torch.device(device), settings.journal_interval, settings.journal_mib * MIB)
    watchdog = Watchdog(settings.step_timeout, settings.lease)
    studio = Studio(
        residency, blobs, journal, reporter, clock, settings.preview_size, watchdog, settings.overbooking, runner
    )
    worker = EngineWorker(
        catalog.names,
        studio=studio,
        connection=connection,
        clock=clock,
        lease=settings.lease,
        max_attempts=settings.max_attempts,
        warm_bonus=settings.warm_bonus,
        stop_grace=settings.stop_grace,
        device=torch.cuda.get_device_name() if device.startswith("cuda") else device,
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
        stopped.set()
        studio.close()
        reporter.close()
        log.info("worker_ends")


def load_first(residency: Residency, models: list[str]) -> None:
    """Load and warm up before the first job is admitted: the default model, and those that stay.

    Raises:
        ModelUnavailable: one of them cannot be had.
    """
    for model in dict.fromkeys(models):
        residency.want(model, busy=())
        while residency.loading:
            residency.loading[1].exception()  # waits; what went wrong is told by `arrived`
            residency.arrived()
        if failure := residency.failure(model):
            raise failure


def resident(card: ModelCard, device: str) -> Resident:
    return FAMILIES[card.family](card, load_pipeline(card, device), load_parts(card, device))


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
