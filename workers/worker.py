"""EngineWorker: an RQ worker whose unit of work is one engine step, not one job.

RQ runs a job to its end before it looks at the queue again. An engine would rather look between any two denoising steps:
let generations in while there is room, step everybody once, let those that are done go. What a job *is*, and what becomes
of it, stays with RQ: a running one is an ordinary `Execution` in the StartedJobRegistry.

What keeps it honest is the lease. A seated job is ours exactly as long as its execution is in the StartedJobRegistry. It
leaves when the job is canceled, deleted or judged abandoned, so "is it still there?" answers every "may I go on?", and
asking once more in the transaction that ends the job keeps it from ending twice.
"""

import json
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import structlog
from redis import Redis
from redis.client import Pipeline
from rq.command import handle_command, parse_payload
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.suspension import is_suspended
from rq.utils import now, utcformat
from rq.worker.base import BaseWorker, WorkerStatus

from app import events, metrics
from app.jobs import BELL, PRIORITIES, Pace, age_of, pace_key, queue_name
from app.schemas import Parameters

log = structlog.get_logger()

PULSE = 1.0  # seconds between signs of life
HEAD_START = {
    "high": 60.0,
    "normal": 0.0,
    "low": -60.0,
}  # seconds that a priority is worth in the queue; so none starves

# Ends a job if its lease is still ours, in one step, so that it cannot also be canceled or taken over.
# KEYS: registry of leases, job. ARGV: lease, status, ended_at, meta, seconds to keep the job.
END = """
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
redis.call('HSET', KEYS[2], 'status', ARGV[2], 'ended_at', ARGV[3], 'meta', ARGV[4])
redis.call('EXPIRE', KEYS[2], ARGV[5])
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


class Failed(Exception):
    """A reason that clients are told; `kind` is its stable name. `again`: another attempt may fare better."""

    kind = "error"
    again = False


class TimedOut(Failed):
    kind = "timeout"


class Stopped(Failed):
    """By an operator, with RQ's stop command."""

    kind = "stopped"


class Expired(Exception):
    """`expires_in` has passed."""


