"""What Redis is told of the jobs that a worker holds: claimed, renewed, released, ended.

A job is ours exactly as long as its execution is in RQ's StartedJobRegistry and the job says that it was started, by
us. Whatever changes a job's standing asks that first, in the same transaction or script, so that it cannot also be
canceled, taken over or ended twice. All times are the server's: a worker's clock may be wrong by minutes.
"""

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, cast

from redis import Redis
from redis.client import Pipeline
from rq.executions import Execution
from rq.job import Job
from rq.queue import Queue
from rq.utils import parse_composite_key, utcformat

from app import events, webhooks
from app.jobs import BELL, Replies, atomically, moment

Why = Literal["died", "unlucky", "stopping"]

# KEYS: leases, job, events, failed jobs.
# ARGV: lease, worker's name, status, ended_at, meta, seconds to keep the job, outcome, id.
END = (
    events.RECORD
    + webhooks.TELL
    + """
local job = redis.call('HMGET', KEYS[2], 'status', 'worker_name')
if job[1] ~= 'started' or job[2] ~= ARGV[2] or not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
redis.call('HSET', KEYS[2], 'status', ARGV[3], 'ended_at', ARGV[4], 'meta', ARGV[5])
redis.call('EXPIRE', KEYS[2], ARGV[6])
if ARGV[3] == 'failed' then redis.call('ZADD', KEYS[4], redis.call('TIME')[1] + ARGV[6], ARGV[8]) end
record(KEYS[3], ARGV[7], ARGV[6])
tell(KEYS[2], ARGV[8], ARGV[7])
return 1
"""
)

# Queues a job again, in front, or fails it if its workers died too often while it was drawn alone. Its batch-mates are
# not charged for such a death: nobody knows yet who is to blame, so each is a suspect and drawn alone next time.
# KEYS: leases, job, events, queue, failed jobs.
# ARGV: lease, worker's name or '' for one that let the lease run out, its execution, why, deaths allowed, ended_at,
# meta of the failure, seconds to keep a failed job, id.
RELEASE = (
    events.RECORD
    + webhooks.TELL
    + """
local job = redis.call('HMGET', KEYS[2], 'status', 'worker_name', 'alone', 'deaths')
local expires = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not expires then return 'gone' end
if ARGV[2] == '' then
    if tonumber(expires) > tonumber(redis.call('TIME')[1]) then return 'held' end
    redis.call('ZREM', KEYS[1], ARGV[1])
    if job[1] ~= 'started' then return 'gone' end
else
    if job[1] ~= 'started' or job[2] ~= ARGV[2] then return 'gone' end
    redis.call('ZREM', KEYS[1], ARGV[1])
end
if ARGV[4] == 'died' then
    local deaths = tonumber(job[4] or 0)
    if job[3] == ARGV[3] then deaths = redis.call('HINCRBY', KEYS[2], 'deaths', 1) end
    if deaths >= tonumber(ARGV[5]) then
        redis.call('HSET', KEYS[2], 'status', 'failed', 'ended_at', ARGV[6], 'meta', ARGV[7])
        redis.call('EXPIRE', KEYS[2], ARGV[8])
        redis.call('ZADD', KEYS[5], redis.call('TIME')[1] + ARGV[8], ARGV[9])
        record(KEYS[3], 'failed', ARGV[8])
        tell(KEYS[2], ARGV[9], 'failed')
        return 'failed'
    end
    redis.call('HSET', KEYS[2], 'suspect', 1)
elseif ARGV[4] == 'unlucky' then
    redis.call('HINCRBY', KEYS[2], 'retries_left', -1)
end
redis.call('HSET', KEYS[2], 'status', 'queued')
redis.call('LPUSH', KEYS[4], ARGV[9])
record(KEYS[3], 'queued', nil)
tell(KEYS[2], ARGV[9], 'queued')
redis.call('PUBLISH', '"""
    + BELL
    + """', 'queued')
return 'queued'
"""
)


@dataclass(eq=False)
class Seat:
    """A job that is ours."""

    job: Job
    queue: Queue
    execution: Execution
    attempt: int  # counted from 1
    suspect: bool  # a worker died drawing it, so it is drawn alone
    deadline: float  # time.monotonic()
    expires_at: float | None = None  # seconds since the epoch, as the server counts them
    begun: bool = False

    @property
    def model(self) -> str:
        return model_of(self.queue)

    @property
    def leases(self) -> str:
        return self.queue.started_job_registry.key


class Clock:
    """The server's time, as far as this process knows it."""

    def __init__(self) -> None:
        self.ahead = 0.0  # seconds that the server's clock is ahead of ours

    def set(self, server: tuple[int, int]) -> None:
        """By the answer to TIME."""
        seconds, microseconds = server
        self.ahead = seconds + microseconds / 1e6 - time.time()

    def time(self) -> float:
        """Seconds since the epoch."""
        return time.time() + self.ahead


class Claim(NamedTuple):
    execution: Execution
    attempt: int
    suspect: bool


