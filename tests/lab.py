"""Where workers are killed: real EngineWorker processes around a studio that only sleeps, and a Valkey of their own."""

import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import structlog
from redis import Redis
from rq.executions import ExecutionRegistry
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer

from app import dead, events, jobs
from app.jobs import PRIORITIES, Jobs, queue_name
from app.local import EmbeddedRedis
from app.parts import die_with_parent
from app.schemas import Generation, GenerationRequest, ModelAtWork, Parameters
from app.settings import Settings
from app.storage import open_store
from models.catalog import Catalog
from workers import worker
from workers.connection import connect
from workers.leases import Clock, Leases
from workers.outcomes import Failed
from workers.worker import EngineWorker

OWNER = "ada"
MODELS = ("alpha", "beta")
QUEUES = tuple(queue_name(model, priority) for model in MODELS for priority in PRIORITIES)
EVENTS = {"queued", "running", "progress", "preview"} | events.ENDED
DIARY = "lab:joins"  # a list of Join

PROCESSES = multiprocessing.get_context("forkserver")  # a fork of what has imported everything, but for torch
PROCESSES.set_forkserver_preload(["tests.lab", "pytest"])
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


class Server(EmbeddedRedis):
    """A Valkey that is killed and comes back with all that it had answered for.

    `everysec` does not promise that: while an fsync is in progress, what it answers for waits to be written.
    """

    def __init__(self, directory: Path):
        super().__init__(directory, fsync="no")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def start(self) -> None:
        self.part.start()

    def restart(self) -> None:
        self.start()
        self.part.wait(20)


@dataclass(frozen=True)
class Join:
    """That a studio was given a generation to draw."""

    id: str
    worker: str
    crowd: int  # how many it drew then, this one included


@dataclass
class Drawn:
    steps: int
    asked: Mapping[str, str]
    attempt: int


class OutOfLuck(Failed):
    """Like a store that did not answer."""

    kind = "out-of-luck"
    again = True


class SleepingStudio:
    """Draws nothing, in steps of the same length however many take part. `metadata` says what is to go wrong."""

    def __init__(self, diary: "Redis", name: str, slots: int, step: float, warm: Iterable[str]):
        self.diary, self.name, self.slots, self.seconds, self.warm = diary, name, slots, step, set(warm)
        self.drawn: dict[str, Drawn] = {}

    def admits(self, model: str) -> bool:
        return len(self.drawn) < self.slots

    def is_warm(self, model: str) -> bool:
        return model in self.warm

    def join(self, id: str, attempt: int, folder: str, parameters: Parameters) -> None:
        if "refuse" in parameters.metadata:
            raise ValueError("not with me")
        self.drawn[id] = Drawn(parameters.num_inference_steps, parameters.metadata, attempt)
        self.diary.rpush(DIARY, json.dumps([id, self.name, len(self.drawn)]))

    def leave(self, id: str, ended: bool) -> None:
        self.drawn.pop(id, None)

    def keep(self) -> None:
        pass

    def step(self) -> Mapping[str, Any]:
        time.sleep(self.seconds)
        for drawn in self.drawn.values():
            drawn.steps -= 1
            if drawn.attempt <= int(drawn.asked.get("break", 0)):
                raise RuntimeError("CUDA error: device-side assert triggered")
            if drawn.attempt <= int(drawn.asked.get("kill", 0)):
                os.kill(os.getpid(), signal.SIGSEGV)
        return {id: outcome for id, drawn in self.drawn.items() if (outcome := self.outcome(id, drawn)) is not None}

    def outcome(self, id: str, drawn: Drawn) -> Any:
        if drawn.attempt <= int(drawn.asked.get("fail", 0)):
            return OutOfLuck(f"attempt {drawn.attempt}")
        if "crash" in drawn.asked:
            return ZeroDivisionError("of the program")
        picture = {"key": id, "seed": 0, "width": 8, "height": 8, "format": "png", "etag": self.name}
        return {"images": [picture], "steps": 1} if drawn.steps <= 0 else None

    def paces(self) -> Mapping[str, tuple[float, float]]:
        return {}

    def at_work(self) -> list[ModelAtWork]:
        n = len(self.drawn)
        return [ModelAtWork(name=model, width=self.slots, rows=n, running=n, rows_per_second=0) for model in self.warm]


