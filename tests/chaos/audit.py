"""Afterwards: what became of every job that a client was told of, and whether that is what was promised."""

import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rq.job import Job as RqJob
from rq.results import Result
from rq.serializers import JSONSerializer

from app.events import ENDED, Event, parse, stream
from tests.chaos.clients import Client, Job, Ledger
from tests.chaos.system import LEASE, System

EXPLAINED = {  # reasons for a failure that a fault has given
    "not-stored",  # the disk was full each time
    "worker-died",  # it was alone with its worker each time that one was killed
}
DONE_IN = 90.0  # seconds until all that was accepted has ended, once nothing is amiss any more


@dataclass
class Verdict:
    """Of one job."""

    job: Job
    generation: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    results: list[str] = field(default_factory=list)  # RQ's
    wrong: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        return self.generation.get("status", "lost")

    @property
    def endings(self) -> list[str]:
        return [event.name for event in self.events if event.name in ENDED]


@dataclass
class Audit:
    verdicts: list[Verdict]
    left: list[str]  # in Redis, and later of processes

    @property
    def statuses(self) -> Counter[str]:
        return Counter(verdict.status for verdict in self.verdicts)

    def wrong(self, kind: str) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if any(text.startswith(kind) for text in verdict.wrong)]

    @property
    def offenders(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.wrong]


def audit(system: System, ledger: Ledger) -> Audit:
    """When nothing is amiss any more."""
    jobs = list(ledger.jobs.values())
    deadline = time.monotonic() + DONE_IN
    with ThreadPoolExecutor(4) as clerks:
        verdicts = list(clerks.map(lambda job: judge(system, ledger, job, deadline), jobs))
    while (left := system.left_in_redis()) and time.monotonic() < deadline + 3 * LEASE:
        time.sleep(0.5)
    return Audit(verdicts, [f"{key}: {count}" for key, count in left.items()])


def judge(system: System, ledger: Ledger, job: Job, deadline: float) -> Verdict:
    client = Client(system, ledger, random.Random(job.id))
    seen = set(job.seen)
    verdict = Verdict(job)
    while True:
        verdict.generation = client.look(job) or verdict.generation
        if verdict.status in ENDED or time.monotonic() > deadline:
            break
        time.sleep(0.3)
    rq = RqJob(job.id, connection=system.redis, serializer=JSONSerializer)
    verdict.results = [Result.Type(result.type).name for result in Result.all(rq, serializer=JSONSerializer)]
    verdict.events = parse(system.redis.xrange(stream(job.id)))
    if verdict.status == "succeeded":
        while not client.check_images(job, verdict.generation) and time.monotonic() < deadline:
            time.sleep(0.3)
    verdict.wrong = [*dict.fromkeys(job.complaints), *faults_of(verdict, seen)]
    return verdict


def faults_of(verdict: Verdict, seen: set[str]) -> list[str]:
    """What is wrong with an end, if anything."""
    status, wrong = verdict.status, list[str]()
    if status not in ENDED:
        return [f"lost: {status}"]
    if seen - {status}:
        wrong.append(f"finished twice: {status}, and its client had seen {seen}")
    if len(verdict.endings) > 1 or len([name for name in verdict.results if name != "RETRIED"]) > 1:
        wrong.append(f"finished twice: events {verdict.endings}, results {verdict.results}")
    if verdict.endings[-1:] != [status]:
        wrong.append(f"ended, and its stream says {verdict.endings}")
    poison = "poison" in verdict.job.order.body.get("metadata", {})
    reason = (verdict.generation.get("error") or {}).get("type")
    if poison and status == "succeeded":
        wrong.append("poison, and it succeeded")
    if status == "failed" and reason not in EXPLAINED:
        wrong.append(f"failed for no reason of ours: {verdict.generation['error']}")
    if status in ("canceled", "expired") and verdict.job.order.manner not in ("cancel", "expire"):
        wrong.append(f"{status}, and nobody asked for it")
    return wrong