class Leases:
    """The leases of one worker.

    Args:
        seconds: until a lease that is not renewed may be taken over.
        max_attempts: of a job whose workers die drawing it alone.
    """

    def __init__(self, connection: "Redis", worker: str, seconds: int, max_attempts: int, clock: Clock):
        self.connection, self.worker, self.seconds, self.clock = connection, worker, seconds, clock
        self.deaths_allowed = max(1, max_attempts - 1)
        self._end = connection.register_script(END)
        self._release = connection.register_script(RELEASE)

    def claim(self, job: Job, queue: Queue) -> Claim | None:
        """Make a job ours that was popped. None if it was canceled or claimed meanwhile."""
        return atomically(self.connection, lambda pipe: self._claim(job, queue, pipe), job.key)

    def _claim(self, job: Job, queue: Queue, pipe: Pipeline) -> Claim | None:
        """At once out of the intermediate queue, leased, started."""
        status, attempts, suspect = cast(Replies, pipe.hmget(job.key, "status", "attempts", "suspect"))
        pipe.multi()
        pipe.lrem(queue.intermediate_queue_key, 1, job.id)
        if status != b"queued":
            return None
        pipe.persist(job.key)
        pipe.hincrby(job.key, "attempts", 1)
        job.prepare_for_execution(self.worker, pipe)
        job.started_at = datetime.fromtimestamp(self.clock.time(), UTC)  # RQ writes it again at the end
        pipe.hset(job.key, "started_at", utcformat(job.started_at))
        events.record(pipe, job.id, "running", {"status": "running"})
        webhooks.tell(pipe, job.id, "running")
        execution = Execution.create(job, self.seconds, pipe, worker_name=self.worker)
        self._lease(pipe, queue.started_job_registry.key, execution)
        return Claim(execution, int(attempts or 0) + 1, suspect is not None)

    def renew(self, seats: Sequence[Seat]) -> None:
        with self.connection.pipeline() as pipe:
            for seat in seats:
                seat.execution.heartbeat(seat.queue.started_job_registry, self.seconds, pipe)
                self._lease(pipe, seat.leases, seat.execution)
            pipe.execute()

    def _lease(self, pipe: Pipeline, leases: str, execution: Execution) -> None:
        """RQ has just written the same by this machine's clock."""
        pipe.zadd(leases, {execution.composite_key: self.clock.time() + self.seconds}, xx=True)

    def held(self, seats: Collection[Seat]) -> list[bool]:
        """Whether each is still ours. A lease that has run out is ours until somebody acts on that."""
        with self.connection.pipeline(transaction=False) as pipe:
            for seat in seats:
                pipe.zscore(seat.leases, seat.execution.composite_key)
                pipe.hmget(seat.job.key, "status", "worker_name")
            answers = pipe.execute()
        ours = [b"started", self.worker.encode()]
        return [lease is not None and job == ours for lease, job in zip(answers[::2], answers[1::2], strict=True)]

    def mark_alone(self, seat: Seat) -> None:
        """From now on a death of this process is the job's."""

        def mark(pipe: Pipeline) -> None:
            exists = pipe.exists(seat.job.key)
            pipe.multi()
            if exists:
                pipe.hset(seat.job.key, "alone", seat.execution.id)

        atomically(self.connection, mark, seat.job.key)

    def end(self, seat: Seat, status: str, meta: dict[str, Any], keep: int, outcome: str) -> bool:
        """Give the job its end. False if it is no longer ours."""
        seat.job.ended_at = datetime.fromtimestamp(self.clock.time(), UTC)  # RQ writes it once more
        ended_at = utcformat(seat.job.ended_at)
        job, lease = seat.job, seat.execution.composite_key
        keys = [seat.leases, job.key, events.stream(job.id), seat.queue.failed_job_registry.key]
        arguments = [lease, self.worker, status, ended_at, json.dumps(meta), keep, outcome, job.id]
        return bool(self._end(keys, arguments))

    def give_back(self, seat: Seat, why: Why) -> str:
        """Queue it again, in front. Returns `queued`, `failed` after too many deaths, or `gone` if it was not ours."""
        return self._let_go(seat.queue, seat.execution, self.worker, why, cast(int, seat.job.failure_ttl))

    def run_out(self, queue: Queue) -> list[Execution]:
        """The executions whose leases nobody renewed."""
        entries = self.connection.zrangebyscore(queue.started_job_registry.key, 0, self.clock.time())
        return [Execution.from_composite_key(entry.decode(), self.connection) for entry in cast(list[bytes], entries)]

    def take_away(self, queue: Queue, execution: Execution, keep: int) -> str:
        """From a worker that let its lease run out: `queued`, `failed`, `held` if renewed just now, or `gone`."""
        return self._let_go(queue, execution, "", "died", keep)

    def _let_go(self, queue: Queue, execution: Execution, worker: str, why: Why, keep: int) -> str:
        id = parse_composite_key(execution.composite_key)[0]
        failed = queue.failed_job_registry.key
        keys = [queue.started_job_registry.key, Job.key_for(id), events.stream(id), queue.key, failed]
        ended_at = moment(self.clock.time())
        detail = f"its worker process ended while it drew nothing else, {self.deaths_allowed} times"
        failure = json.dumps({"error": {"type": "worker-died", "detail": detail}})
        lease = execution.composite_key
        arguments = [lease, worker, execution.id, why, self.deaths_allowed, ended_at, failure, keep, id]
        return cast(bytes, self._release(keys, arguments)).decode()


def model_of(queue: Queue) -> str:
    return queue.name.rpartition(".")[0]