@dataclass(eq=False)
class Seat:
    """A job that is ours."""

    job: Job
    queue: Queue
    execution: Execution
    parameters: Parameters
    deadline: float  # time.monotonic()
    expires_at: float | None  # seconds since the epoch


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
        try_again: Callable[[Exception], bool] = lambda error: isinstance(error, Failed) and error.again,
    ):
        names = [queue_name(model, priority) for model in models for priority in PRIORITIES]
        super().__init__(
            names,
            name=name,
            connection=connection,
            serializer=JSONSerializer,
            maintenance_interval=lease,
            worker_ttl=lease,
            log_job_description=False,
        )
        self.studio, self.report, self.lease, self.warm_bonus, self.try_again = (
            studio,
            report,
            lease,
            warm_bonus,
            try_again,
        )
        self.seats: dict[str, Seat] = {}
        self.stops: set[str] = set()  # filled by RQ's own thread
        self.admitting = True
        self.next_beat = 0.0
        self.end_if_ours = connection.register_script(END)
        self.bell = connection.pubsub(ignore_subscribe_messages=True)

    def work(self, burst: bool = False, **_: Any) -> bool:
        self.bootstrap("WARNING")
        self._install_signal_handlers()
        self.bell.subscribe(BELL)
        try:
            while True:
                self.beat()  # leases renewed, lost ones let go
                self.listen(wait=not (self.seats or burst or self._stop_requested))
                if self.admitting and not self._stop_requested:
                    self.admit()
                if self.seats:
                    self.step()
                elif self._stop_requested or (burst and not self.waiting()):
                    return True
        finally:
            self.bell.close()
            self.teardown()

    # -- the four things that happen to a job: it is admitted, stepped, settled, or it vanishes

    def listen(self, wait: bool) -> None:
        """Hear what has come in or been canceled; with nothing to do, wait for it, until the next beat at the latest."""
        patience = max(0.0, self.next_beat - time.monotonic()) if wait and not self.waiting() else 0.0
        while message := self.bell.get_message(timeout=patience):
            word, _, id = message["data"].decode().partition(" ")
            if word == "drop" and (seat := self.seats.get(id)) and not self.holds(seat)[0]:
                self.forget(seat)
            patience = 0.0

    def admit(self) -> None:
        """Seat jobs while there is room, the longest waiting first, but for their priority and a bonus for warm models."""
        while any(self.take(queue) for queue in self.by_turn()):
            pass

    def by_turn(self) -> list[Queue]:
        """The queues that have something, in the order of whose turn it is."""
        heads = self.heads()
        return sorted(heads, key=lambda queue: heads[queue])

    def heads(self) -> dict[Queue, float]:
        """The queues that have something: when their first job came in, moved by what it may overtake."""
        with self.connection.pipeline(transaction=False) as pipe:
            for queue in self.queues:
                pipe.lindex(queue.key, 0)
            heads = pipe.execute()
        turns = {}
        for queue, head in zip(self.queues, heads, strict=True):
            if head is not None:
                model, _, priority = queue.name.rpartition(".")
                bonus = HEAD_START[priority] + (self.warm_bonus if self.studio.is_warm(model) else 0)
                turns[queue] = age_of(head.decode()) - bonus
        return turns

    def waiting(self) -> bool:
        return self.admitting and not self._stop_requested and bool(self.heads())

    def take(self, queue: Queue) -> bool:
        """Pop one job and make it ours. Queues are popped one at a time: only so does RQ keep the job if we die now."""
        if not self.studio.admits(queue.name.rpartition(".")[0]):
            return False
        found = self.queue_class.dequeue_any([queue], None, self.connection, self.job_class, self.serializer)
        if found is None:
            return False
        job = found[0]
        execution = self.connection.transaction(
            lambda pipe: self.claim(job, queue, pipe), job.key, value_from_callable=True
        )
        if execution:
            self.seat(job, queue, execution)
        return True

    def claim(self, job: Job, queue: Queue, pipe: Pipeline) -> Execution | None:
        """At once: out of the intermediate queue, leased, started. None if it was canceled or claimed since we popped it."""
        queued = pipe.hget(job.key, "status") == b"queued"
        pipe.multi()
        pipe.lrem(queue.intermediate_queue_key, 1, job.id)
        if not queued:
            return None
        pipe.persist(job.key)
        pipe.hincrby(job.key, "attempts", 1)
        job.prepare_for_execution(self.name, pipe)
        return Execution.create(job, self.lease, pipe, worker_name=self.name)

    def seat(self, job: Job, queue: Queue, execution: Execution) -> None:
        if job.id in self.seats:  # lost and queued again before we noticed
            self.forget(self.seats[job.id])
        job.enqueue_at_front_on_retry = True
        parameters = Parameters.model_validate(job.kwargs["parameters"])
        timeout = time.monotonic() + float(job.timeout or 0)
        expires = parameters.expires_in
        expires_at = None if expires is None else job.created_at.timestamp() + expires
        self.executions[execution.id] = execution
        self.seats[job.id] = seat = Seat(job, queue, execution, parameters, timeout, expires_at)
        metrics.RUNNING.labels(parameters.model).inc()
        metrics.QUEUE_WAIT.labels(parameters.model).observe(time.time() - job.created_at.timestamp())
        log.info("running", generation=job.id, model=parameters.model, worker=self.name)
        self.report(job.id, "running", {"status": "running"})
        try:
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
                self.hand_back(seat, error)
            raise
        for id, outcome in ended.items():
            self.settle(self.seats[id], outcome)

    def settle(self, seat: Seat, outcome: Any) -> None:
        """Give the job's outcome to RQ, if the job is still ours."""
        if isinstance(outcome, Exception) and self.try_again(outcome) and seat.job.should_retry:
            self.hand_back(seat, outcome)
            return
        self.vacate(seat)
        meta, status = verdict(outcome)
        job = seat.job
        job.ended_at = now()
        keep = int(job.result_ttl or 0)
        state = JobStatus.FINISHED if status == "succeeded" else JobStatus.FAILED
        keys = [seat.queue.started_job_registry.key, job.key]
        values = [seat.execution.composite_key, state.value, utcformat(job.ended_at), json.dumps(meta), keep]
        if not self.end_if_ours(keys=keys, args=values):  # canceled, or another worker has it by now
            self.forget(seat)
            return
        if status == "succeeded":
            self.handle_job_success(job, seat.queue, seat.queue.started_job_registry, seat.execution)
        else:
            job.retries_left = 0
            self.handle_job_failure(job, seat.queue, exc_string=traceback_of(outcome), execution=seat.execution)
            log.warning(status, generation=job.id, error=str(outcome), exc_info=None if known(outcome) else outcome)
        self.report(job.id, status, {"status": status}, timedelta(seconds=keep))
        model = seat.parameters.model
        metrics.REQUESTS.labels(model, status).inc()
        metrics.DURATION.labels(model).observe(time.time() - job.created_at.timestamp())
        log.info(status, generation=job.id, seconds=round(time.time() - job.created_at.timestamp(), 3))

    def hand_back(self, seat: Seat, error: Exception) -> None:
        """Queue the job again, in front, if it is still ours and has attempts left; else it has failed."""
        self.vacate(seat)
        if not seat.job.should_retry:
            self.seats[seat.job.id] = seat
            seat.job.retries_left = 0
            self.settle(seat, error)
            return

        def requeue(pipe: Pipeline) -> bool:
            if pipe.zscore(seat.queue.started_job_registry.key, seat.execution.composite_key) is None:
                return False
            pipe.multi()
            seat.execution.delete(seat.job, pipe)
            seat.job.retry(seat.queue, pipe)
            events.record(pipe, seat.job.id, "queued", {"status": "queued"})
            pipe.publish(BELL, "queued")
            return True

        again = self.connection.transaction(requeue, seat.job.key, value_from_callable=True)
        log.warning("handed_back", generation=seat.job.id, error=str(error), exc_info=error, still_ours=again)

    def vacate(self, seat: Seat) -> None:
        """It no longer takes part here."""
        del self.seats[seat.job.id]
        self.executions.pop(seat.execution.id, None)
        self.studio.leave(seat.job.id)
        metrics.RUNNING.labels(seat.parameters.model).dec()

    def forget(self, seat: Seat) -> None:
        """The lease is gone, and with it the job. RQ leaves the other traces of the execution to us."""
        if self.seats.get(seat.job.id) is seat:
            self.vacate(seat)
        with self.connection.pipeline() as pipe:
            seat.execution.delete(seat.job, pipe)
            pipe.execute()
        log.info("let_go", generation=seat.job.id)

    # -- the lease

    def holds(self, *seats: Seat) -> list[bool]:
        with self.connection.pipeline(transaction=False) as pipe:
            for seat in seats:
                pipe.zscore(seat.queue.started_job_registry.key, seat.execution.composite_key)
            return [score is not None for score in pipe.execute()]

    def beat(self) -> None:
        """Renew our leases, let go of jobs that are no longer ours, and give RQ's upkeep its turn."""
        if time.monotonic() < self.next_beat:
            return
        self.next_beat = time.monotonic() + PULSE
        self.heartbeat(self.lease)
        self.set_state(WorkerStatus.BUSY if self.seats else WorkerStatus.IDLE)
        self.admitting = not is_suspended(self.connection)
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
            for model, (rows_per_second, rows_per_job) in self.studio.paces().items():
                pace = Pace(time.time() + self.lease, rows_per_second, rows_per_job)
                pipe.hset(pace_key(model), self.name, json.dumps(pace))
                pipe.expire(pace_key(model), self.lease * 2)
            pipe.execute()
        metrics.HEARTBEAT.set_to_current_time()
        if self.should_run_maintenance_tasks:
            self.run_maintenance_tasks()

    # -- where RQ takes for granted that a worker has one job, or may be interrupted anywhere

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
        log.info("stopping", worker=self.name, in_flight=len(self.seats))
        self._stop_requested = (
            True  # RQ would raise out of an idle dequeue, losing a job popped in that instant (rq#2236)
        )

    def teardown(self) -> None:
        with suppress(Exception), self.connection.pipeline() as pipe:  # on the way out already
            for model in {queue.name.rpartition(".")[0] for queue in self.queues}:
                pipe.hdel(pace_key(model), self.name)
            pipe.execute()
        super().teardown()


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
