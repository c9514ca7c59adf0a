"""The table at the end, and the history of whatever went wrong."""

import json
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tests.chaos.audit import Audit, Verdict
from tests.chaos.clients import Ledger
from tests.chaos.faults import Havoc
from tests.chaos.system import System

LONGEST_HISTORY = 60  # lines
SHOWN = 10  # offenders


@dataclass
class Run:
    """All that a run has left."""

    system: System
    ledger: Ledger
    havoc: Havoc
    audit: Audit
    unavailable: float
    seconds: float

    @property
    def failed(self) -> bool:
        return bool(self.audit.offenders or self.audit.left or self.ledger.wrong_answers)


def rows(run: Run) -> Iterator[tuple[str, object]]:
    audit, ledger, system, dealt = run.audit, run.ledger, run.system, run.havoc.counts
    generations = [verdict.generation for verdict in audit.verdicts]
    statuses = audit.statuses
    yield "jobs accepted", len(audit.verdicts)
    yield "refused (no Idempotency-Key, or gave up)", ledger.counts["refused"]
    yield "succeeded", statuses["succeeded"]
    yield "failed, with reason", reasons(generations) or 0
    yield "canceled", statuses["canceled"]
    yield "expired", statuses["expired"]
    yield "[bold]lost", len(audit.wrong("lost"))
    yield "[bold]finished twice", len(audit.wrong("finished twice")) + len(audit.wrong("submitted twice"))
    yield "[bold]wrong bytes", len(audit.wrong("wrong bytes"))
    yield "[bold]otherwise wrong", len([v for v in audit.offenders if not counted(v)]) + len(ledger.wrong_answers)
    yield "left over in Redis, or as a process", ", ".join(audit.left) or 0
    yield "faults", run.havoc.total
    for name in sorted(dealt):
        yield f"  {name}", dealt[name]
    for command in ("worker", "api"):
        ends = {code: count for (what, code), count in sorted(system.exits.items()) if what == command}
        yield f"{command} processes that ended, by exit status", ", ".join(f"{c}: {n}" for c, n in ends.items()) or 0
    yield "restarts", ", ".join(f"{name} {count}" for name, count in sorted(system.restarts.items()))
    yield "steps resumed instead of repeated", steps_resumed(generations)
    yield "attempts beyond the first", sum(max(0, g.get("attempts", 0) - 1) for g in generations)
    yield "longest time without any API that reaches Redis and the disk, s", round(run.unavailable, 1)
    yield "longest until a client had its 202, s", round(ledger.longest_submit, 1)
    if len(ledger.latencies) > 1:
        centiles = statistics.quantiles(ledger.latencies, n=100)
        yield "GETs answered: p50, p99, ms", f"{1000 * centiles[49]:.0f}, {1000 * centiles[98]:.0f}"
    trouble = {name: count for name, count in sorted(ledger.counts.items()) if name != "refused"}
    yield "answers that were none", ", ".join(f"{name}: {count}" for name, count in trouble.items()) or 0
    yield "a worker's clock 5 minutes ahead", "yes" if system.clock else "left out: libfaketime is not installed"
    yield "a disk that can be full", "yes" if system.disk else "left out: no right to mount a tmpfs"
    yield "seconds", round(run.seconds)


def counted(verdict: Verdict) -> bool:
    return any(text.startswith(("lost", "finished twice", "submitted twice", "wrong bytes")) for text in verdict.wrong)


def reasons(generations: list[dict]) -> str:
    failed = Counter((g.get("error") or {}).get("type") for g in generations if g.get("status") == "failed")
    return ", ".join(f"{reason}: {count}" for reason, count in failed.items())


def steps_resumed(generations: list[dict]) -> object:
    if not any("resumed_at_step" in generation for generation in generations):
        return "n/a"
    return sum(generation.get("resumed_at_step") or 0 for generation in generations)


def show(run: Run, console: Console) -> None:
    table = Table("chaos", "", title_justify="left")
    for name, value in rows(run):
        table.add_row(name, str(value))
    console.print(table)
    for answer in run.ledger.wrong_answers[:SHOWN]:
        console.print(f"a wrong answer: {answer}", markup=False)
    for verdict in run.audit.offenders[:SHOWN]:
        for line in history(run.system, verdict):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if more := run.audit.offenders[SHOWN:]:
        console.print("and", *(verdict.job.id for verdict in more))


def history(system: System, verdict: Verdict) -> Iterator[str]:
    yield f"\n{verdict.job.id}: {'; '.join(verdict.wrong)}"
    order = verdict.job.order
    yield f"  order {order.number}, {order.manner}, {order.picture}, {order.body.get('metadata', '')}"
    shown = {k: verdict.generation.get(k) for k in ("status", "attempts", "resumed_at_step", "error", "timings")}
    yield f"  {json.dumps(shown)}; RQ's results: {verdict.results}"
    lines = [f"  {e.id} {e.name} {json.dumps(e.data)}" for e in verdict.events if e.name != "progress"]
    lines += [f"  {line}" for line in system.history(verdict.job.id)]
    yield from lines[:LONGEST_HISTORY]
