"""EngineWorker: an RQ worker whose unit of work is one engine step, not one job.

RQ runs a job to its end before it looks at the queue again. An engine would rather look between any two denoising
steps: let generations in while there is room, step everybody once, let those that are done go. What a job *is*, and
what becomes of it, stays with RQ: a running one is an ordinary `Execution` in the StartedJobRegistry.

What keeps it honest is the lease, see `workers/leases.py`: "is it still ours?" answers every "may I go on?".
"""

import json
import time
import traceback
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, Protocol, cast

import structlog
from redis import Redis
from rq.command import handle_command, parse_payload
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.suspension import WORKERS_SUSPENDED
from rq.utils import now
from rq.worker.base import BaseWorker
from rq.worker.base import WorkerStatus as State
from rq.worker_registration import register

from app import metrics
from app.jobs import BELL, PRIORITIES, Pace, age_of, pace_key, queue_name
from app.schemas import ModelAtWork, Parameters, WorkerStatus
from app.status import announce, withdraw
from workers.connection import Patience, RedisAway
from workers.leases import Clock, Leases, Seat, Why, model_of
from workers.outcomes import EngineBroke, Expired, Failed, Stopped, TimedOut
from workers.upkeep import Upkeep

log = structlog.get_logger()

PULSE = 1.0  # seconds between signs of life
LOADING = 0.05  # seconds between two looks whether a model that jobs wait for has been loaded
HEAD_START = {"high": 60.0, "normal": 0.0, "low": -60.0}  # seconds a priority is worth in the queue; so none starves


class Studio(Protocol):
    """What the worker asks of whoever draws."""

    def admits(self, model: str) -> bool: ...  # could a generation of this model join right now?
    def is_warm(self, model: str) -> bool: ...  # is it loaded already?
    def join(self, id: str, attempt: int, folder: str, parameters: Parameters) -> None: ...  # from the next step on
    def leave(self, id: str, ended: bool) -> None: ...  # no longer here; its rows are free again
    def step(self) -> Mapping[str, Any]: ...  # one step for all; {id: result or exception} of those that ended
    def keep(self) -> None: ...  # all that another worker needs in order to go on from here
    def paces(self) -> Mapping[str, tuple[float, float]]: ...  # {model: (rows a second, rows a job)}
    def at_work(self) -> list[ModelAtWork]: ...  # each warm model, since we last asked


