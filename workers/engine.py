"""Step-level continuous batching: programs in, pictures out. Knows nothing of diffusion.

Each `step()` runs one forward pass, for the calls that `workers/policy.py` says. Programs therefore come and go between
any two passes, and none waits for a whole batch to end.

A GPU need not wait for us either: a pass is launched, its programs go on to their next calls while it still runs, and
only then the engine waits, for the pass before.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import structlog
import torch
from torch import Tensor

from app import metrics
from models.program import Call, Net, Program
from workers.outcomes import OutOfMemory
from workers.passes import Columns, Eager, Placed, Runner, Stopwatch, scatter, take_apart
from workers.policy import Policy, fitting, worthwhile

log = structlog.get_logger()

NARROW_FOR = 60.0  # seconds: what else fills the device comes and goes in minutes, and trying costs a pass
NO_MEMORY = (  # what is no torch.OutOfMemoryError, and means it: allocators of the CPU, of CUDA's runtime, of cuBLAS
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class Canceled(Exception):
    """The ticket's program was closed before its end."""


@dataclass(eq=False)
class Ticket:
    """A program under way. `seat`, set in the exact lane, says which rows of a reproducible pass it always gets.

    `past` holds what its nets returned before, by the number of the call: those are not called again.
    """

    program: Program
    seat: int | None = None
    account: str = ""  # whose device time it takes
    rank: int = 0
    past: Mapping[int, Any] = field(default_factory=dict[int, Any], repr=False)
    call: Call | None = None  # what it waits for; none once it is done
    calls: int = 0  # made so far, the one it waits for included
    replayed: int = 0  # of these, answered from the past
    resumed_at: int = 0  # the step at which they came to an end
    at: tuple[int, int] | None = None  # the last denoising step begun, of how many
    stage: str = ""  # that this step belongs to
    estimate: Callable[[], Tensor | None] | None = None  # what its picture looks like so far
    result: Tensor | None = None
    error: Exception | None = None
    done: bool = False
    number: int = field(default_factory=count().__next__)

    def end(self, result: Tensor | None = None, error: Exception | None = None) -> None:
        self.done, self.result, self.error, self.call, self.estimate = True, result, error, None, None


@dataclass(eq=False, slots=True)
class Waiting:
    """A ticket's next call."""

    ticket: Ticket
    call: Call
    columns: Columns

    @property
    def key(self) -> tuple[Any, ...]:
        return self.columns.key

    @property
    def rows(self) -> int:
        return self.call.rows

    @property
    def number(self) -> int:
        return self.ticket.number

    @property
    def account(self) -> str:
        return self.ticket.account

    @property
    def rank(self) -> int:
        return self.ticket.rank

    @property
    def left(self) -> int:
        done, steps = self.ticket.at or (0, 0)
        return self.rows * (steps - done)


@dataclass(slots=True)
class Seating:
    """The calls that share a pass of so many rows, and the first row of each."""

    places: dict[Waiting, int]
    rows: int

    @property
    def net(self) -> Net:
        return next(iter(self.places)).call.net

    @property
    def parts(self) -> list[slice]:
        return [slice(at, at + waiting.rows) for waiting, at in self.places.items()]


@dataclass(slots=True)
class Pass:
    """What one forward pass did: for the curve, the metrics and the log."""

    net: Net
    calls: int
    rows: int
    padded: int
    seconds: float
    tickets: Sequence[Ticket] = field(default=(), repr=False)


@dataclass(slots=True)
class Launched:
    """A pass that the device may still be at."""

    seating: Seating
    took: Stopwatch