@dataclass(frozen=True)
class Plan:
    """What a worker process is like."""

    url: str
    name: str
    log: str
    slots: int = 8
    step: float = 0.02  # seconds
    lease: int = 2
    pulse: float = worker.PULSE
    warm: tuple[str, ...] = MODELS
    warm_bonus: float = 0
    dies_claiming: bool = False  # between its pop of a job and the claim
    clock: str = ""  # how wrong its clock is, as libfaketime understands it: "+300s"
    stop_grace: float = 60
    max_attempts: int = 5


def run(plan: Plan) -> None:
    """A worker process."""
    die_with_parent(os.getppid())
    output = os.open(plan.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    structlog.configure(logger_factory=structlog.WriteLoggerFactory(sys.stderr), cache_logger_on_first_use=False)
    logging.disable(logging.INFO)
    worker.PULSE = plan.pulse
    if plan.dies_claiming:
        Leases.claim = lambda *_: os._exit(9)
    EngineWorker(
        MODELS,
        studio=SleepingStudio(connect(plan.url), plan.name, plan.slots, plan.step, plan.warm),
        connection=connect(plan.url),
        clock=Clock(),
        lease=plan.lease,
        max_attempts=plan.max_attempts,
        warm_bonus=plan.warm_bonus,
        stop_grace=plan.stop_grace,
        name=plan.name,
    ).work()


@dataclass
class Lab:
    """The API's side, and workers to kill."""

    server: Server
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    workers: list[BaseProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.connection = connect(self.server.url)
        self.connection.flushall()
        emoji = Catalog.read(["emoji-sd"]).default
        self.catalog = Catalog(emoji.model_copy(update={"name": name}) for name in MODELS)
        self.blobs = open_store((self.folder / "blobs").as_uri())
        self.jobs = self.with_settings()

    def with_settings(self, **changed: Any) -> Jobs:
        given = {"max_queued": 100_000, "max_attempts": 5, **self.settings, **changed}
        return Jobs(self.connection, self.blobs, self.catalog, Settings(data_dir=self.folder, **given))

    def worker(self, **plan: Any) -> BaseProcess:
        """A worker that has told Redis of itself."""
        name = plan.pop("name", f"w{len(self.workers)}")
        log = str(self.folder / f"{name}.log")
        made = Plan(self.server.url, name, log, **plan)
        with wrong_clock(made.clock) as context:
            process = context.Process(target=run, args=(made,), daemon=True)
            process.start()
        self.workers.append(process)
        until(lambda: self.connection.exists(f"rq:worker:{name}") or process.exitcode is not None)
        return process

    def put(self, count: int = 1, *, age: float = 0, owner: str = OWNER, **request: Any) -> list[str]:
        """Queue some; `steps` is short for `num_inference_steps`, and what the studio knows of is metadata."""
        steps = request.pop("steps", 5)
        asked = {
            name: str(request.pop(name)) for name in ("break", "fail", "kill", "refuse", "crash") if name in request
        }
        wanted = {"model": "alpha", "prompt": "a cat", "num_inference_steps": min(100, steps), "metadata": asked}
        body = GenerationRequest(**(wanted | request))
        if not age:
            return [self.jobs.submit(body, owner)[0].id for _ in range(count)]
        with_age, jobs.new_id = jobs.new_id, lambda at=None: with_age((at or time.time()) - age)
        try:
            return [self.jobs.submit(body, owner)[0].id for _ in range(count)]
        finally:
            jobs.new_id = with_age

    def get(self, id: str) -> Generation:
        return self.jobs.fetch(id, OWNER)

    def statuses(self, ids: Iterable[str]) -> dict[str, str]:
        """As Redis has them now: unlike `fetch`, this ends nothing that is overdue."""
        ids = list(ids)
        records = jobs.read_records(self.connection, ids)
        return {id: record.status if record else "gone" for id, record in zip(ids, records, strict=True)}

    def count(self, ids: Iterable[str]) -> Counter[str]:
        return Counter(self.statuses(ids).values())

    def wait(self, ids: list[str], status: str = "succeeded", seconds: float = 60) -> None:
        until(lambda: self.count(ids) == {status: len(ids)}, seconds, lambda: f"{self.count(ids)}, {self.left()}")

    def wait_running(self, count: int) -> None:
        until(lambda: self.leases() == count, 30, lambda: f"{self.leases()} leases")

    def executions(self, id: str) -> int:
        return self.connection.zcard(ExecutionRegistry(id, self.connection).key)

    def requeue(self, id: str, max_attempts: int = 2) -> None:
        """Once its failure is written."""
        until(lambda: not self.executions(id))
        dead.requeue(self.connection, id, max_attempts)

    def leases(self) -> int:
        return sum(self.connection.zcard(f"rq:wip:{queue}") for queue in QUEUES)

    def joins(self) -> list[Join]:
        return [Join(*json.loads(entry)) for entry in self.connection.lrange(DIARY, 0, -1)]

    def runs(self, ids: Iterable[str]) -> dict[str, int]:
        """How many times each was given to a studio."""
        counts = Counter(join.id for join in self.joins())
        return {id: counts[id] for id in ids}

    def results(self, id: str) -> list[str]:
        job = Job(id, connection=self.connection, serializer=JSONSerializer)
        return [Result.Type(result.type).name for result in Result.all(job, serializer=JSONSerializer)]

    def events(self, id: str) -> list[str]:
        return [event.name for event in events.parse(self.connection.xrange(events.stream(id)))]

    def wait_events(self, id: str, expected: list[str], among: Collection[str] = EVENTS) -> None:
        """A worker reports a moment later than it acts."""
        until(lambda: [name for name in self.events(id) if name in among] == expected, 10, lambda: str(self.events(id)))

    def left(self) -> dict[str, int]:
        """What RQ has not done with."""
        queued = {f"rq:queue:{queue}{part}" for queue in QUEUES for part in ("", ":intermediate")}
        counts = {key: self.connection.llen(key) for key in queued}
        counts |= {f"rq:wip:{queue}": self.connection.zcard(f"rq:wip:{queue}") for queue in QUEUES}
        return {key: count for key, count in counts.items() if count}

    def audit(self, ids: list[str], results: Collection[tuple[str, ...]] = (("SUCCESSFUL",),)) -> None:
        """Each has succeeded exactly once, and nothing is left of any."""
        assert self.count(ids) == {"succeeded": len(ids)}
        until(lambda: not self.left(), 10, lambda: f"left over: {self.left()}")
        # RQ writes its result a moment after the end
        until(
            lambda: {tuple(self.results(id)) for id in ids} <= set(results), 10, lambda: "results are not as expected"
        )

    def close(self) -> None:
        for process in self.workers:
            if process.is_alive():
                process.kill()
            process.join()
        self.connection.close()

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


@contextmanager
def wrong_clock(shift: str) -> Generator[Any]:
    """Where processes come from: those with a wrong clock are begun anew, with a library that lies to them."""
    if not shift:
        yield PROCESSES
        return
    own = dict(os.environ)
    os.environ |= {"LD_PRELOAD": str(FAKETIME), "FAKETIME": shift}
    try:
        yield multiprocessing.get_context("spawn")
    finally:
        os.environ.clear()
        os.environ |= own


def until(
    holds: Callable[[], object], seconds: float = 30, what: Callable[[], str] = lambda: "it does not happen"
) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s: {what()}"
        time.sleep(0.02)


def freeze(process: BaseProcess) -> None:
    os.kill(process.pid or 0, signal.SIGSTOP)


def thaw(process: BaseProcess) -> None:
    os.kill(process.pid or 0, signal.SIGCONT)


def ended(process: BaseProcess, seconds: float = 30) -> int | None:
    """Its exit status."""
    process.join(seconds)
    return process.exitcode
