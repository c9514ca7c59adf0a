"""EngineWorker: an RQ worker whose unit of work is one engine step, not one job.

RQ runs a job to its end before it looks at the queue again. An engine would rather look between any two denoising
steps: let generations in while there is room, step everybody once, let those that are done go. What a job *is*, and
what becomes of it, stays with RQ: a running one is an ordinary `Execution` in the StartedJobRegistry.

What keeps it honest is the lease. A seated job is ours exactly as long as its execution is in the StartedJobRegistry
and the job says that it was started, by us. One of the two no longer holds once the job is canceled, deleted or judged
abandoned, so "is it still ours?" answers every "may I go on?", and asking once more in the script that ends the job
keeps it from ending twice. Clocks decide how soon a silent worker's jobs are taken over, never whose they are.
"""

import json
import time
import traceback
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, cast

import structlog
from redis import Redis
from redis.client import Pipeline
from rq.command import handle_command, parse_payload
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.suspension import WORKERS_SUSPENDED
from rq.utils import now, utcformat
from rq.worker.base import BaseWorker, WorkerStatus
from rq.worker_registration import register

from app import events, metrics
from app.jobs import BELL, PRIORITIES, Pace, age_of, atomically, pace_key, queue_name
from app.schemas import Parameters
from workers.outcomes import EngineBroke, Expired, Failed, Stopped, TimedOut

log = structlog.get_logger()

PULSE = 1.0  # seconds between signs of life
LOADING = 0.05  # seconds between two looks whether a model that jobs wait for has been loaded
HEAD_START = {"high": 60.0, "normal": 0.0, "low": -60.0}  # seconds a priority is worth in the queue; so none starves

# Ends a job if it is still ours, in one step, so that it cannot also be canceled, taken over or ended twice.
# KEYS: registry of leases, job. ARGV: lease, worker's name, status, ended_at, meta, seconds to keep the job.
END = """
local job = redis.call('HMGET', KEYS[2], 'status', 'worker_name')
if job[1] ~= 'started' or job[2] ~= ARGV[2] or not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
redis.call('HSET', KEYS[2], 'status', ARGV[3], 'ended_at', ARGV[4], 'meta', ARGV[5])
redis.call('EXPIRE', KEYS[2], ARGV[6])
return 1
"""


class Studio(Protocol):
    """What the worker asks of whoever draws."""

    def admits(self, model: str) -> bool: ...  # could a generation of this model join right now?
    def is_warm(self, model: str) -> bool: ...  # is it loaded already?
    def join(self, id: str, folder: str, parameters: Parameters) -> None: ...  # take part from the next step on
    def leave(self, id: str) -> None: ...  # no longer wanted; its rows are free again
    def step(self) -> Mapping[str, Any]: ...  # one step for all; {id: result or exception} of those that ended
    def paces(self) -> Mapping[str, tuple[float, float]]: ...  # {model: (rows a second, rows a job)}


class Report(Protocol):
    def __call__(
        self, generation: str, name: str, data: dict[str, Any] | None = None, ttl: timedelta = ...
    ) -> None: ...


@dataclass(eq=False)
class Seat:
    """A job that is ours."""

    job: Job
    queue: Queue
    execution: Execution
    deadline: float  # time.monotonic()
    expires_at: float | None = None  # seconds since the epoch

    @property
    def model(self) -> str:
        return model_of(self.queue)

    @property
    def leases(self) -> str:
        return self.queue.started_job_registry.key