class Engine:
    """Args:
    observe: is told of each pass.
    note: is given what each call of a `journaled` net returned, before its program is.
    runner: how a pass is run.
    """

    def __init__(
        self,
        observe: Callable[[Pass], None] = lambda _: None,
        note: Callable[[Ticket, Any], None] = lambda *_: None,
        policy: Policy | None = None,
        runner: Runner | None = None,
    ):
        self.policy, self.runner = policy or Policy(), runner or Eager()
        self.waiting: list[Waiting] = []  # in the order in which the calls came in
        self.observe, self.note = observe, note
        self.under_way: list[Launched] = []
        self.narrow = WeakKeyDictionary[Net, tuple[float, int]]()  # until when, and how many rows

    def __bool__(self) -> bool:
        return bool(self.waiting or self.under_way)

    def width(self, net: Net) -> int:
        """Rows that a pass of the net may have at present: fewer for a while after it ran out of memory."""
        until, rows = self.narrow.get(net, (0.0, net.width))
        return min(rows, net.width) if time.monotonic() < until else net.width

    def worthwhile_width(self, net: Net) -> int:
        """Rows that its next pass should have."""
        width = self.width(net)
        to_be_had = {rows: seconds for rows, seconds in net.seconds.items() if rows <= width}
        waiting = sum(one.rows for one in self.waiting if one.call.net is net)
        return worthwhile(to_be_had, waiting) if to_be_had else width

    def submit(
        self,
        program: Program,
        seat: int | None = None,
        past: Mapping[int, Any] | None = None,
        account: str = "",
        rank: int = 0,
    ) -> Ticket:
        """Run a program to its first call, or past those that `past` answers.

        What it raises there is the ticket's outcome, as later.
        """
        ticket = Ticket(program, seat, account, rank, past or {})
        self._resume(ticket, None)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Close a program: its rows are free for the next pass."""
        if not ticket.done:
            self.waiting = [waiting for waiting in self.waiting if waiting.ticket is not ticket]
            ticket.end(error=Canceled())
            close(ticket.program)

    def step(self) -> list[Ticket]:
        """One forward pass, or the end of the last. Returns the tickets that are done with it."""
        before, self.under_way = self.under_way, []
        if not self.waiting:
            self._catch_up(before)
            return []
        seating = together(self.policy.turn(self.waiting), self.worthwhile_width)
        self.waiting = [waiting for waiting in self.waiting if waiting not in seating.places]
        for waiting, outcome in self._run(seating):
            if waiting.call.net.journaled and not isinstance(outcome, Exception):
                self.note(waiting.ticket, outcome)
            self._resume(waiting.ticket, outcome)
        self._catch_up(before)
        if not self.runner.asynchronous:
            self._catch_up(self.under_way)
            self.under_way = []
        return [waiting.ticket for waiting in seating.places if waiting.ticket.done]

    def _catch_up(self, passes: Sequence[Launched]) -> None:
        """Wait for their ends: beats, cancels and timings mean what they say, but for the pass that is under way."""
        for one in passes:
            seconds, calls = one.took.seconds(), one.seating.places
            self.policy.charge(next(iter(calls)).account, seconds)
            used, tickets = sum(waiting.rows for waiting in calls), [waiting.ticket for waiting in calls]
            self.observe(Pass(one.seating.net, len(tickets), used, one.seating.rows, seconds, tickets))

    def _run(self, seating: Seating) -> list[tuple[Waiting, Any]]:
        """Outcomes of one pass. A failing pass is halved until the culprit is alone: it never hurts its neighbours."""
        try:
            took, outcomes = self._launch(seating)
        except Exception as error:
            calls = len(seating.places)
            log.warning("pass_failed", net=seating.net.name, calls=calls, rows=seating.rows, error=repr(error))
            failure = OutOfMemory(what_it_needed(seating, error)) if ran_out(error) else error
        else:
            self.under_way.append(Launched(seating, took))
            return list(zip(seating.places, outcomes, strict=True))
        if isinstance(failure, OutOfMemory):  # out of `except`, whose traceback holds what the pass had allocated
            self._make_room(seating)
        if len(seating.places) == 1:
            return [(waiting, failure) for waiting in seating.places]
        return [pair for half in halves(seating) for pair in self._run(half)]

    def _launch(self, seating: Seating) -> tuple[Stopwatch, list[Any]]:
        """For each seated call, its own rows of what the net returns."""
        seats = sorted(seating.places.items(), key=lambda item: item[1])
        placed = [Placed(waiting.columns, at, waiting.rows) for waiting, at in seats]
        took = self.runner.stopwatch()
        output = self.runner.run(seating.net, placed, seating.rows)
        took.stop()
        return took, scatter(output, seating.rows, seating.parts)

    def _make_room(self, seating: Seating) -> None:
        """Narrower passes for a while. One call that does not fit is no reason: nothing narrower would let it in."""
        net = seating.net
        metrics.OUT_OF_MEMORY.labels(net.name).inc()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # pieces that fit nobody
        if len(seating.places) > 1:
            smaller = max((bucket for bucket in net.buckets if bucket < seating.rows), default=seating.rows // 2)
            self.narrow[net] = time.monotonic() + NARROW_FOR, min(self.width(net), smaller)
        log.warning("out_of_memory", net=net.name, rows=seating.rows, width=self.width(net))

    def _resume(self, ticket: Ticket, outcome: Any) -> None:
        """Hand a program its rows, or what went wrong with them, and remember what it wants next."""
        try:
            with torch.no_grad():
                program = ticket.program
                call = program.throw(outcome) if isinstance(outcome, Exception) else program.send(outcome)
                ticket.calls += 1
                while ticket.calls in ticket.past and call.net.journaled:
                    call = program.send(ticket.past[ticket.calls])
                    ticket.calls += 1
                    ticket.replayed += 1
                    ticket.resumed_at = call.at[0] if call.at else 0
            columns = take_apart(call)
        except StopIteration as end:
            ticket.end(result=end.value)
        except Exception as error:
            ticket.end(error=error)
            close(ticket.program)
        else:
            ticket.call = call
            ticket.at, ticket.stage = call.at or ticket.at, call.stage
            ticket.estimate = call.estimate or ticket.estimate
            self.waiting.append(Waiting(ticket, call, columns))


def close(program: Program) -> None:
    """Let a program clean up. What it raises then is nobody's outcome any more."""
    with suppress(Exception), torch.no_grad():  # a stock pipeline leaves its own no_grad in here
        program.close()


