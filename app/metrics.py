"""Every Prometheus metric. Several processes of one machine may share them: see `PROMETHEUS_MULTIPROC_DIR`."""

import os
import sys
from collections.abc import Callable, Iterable

import redis.exceptions
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from app.webhooks import Standing

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)
ROWS = (1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48)

REQUESTS = Counter("darkroom_requests", "Generations that ended", ["model", "status"])
REFUSED = Counter("darkroom_refused", "Generations not accepted because the queue was full", ["model"])
QUEUE_WAIT = Histogram("darkroom_queue_wait_seconds", "From submission to a worker", ["model"], buckets=SECONDS)
DURATION = Histogram("darkroom_request_duration_seconds", "From submission to the end", ["model"], buckets=SECONDS)
STAGE = Histogram(
    "darkroom_stage_duration_seconds",
    "One forward pass of a net, or one picture encoded or stored",
    ["stage"],
    buckets=SECONDS,
)
BATCH_ROWS = Histogram(
    "darkroom_batch_rows", "Rows that requests had in a pass of the denoiser", ["model"], buckets=ROWS
)
BATCH_WIDTH = Gauge(
    "darkroom_batch_width_rows",
    "Rows a pass may have, from the curve measured at warm-up; fewer for a while after the device ran out of memory",
    ["model"],
    multiprocess_mode="max",
)
OUT_OF_MEMORY = Counter("darkroom_out_of_memory", "Passes of a net that the device had no memory for", ["net"])
STEPS = Counter("darkroom_steps", "Denoising steps of pictures", ["model"])
STEPS_SAVED = Counter(
    "darkroom_steps_saved", "Denoising steps taken over from a journal instead of repeated", ["model"]
)
JOURNAL_BYTES = Counter("darkroom_journal_bytes", "Written to journals")
JOURNAL_DISCARDED = Counter("darkroom_journal_pages_discarded", "Pages of journals that did not fit, and were not used")
TAKEN_OVER = Counter("darkroom_jobs_taken_over", "Generations whose worker died", ["model", "now"])
IMAGES = Counter("darkroom_images", "Pictures stored", ["format"])
RUNNING = Gauge("darkroom_jobs_running", "Generations that a worker holds", ["model"], multiprocess_mode="livesum")
MODEL_LOAD = Gauge("darkroom_model_load_seconds", "Loading and warming up", ["model"], multiprocess_mode="max")
MEMORY = Gauge("darkroom_resident_bytes", "Weights of the models that workers hold", multiprocess_mode="livesum")
PASS = Gauge(
    "darkroom_pass_seconds",
    "How long a pass of so many rows took at warm-up, or would by the line through those that were run",
    ["model", "net", "rows"],
    multiprocess_mode="max",
)
HEARTBEAT = Gauge(
    "darkroom_worker_last_heartbeat_seconds",
    "When the worker last renewed its leases, since the epoch",
    multiprocess_mode="max",
)
BUILD = Gauge("darkroom_build_info", "1, with the versions as labels", ["version", "python"], multiprocess_mode="max")


def started(version: str, models: Iterable[str]) -> None:
    """What the API has to say before anything has happened: an alert on an increase needs the zero before it."""
    BUILD.labels(version, sys.version.split()[0]).set(1)
    for model in models:
        REFUSED.labels(model)


class Waiting(Collector):
    """The queues' lengths, read at each scrape: they are one truth for all processes. Or that nobody can say."""

    def __init__(self, queues: Callable[[], dict[str, tuple[int, float]]]):
        self.queues = queues

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("darkroom_redis_up", "1 if Redis answers this process")
        try:
            queues = self.queues()
        except redis.exceptions.RedisError:
            up.add_metric([], 0)
            return (up,)
        up.add_metric([], 1)
        depth = GaugeMetricFamily("darkroom_queue_depth", "Generations waiting", labels=["queue"])
        oldest = GaugeMetricFamily(
            "darkroom_queue_oldest_seconds", "Age of the one that waits longest", labels=["queue"]
        )
        for queue, (length, seconds) in queues.items():
            depth.add_metric([queue], length)
            oldest.add_metric([queue], seconds)
        return up, depth, oldest


class Webhooks(Collector):
    """What is to be delivered and what was, read at each scrape: a postman has no port."""

    def __init__(self, standing: Callable[[], Standing]):
        self.standing = standing

    def collect(self) -> Iterable[Metric]:
        try:
            now = self.standing()
        except redis.exceptions.RedisError:
            return ()
        return (
            GaugeMetricFamily("darkroom_webhooks_pending", "Webhooks to be delivered, now or later", now.pending),
            GaugeMetricFamily(
                "darkroom_webhooks_overdue_seconds", "How long the first has waited for a postman", now.overdue
            ),
            GaugeMetricFamily("darkroom_webhooks_dead", "Webhooks that nobody took", now.dead),
            CounterMetricFamily("darkroom_webhooks_delivered", "Webhooks that were taken", now.delivered),
            CounterMetricFamily("darkroom_webhooks_failed_tries", "Tries to deliver one in vain", now.failed),
        )


def render(*more: Collector) -> bytes:
    """The text that Prometheus scrapes: of this process, or of all that share a directory."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
    else:
        registry = REGISTRY
    text = generate_latest(registry)
    if more:
        extra = CollectorRegistry()
        for collector in more:
            extra.register(collector)
        text += generate_latest(extra)
    return text