class EngineWorker(BaseWorker):
    def __init__(
        self,
        models: Collection[str],
        *,
        studio: Studio,
        report: Report,
        connection: "Redis",
        lease: int,
        warm_bonus: float,
        name: str | None = None,
    ):
        names = [queue_name(model, priority) for model in models for priority in PRIORITIES]
        super().__init__(
            names,
            name=name,
            connection=connection,
            exception_handlers=[self.notice],
            serializer=JSONSerializer,
            maintenance_interval=lease,
            worker_ttl=lease,
            log_job_description=False,
        )
        self.studio, self.report, self.lease, self.warm_bonus = studio, report, lease, warm_bonus
        self.seats: dict[str, Seat] = {}
        self.turns: list[Queue] = []  # those that had something when we last looked, in the order of their turn
        self.rung = True  # something may have come in since then
        self.stops: set[str] = set()  # filled by RQ's own thread
        self.abandoned: list[Job] = []
        self.admitting = True
        self.next_beat = 0.0
        self.end_if_ours = connection.register_script(END)
        self.bell = connection.pubsub(ignore_subscribe_messages=True)

    def work(self, burst: bool = False, *_: Any, **__: Any) -> bool:
        self._install_signal_handlers()
        self.bootstrap("WARNING")
        self.bell.subscribe(BELL)
        try:
            while True:
                self.beat()  # leases renewed, lost ones let go
                self.listen(wait=not (self.seats or burst or self._stop_requested))
                if self.admitting and not self._stop_requested:
                    self.admit()
                if self.seats:
                    self.step()
                elif self._stop_requested or (burst and not self.turns):
                    return True
        finally:
            self.bell.close()
            self.teardown()

    # -- the four things that happen to a job: it is admitted, stepped, settled, or it vanishes

    def listen(self, wait: bool) -> None:
        """Hear what has come in or been canceled; with nothing to do, wait for it, at most until the next beat."""
        patience = 0.0
        if wait and not (self.rung and self.admitting):
            patience = LOADING if self.turns else max(0.0, self.next_beat - time.monotonic())
        while message := self.bell.get_message(timeout=patience):
            word, _, id = cast(bytes, message["data"]).decode().partition(" ")
            if word == "queued":
                self.rung = True
            elif (seat := self.seats.get(id)) and not self.holds(seat)[0]:
                self.forget(seat)
            patience = 0.0

    def admit(self) -> None:
        """Seat jobs while there is room: the longest waiting first, but for priority and a bonus for warm models.

        Asks Redis only if the bell has rung, or there is room for what waited when we last looked.
        """
        while self.rung or any(self.studio.admits(model_of(queue)) for queue in self.turns):
            self.rung = False
            self.turns = self.look()
            if not any(self.take(queue) for queue in self.turns):
                return

    def look(self) -> list[Queue]:
        """The queues that have something, by when their first job came in, moved by what it may overtake."""
        with self.connection.pipeline(transaction=False) as pipe:
            for queue in self.queues:
                pipe.lindex(queue.key, 0)
            firsts = pipe.execute()
        heads = {queue: first for queue, first in zip(self.queues, firsts, strict=True) if first is not None}
        return sorted(heads, key=lambda queue: age_of(heads[queue].decode()) - self.advantage(queue))

    def advantage(self, queue: Queue) -> float:
        model, _, priority = queue.name.rpartition(".")
        return HEAD_START[priority] + (self.warm_bonus if self.studio.is_warm(model) else 0)

    def take(self, queue: Queue) -> bool:
        """Pop one job and make it ours. Queues are popped one at a time: only so does RQ keep the job if we die now."""
        if not self.studio.admits(model_of(queue)):
            return False
        found = self.queue_class.dequeue_any([queue], None, self.connection, self.job_class, self.serializer)
        if found is None:
            return False
        job = found[0]
        if execution := atomically(self.connection, lambda pipe: self.claim(job, queue, pipe), job.key):
            self.seat(job, queue, execution)
        return True

    def claim(self, job: Job, queue: Queue, pipe: Pipeline) -> Execution | None:
        """At once out of the intermediate queue, leased, started. None if it was canceled or claimed meanwhile."""
        queued = pipe.hget(job.key, "status") == b"queued"
        pipe.multi()
        pipe.lrem(queue.intermediate_queue_key, 1, job.id)
        if not queued:
            return None
        pipe.persist(job.key)
        pipe.hincrby(job.key, "attempts", 1)
        job.prepare_for_execution(self.name, pipe)
        events.record(pipe, job.id, "running", {"status": "running"})
        return Execution.create(job, self.lease, pipe, worker_name=self.name)

    def seat(self, job: Job, queue: Queue, execution: Execution) -> None:
        if job.id in self.seats:  # lost and queued again before we noticed
            self.forget(self.seats[job.id])
        seat = Seat(job, queue, execution, deadline=time.monotonic() + cast(int, job.timeout))
        self.executions[execution.id] = execution
        self.seats[job.id] = seat
        metrics.RUNNING.labels(seat.model).inc()
        metrics.QUEUE_WAIT.labels(seat.model).observe(time.time() - job.created_at.timestamp())
        log.info("running", generation=job.id, model=seat.model, worker=self.name)
        try:
            parameters = Parameters.model_validate(job.kwargs["parameters"])
            if parameters.expires_in is not None:
                seat.expires_at = job.created_at.timestamp() + parameters.expires_in
            if overdue(seat):
                raise Expired
            self.studio.join(job.id, f"{job.id}/{execution.id[:8]}", parameters)
        except Exception as error:
            self.settle(seat, error)

    def step(self) -> None:
        while self.stops:
            if seat := self.seats.get(self.stops.pop()):
                self.settle(seat, Stopped("stopped by an operator"))
        try:
            ended = self.studio.step()
        except Exception as error:  # the engine itself broke: hand every job back, then let the process go
            for seat in list(self.seats.values()):
                self.settle(seat, EngineBroke(f"{type(error).__name__}: {error}"))
            raise
        for id, outcome in ended.items():
            self.settle(self.seats[id], outcome)

    def settle(self, seat: Seat, outcome: Any) -> None:
        """It no longer takes part: queued again or ended, unless it was canceled or taken over."""
        self.vacate(seat)
        again = isinstance(outcome, Failed) and outcome.again and seat.job.should_retry
        if not (self.hand_back(seat, outcome) if again else self.end(seat, outcome)):
            self.forget(seat)

    def hand_back(self, seat: Seat, error: Failed) -> bool:
        """Queue the job again, in front. False if it is no longer ours."""
        job, left = seat.job, seat.job.retries_left

        def requeue(pipe: Pipeline) -> bool:
            if not self.is_ours(*self.ask(pipe, seat)):
                return False
            pipe.multi()
            seat.execution.delete(job, pipe)
            job.retries_left = left  # `retry` counts it down, and this may run more than once
            job.retry(seat.queue, pipe)
            events.record(pipe, job.id, "queued", {"status": "queued"})
            pipe.publish(BELL, "queued")
            return True

        again = atomically(self.connection, requeue, job.key)
        log.warning("handed_back", generation=job.id, error=str(error), still_ours=again)
        return again

    def end(self, seat: Seat, outcome: Any) -> bool:
        """Give the job's outcome to RQ. False if it is no longer ours."""
        job = seat.job
        meta, status = verdict(outcome)
        state = JobStatus.FINISHED if status == "succeeded" else JobStatus.FAILED
        job.ended_at = now()
        keep = cast(int, job.result_ttl)
        ending = [state.value, utcformat(job.ended_at), json.dumps(meta), keep]
        if not self.end_if_ours([seat.leases, job.key], [seat.execution.composite_key, self.name, *ending]):
            return False
        if status == "succeeded":
            self.handle_job_success(job, seat.queue, seat.queue.started_job_registry, seat.execution)
        else:
            job.retries_left = 0
            self.handle_job_failure(job, seat.queue, exc_string=traceback_of(outcome), execution=seat.execution)
            log.warning(status, generation=job.id, error=str(outcome), exc_info=None if known(outcome) else outcome)
        self.report(job.id, status, {"status": status}, timedelta(seconds=keep))
        seconds = time.time() - job.created_at.timestamp()
        metrics.REQUESTS.labels(seat.model, status).inc()
        metrics.DURATION.labels(seat.model).observe(seconds)
        log.info(status, generation=job.id, seconds=round(seconds, 3))
        return True

    def vacate(self, seat: Seat) -> None:
        """It no longer takes part here."""
        del self.seats[seat.job.id]
        self.executions.pop(seat.execution.id, None)
        self.studio.leave(seat.job.id)
        metrics.RUNNING.labels(seat.model).dec()

    def forget(self, seat: Seat) -> None:
        """It is no longer ours. RQ leaves the traces of the execution to us."""
        if self.seats.get(seat.job.id) is seat:
            self.vacate(seat)
        with self.connection.pipeline() as pipe:
            seat.execution.delete(seat.job, pipe)
            pipe.execute()
        log.info("let_go", generation=seat.job.id)

    # -- the lease

    def ask(self, pipe: Pipeline, seat: Seat) -> tuple[Any, Any]:
        """What `is_ours` wants to know."""
        return (
            pipe.zscore(seat.leases, seat.execution.composite_key),
            pipe.hmget(seat.job.key, "status", "worker_name"),
        )

    def is_ours(self, leased_until: float | None, job: list[bytes | None]) -> bool:
        """Leased, started, and by us. A lease that has run out is ours until somebody acts on that."""
        return leased_until is not None and job == [b"started", self.name.encode()]

    def holds(self, *seats: Seat) -> list[bool]:
        with self.connection.pipeline(transaction=False) as pipe:
            for seat in seats:
                self.ask(pipe, seat)
            answers = pipe.execute()
        return [self.is_ours(*asked) for asked in zip(answers[::2], answers[1::2], strict=True)]

    def beat(self) -> None:
        """Show that we live, renew our leases, let lost jobs go, and give RQ's upkeep its turn."""
        if time.monotonic() < self.next_beat:
            return
        self.next_beat = time.monotonic() + PULSE
        self.rung = True  # a ring is lost while the connection is
        if self._stop_requested:
            log.info("stopping", worker=self.name, in_flight=len(self.seats))
        overdue_leases = self.show_life()
        self.renew()
        metrics.HEARTBEAT.set_to_current_time()
        if overdue_leases or self.should_run_maintenance_tasks:
            self.upkeep()

    def show_life(self) -> bool:
        """Tell the others that we are here and how fast; learn whether any lease in our queues has run out."""
        with self.connection.pipeline(transaction=False) as pipe:
            self.heartbeat(self.lease, pipe)
            self.set_state(WorkerStatus.BUSY if self.seats else WorkerStatus.IDLE, pipe)
            for model, (rows_per_second, rows_per_job) in self.studio.paces().items():
                pace = Pace(time.time() + self.lease, rows_per_second, rows_per_job)
                pipe.hset(pace_key(model), self.name, json.dumps(pace))
                pipe.expire(pace_key(model), self.lease * 2)
            for queue in self.queues:
                pipe.zcount(queue.started_job_registry.key, 0, int(time.time()))
            pipe.exists(WORKERS_SUSPENDED)
            created, *answers, suspended = pipe.execute()
        self.admitting = not suspended
        if created:  # our hash had expired: a step took longer than a lease, or the process was stopped
            self.connection.hset(self.key, mapping=self.serialize())
            register(self)
        return any(answers[-len(self.queues) :])

    def renew(self) -> None:
        seats = list(self.seats.values())
        with self.connection.pipeline() as pipe:
            for seat, held in zip(seats, self.holds(*seats), strict=True):
                if not held:
                    self.forget(seat)
                elif overdue(seat):
                    self.settle(seat, Expired())
                elif time.monotonic() > seat.deadline:
                    self.settle(seat, TimedOut(f"took longer than {seat.job.timeout} s"))
                else:
                    seat.execution.heartbeat(seat.queue.started_job_registry, self.lease, pipe)
            pipe.execute()

    def upkeep(self) -> None:
        """RQ's: what dead workers held is queued again or has failed. Then tell those who follow it."""
        with self.connection.pipeline(transaction=False) as pipe:
            for queue in self.queues:  # RQ's lock on this lasts 15 minutes; who holds it may have died in it
                pipe.expire(queue.registry_cleaning_key, self.lease, lt=True)
            pipe.execute()
        self.run_maintenance_tasks()
        while self.abandoned:
            job = self.abandoned.pop()
            status = "queued" if job.get_status(refresh=False) == JobStatus.QUEUED else "failed"
            keep = timedelta(seconds=cast(int, job.failure_ttl)) if status == "failed" else events.FORGOTTEN_AFTER
            self.report(job.id, status, {"status": status}, keep)
            log.warning("abandoned", generation=job.id, worker=job.worker_name, now=status)
            if status == "failed":
                metrics.REQUESTS.labels(job.origin.rpartition(".")[0], status).inc()

    # -- where RQ takes for granted that a worker has one job, or may be interrupted anywhere

    def notice(self, job: Job, *_: Any) -> None:
        """RQ's upkeep says so of each job that was abandoned, before it acts."""
        self.abandoned.append(job)

    def handle_job_failure(
        self,
        job: Job,
        queue: Queue,
        started_job_registry: StartedJobRegistry | None = None,
        exc_string: str = "",
        execution: Execution | None = None,
    ) -> None:
        """RQ's upkeep also takes for a failure what was popped by a worker that died before it claimed it."""
        if execution is None:
            atomically(self.connection, lambda pipe: self.put_back(job, queue, pipe), job.key)
        else:
            super().handle_job_failure(job, queue, started_job_registry, exc_string, execution)

    def put_back(self, job: Job, queue: Queue, pipe: Pipeline) -> None:
        """Popped and never claimed: in front again, unless it was canceled meanwhile."""
        queued = pipe.hget(job.key, "status") == b"queued"
        pipe.multi()
        pipe.lrem(queue.intermediate_queue_key, 0, job.id)
        if queued:
            pipe.lpush(queue.key, job.id)

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0) -> int:
        return self.lease

    def handle_payload(self, message: Any) -> None:
        payload = parse_payload(message)
        if payload["command"] == "stop-job":
            self.stops.add(payload["job_id"])
        else:
            handle_command(self, payload)

    def request_stop_execution(self, execution_id: str) -> None:
        if execution := self.executions.get(execution_id):
            self.stops.add(execution.job_id)

    def _shutdown(self) -> None:
        """A signal may come in the middle of anything: RQ would raise, losing a job popped in that instant (rq#2236).

        Nor may this log: the line that it interrupts may hold the log's lock.
        """
        self._stop_requested = True

    def teardown(self) -> None:
        with suppress(Exception), self.connection.pipeline() as pipe:  # on the way out already
            for model in {model_of(queue) for queue in self.queues}:
                pipe.hdel(pace_key(model), self.name)
            pipe.execute()
        super().teardown()


def model_of(queue: Queue) -> str:
    return queue.name.rpartition(".")[0]


def overdue(seat: Seat) -> bool:
    return seat.expires_at is not None and time.time() > seat.expires_at


def known(outcome: Any) -> bool:
    return isinstance(outcome, Failed | Expired)


def verdict(outcome: Any) -> tuple[dict[str, Any], str]:
    """What becomes of the job's `meta`, and the generation's status."""
    match outcome:
        case Expired():
            return {"outcome": "expired"}, "expired"
        case Failed():
            return {"error": {"type": outcome.kind, "detail": str(outcome)}}, "failed"
        case Exception():
            return {"error": {"type": "error", "detail": f"{type(outcome).__name__}: {outcome}"}}, "failed"
        case _:
            return outcome, "succeeded"


def traceback_of(error: Exception) -> str:
    return "".join(traceback.format_exception(error))