# -- who shares a pass, and which rows


def together(alike: Sequence[Waiting], width: Callable[[Net], int]) -> Seating:
    """The pass that the first of them gets, with all others that fit in."""
    first = alike[0]
    if first.ticket.seat is None:
        return packed(fitting([one for one in alike if one.ticket.seat is None], width(first.call.net)))
    rows = first.call.net.reproducible_rows
    if rows is None or first.call.rows > rows:
        return Seating({first: 0}, first.call.rows)
    return seated([one for one in alike if one.rows <= rows], rows)  # a wider one will lead a pass of its own


def packed(calls: Sequence[Waiting]) -> Seating:
    """Back to back, padded to the net's next bucket."""
    places, used = dict.fromkeys(calls, 0), 0
    for waiting in sorted(calls, key=lambda one: one.ticket.number):  # the same rows as in the pass before
        places[waiting] = used
        used += waiting.rows
    return Seating(places, next((bucket for bucket in calls[0].call.net.buckets if bucket >= used), used))


def seated(alike: Sequence[Waiting], rows: int) -> Seating:
    """The exact lane: a pass of the one size in which exact calls sit where they always sit.

    If its seat is taken, a call waits for the next pass. Default-lane calls fill the gaps, for what a neighbour holds
    changes nothing.
    """
    free, places = [True] * rows, dict[Waiting, int]()

    def sit(waiting: Waiting, at: int) -> bool:
        taken = slice(at, at + waiting.call.rows)
        if fits := all(free[taken]):
            free[taken] = [False] * waiting.call.rows
            places[waiting] = at
        return fits

    for waiting in alike:
        if waiting.ticket.seat is not None:
            sit(waiting, waiting.ticket.seat % (rows // waiting.call.rows) * waiting.call.rows)
    for waiting in alike:
        if waiting.ticket.seat is None:
            any(sit(waiting, at) for at in range(rows - waiting.call.rows + 1))
    return Seating(places, rows)


def halves(seating: Seating) -> Iterator[Seating]:
    """Two smaller passes; whoever shares one with an exact call keeps its place, for that call's sake."""
    calls = list(seating.places)
    for half in (calls[: len(calls) // 2], calls[len(calls) // 2 :]):
        if all(waiting.ticket.seat is None for waiting in half):
            yield packed(half)
        else:
            yield Seating({waiting: seating.places[waiting] for waiting in half}, seating.rows)


# -- out of memory


def ran_out(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    )


def what_it_needed(seating: Seating, error: Exception) -> str:
    """For whoever asked for it; the allocator says how much it was asked for, among much else."""
    shapes = [column.shape[1:] for one in seating.places for column in one.columns.batched]
    largest = max(shapes, key=torch.Size.numel, default=())
    said = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
    words = said[0] if said else str(error).partition("\n")[0]
    size = "×".join(map(str, largest))
    return f"{seating.net.name} does not fit into memory with {seating.rows} rows of {size}: {words}"
