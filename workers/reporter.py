"""Events, written behind the engine's back: a step never waits for Redis."""

import queue
import threading
from datetime import timedelta
from typing import Any, NamedTuple

import redis.exceptions
import structlog
from redis import Redis

from app import events

log = structlog.get_logger()

PAUSE = 0.2  # seconds: as often as anybody looks, and far less often than there are steps


class Report(NamedTuple):
    generation: str
    name: str
    data: dict[str, Any]
    ttl: timedelta


class Reporter:
    """One thread that sends what has come up in one round trip, in order: progress now and then, all else at once."""

    def __init__(self, connection: "Redis"):
        self.connection = connection
        self.reports: queue.SimpleQueue[Report | threading.Event | None] = queue.SimpleQueue()
        self.urgent = threading.Event()
        self.thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self.thread.start()

    def report(
        self, generation: str, name: str, data: dict[str, Any] | None = None, ttl: timedelta = events.FORGOTTEN_AFTER
    ) -> None:
        self.reports.put(Report(generation, name, data or {}, ttl))
        if name != "progress":  # something to look at
            self.urgent.set()

    def catch_up(self, seconds: float = 1.0) -> None:
        """Wait until all that was reported before is written, or lost; no longer than this, and Redis may be away."""
        sent = threading.Event()
        self.reports.put(sent)
        self.urgent.set()
        sent.wait(seconds)

    def close(self) -> None:
        """Send what there is, and end."""
        self.reports.put(None)
        self.urgent.set()
        self.thread.join(timeout=5)

    def _run(self) -> None:
        last = False
        while not last:
            came = [self.reports.get()]
            while not self.reports.empty():
                came.append(self.reports.get())
            self._send(newest([report for report in came if isinstance(report, Report)]))
            for waiter in came:
                if isinstance(waiter, threading.Event):
                    waiter.set()
            last = None in came
            self.urgent.wait(PAUSE)
            self.urgent.clear()

    def _send(self, batch: list[Report]) -> None:
        if not batch:
            return
        try:
            with self.connection.pipeline(transaction=False) as pipe:
                for report in batch:
                    events.record(pipe, *report)
                pipe.execute()
        except redis.exceptions.RedisError as error:
            log.warning("events_lost", count=len(batch), error=str(error))  # listeners fall back on the job's status


def newest(batch: list[Report]) -> list[Report]:
    """Without progress that later progress of the same generation, in the same stage, has overtaken."""
    last = {told_of(report): i for i, report in enumerate(batch) if report.name == "progress"}
    return [r for i, r in enumerate(batch) if r.name != "progress" or last[told_of(r)] == i]


def told_of(report: Report) -> tuple[str, str | None]:
    return report.generation, report.data.get("stage")