class EngineWorker(BaseWorker):
    def __init__(
        self,
        models: Collection[str],
        *,
        studio: Studio,
        connection: "Redis",
        clock: Clock,
        lease: int,
        max_attempts: int,
        warm_bonus: float,
        stop_grace: float,
        device: str = "cpu",
        name: str | None = None,
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
        self.studio, self.clock, self.lease = studio, clock, lease
        self.warm_bonus, self.stop_grace, self.device = warm_bonus, stop_grace, device
        self.began = time.monotonic()
        self.leases = Leases(connection, self.name, lease, max_attempts, clock)
        self.upkeep = Upkeep(connection, self.queues, self.leases)
        self.seats: dict[str, Seat] = {}
        self.turns: list[Queue] = []  # those that had something when we last looked, in the order of their turn
        self.rung = True  # something may have come in since then
        self.stops: set[str] = set()  # filled by RQ's own thread
        self.admitting = True
        self.next_beat = 0.0
        self.away_until = 0.0  # time.monotonic() until which others may not have been able to renew their leases
        self.stop_at: float | None = None  # time.monotonic() by which a stopping worker hands over what it has
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
            elif (seat := self.seats.get(id)) and not self.leases.held([seat])[0]:
                self.forget(seat)
            patience = 0.0

    def admit(self) -> None:
        """Seat jobs while there is room: the longest waiting first, but for priority and a bonus for warm models.

        Asks Redis only if the bell has rung, or there is room for what waited when we last looked. Who is a suspect
        gets no company: no more are admitted until it has been drawn.
        """
        while not self.suspects and (self.rung or any(self.studio.admits(model_of(queue)) for queue in self.turns)):
            self.rung = False
            self.turns = self.look()
            if not any(self.take(queue) for queue in self.turns):
                break
        if len(self.seats) == 1 and (suspects := self.suspects) and not suspects[0].begun:
            self.leases.mark_alone(suspects[0])
            self.begin(suspects[0])

    @property
    def suspects(self) -> list[Seat]:
        return [seat for seat in self.seats.values() if seat.suspect]

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
        if claim := self.leases.claim(job, queue):
            deadline = time.monotonic() + cast(int, job.timeout)
            self.seat(Seat(job, queue, claim.execution, claim.attempt, claim.suspect, deadline))
        return True

    def seat(self, seat: Seat) -> None:
        job = seat.job
        if job.id in self.seats:  # lost and queued again before we noticed
            self.forget(self.seats[job.id])
        self.executions[seat.execution.id] = seat.execution
        self.seats[job.id] = seat
        metrics.RUNNING.labels(seat.model).inc()
        metrics.QUEUE_WAIT.labels(seat.model).observe(self.clock.time() - job.created_at.timestamp())
        log.info("running", generation=job.id, model=seat.model, worker=self.name, attempt=seat.attempt)
        if not seat.suspect:
            self.begin(seat)

    def begin(self, seat: Seat) -> None:
        """Let it take part."""
        job, seat.begun = seat.job, True
        try:
            parameters = Parameters.model_validate(job.kwargs["parameters"])
            if parameters.expires_in is not None:
                seat.expires_at = job.created_at.timestamp() + parameters.expires_in
            if self.overdue(seat):
                raise Expired
            self.studio.join(job.id, seat.attempt, f"{job.id}/{seat.execution.id[:8]}", parameters)
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
        if isinstance(outcome, EngineBroke):
            self.give_back(seat, "died")
        elif isinstance(outcome, Failed) and outcome.again and seat.job.should_retry:
            log.warning("tried_again", generation=seat.job.id, error=str(outcome))
            self.give_back(seat, "unlucky")
        elif not self.end(seat, outcome):
            self.forget(seat)

    def give_back(self, seat: Seat, why: Why) -> None:
        """Queue the job again, in front; unless it has killed too many."""
        self.vacate(seat)
        now = self.leases.give_back(seat, why)
        if now == "failed":
            self.upkeep.bury(seat.job, traceback.format_exc())
        self.clear(seat)
        log.warning("given_back", generation=seat.job.id, why=why, now=now)

    def end(self, seat: Seat, outcome: Any) -> bool:
        """Give the job's outcome to RQ. False if it is no longer ours."""
        job = seat.job
        meta, status = verdict(outcome)
        state = JobStatus.FINISHED if status == "succeeded" else JobStatus.FAILED
        keep = cast(int, job.result_ttl if status == "succeeded" else job.failure_ttl)
        if not self.leases.end(seat, state.value, meta, keep, status):
            return False
        self.vacate(seat, ended=True)
        if status == "succeeded":
            self.handle_job_success(job, seat.queue, seat.queue.started_job_registry, seat.execution)
        else:
            job.retries_left = 0
            self.handle_job_failure(job, seat.queue, exc_string=traceback_of(outcome), execution=seat.execution)
            log.warning(status, generation=job.id, error=str(outcome), exc_info=None if known(outcome) else outcome)
        seconds = self.clock.time() - job.created_at.timestamp()
        metrics.REQUESTS.labels(seat.model, status).inc()
        metrics.DURATION.labels(seat.model).observe(seconds)
        log.info(status, generation=job.id, seconds=round(seconds, 3))
        return True

    def vacate(self, seat: Seat, ended: bool = False) -> None:
        """It no longer takes part here."""
        del self.seats[seat.job.id]
        self.executions.pop(seat.execution.id, None)
        self.studio.leave(seat.job.id, ended)
        metrics.RUNNING.labels(seat.model).dec()

    def forget(self, seat: Seat) -> None:
        """It is no longer ours."""
        if self.seats.get(seat.job.id) is seat:
            self.vacate(seat)
        self.clear(seat)
        log.info("let_go", generation=seat.job.id)

    def clear(self, seat: Seat) -> None:
        """RQ leaves the traces of an execution that it did not end to us."""
        with self.connection.pipeline() as pipe:
            seat.execution.delete(seat.job, pipe)
            pipe.execute()

    # -- the beat

    def beat(self) -> None:
        """Show that we live, renew our leases, let lost jobs go, and give upkeep its turn."""
        now = time.monotonic()
        if now < self.next_beat:
            return
        if self.next_beat and now - self.next_beat > self.lease / 2:  # we slept, or Redis was away for everybody
            self.away_until = now + self.lease
        overdue_leases = self.show_life()
        self.next_beat = time.monotonic() + PULSE
        self.rung = True  # a ring is lost while the connection is
        self.renew()
        metrics.HEARTBEAT.set(self.clock.time())
        if overdue_leases or self.should_run_maintenance_tasks:
            self.run_maintenance_tasks()
        if self._stop_requested:
            self.hand_over()

    def show_life(self) -> bool:
        """Tell the others that we are here and how fast; learn whether any lease in our queues has run out."""
        with self.connection.pipeline(transaction=False) as pipe:
            self.heartbeat(self.lease, pipe)
            self.set_state(State.BUSY if self.seats else State.IDLE, pipe)
            for model, (rows_per_second, rows_per_job) in self.studio.paces().items():
                pace = Pace(self.clock.time() + self.lease, rows_per_second, rows_per_job)
                pipe.hset(pace_key(model), self.name, json.dumps(pace))
                pipe.expire(pace_key(model), self.lease * 2)
            announce(pipe, self.status(), self.lease)
            for queue in self.queues:
                pipe.zcount(queue.started_job_registry.key, 0, self.clock.time())
            pipe.exists(WORKERS_SUSPENDED)
            pipe.time()
            created, *answers, suspended, server_time = pipe.execute()
        self.clock.set(server_time)
        self.admitting = not suspended
        if created:  # our hash had expired: a step took longer than a lease, or the process was stopped
            self.connection.hset(self.key, mapping=self.serialize())
            register(self)
        return any(answers[-len(self.queues) :])

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            name=self.name,
            device=self.device,
            uptime_seconds=round(time.monotonic() - self.began, 1),
            stopping=self._stop_requested,
            models=self.studio.at_work(),
        )

    def renew(self) -> None:
        seats, renewed = list(self.seats.values()), list[Seat]()
        for seat, held in zip(seats, self.leases.held(seats), strict=True):
            if not held:
                self.forget(seat)
            elif self.overdue(seat):
                self.settle(seat, Expired())
            elif time.monotonic() > seat.deadline:
                self.settle(seat, TimedOut(f"took longer than {seat.job.timeout} s"))
            else:
                renewed.append(seat)
        self.leases.renew(renewed)

    def overdue(self, seat: Seat) -> bool:
        return seat.expires_at is not None and self.clock.time() > seat.expires_at

    def hand_over(self) -> None:
        """A stopping worker has so long to finish. What it has not, another goes on with, from this step."""
        if self.stop_at is None:
            self.stop_at = time.monotonic() + self.stop_grace
            log.info("stopping", worker=self.name, in_flight=len(self.seats), grace=self.stop_grace)
        if self.seats and time.monotonic() > self.stop_at:
            self.studio.keep()
            for seat in list(self.seats.values()):
                self.give_back(seat, "stopping")

    def clean_registries(self) -> None:
        """Ours instead of RQ's, see `workers/upkeep.py`."""
        self.upkeep.run(take_over=time.monotonic() >= self.away_until)
        self.last_cleaned_at = now()

    # -- where RQ takes for granted that a worker has one job, or may be interrupted anywhere

    @property
    def connection_timeout(self) -> int:
        return 0  # RQ waits longer than a blocking pop takes; ours never block, and `connect` says how long we wait

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
        self.connection.set_retry(Patience(0))  # if Redis is away, we have waited already, or are to stop
        with suppress(RedisAway), self.connection.pipeline() as pipe:  # then what it knows of us runs out by itself
            for model in {model_of(queue) for queue in self.queues}:
                pipe.hdel(pace_key(model), self.name)
            withdraw(pipe, self.name)
            pipe.execute()
            super().teardown()


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
