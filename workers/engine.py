"""Step-level continuous batching: programs in, pictures out. Knows nothing of diffusion.

Each `step()` runs one forward pass, for the calls that `workers/policy.py` says. Programs therefore come and go between
any two passes, and none waits for a whole batch to end.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import structlog
import torch
from torch import Tensor
from torch.utils import _pytree as torch_pytree  # knows tuples, dicts, and the outputs of diffusers and transformers

from app import metrics
from models.program import Call, Net, Program
from workers.outcomes import OutOfMemory
from workers.policy import Policy, fitting

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
    estimate: Tensor | None = None
    result: Tensor | None = None
    error: Exception | None = None
    done: bool = False

    def end(self, result: Tensor | None = None, error: Exception | None = None) -> None:
        self.done, self.result, self.error, self.call = True, result, error, None


@dataclass(slots=True)
class Columns:
    """A call's arguments, taken apart: what is batched row by row, and what must be equal to share a pass."""

    key: tuple[Any, ...]
    batched: list[Tensor]
    trees: dict[str, tuple[list[Any], Any]]  # of each argument: leaves and structure; `BATCHED` where a column goes

    def arguments(self, columns: Iterable[Tensor]) -> dict[str, Any]:
        """The call's arguments with other columns in the places of its own."""
        fresh = iter(columns)
        return {
            name: torch_pytree.tree_unflatten([next(fresh) if leaf is BATCHED else leaf for leaf in leaves], spec)
            for name, (leaves, spec) in self.trees.items()
        }


BATCHED = object()
ONE_LEAF = torch_pytree.tree_structure(torch.empty(0))


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


@dataclass(slots=True)
class Pass:
    """What one forward pass did: for the curve, the metrics and the log."""

    net: Net
    calls: int
    rows: int
    padded: int
    seconds: float
    tickets: Sequence[Ticket] = field(default=(), repr=False)


class Engine:
    """Args:
    observe: is told of each pass.
    note: is given what each call of a `journaled` net returned, before its program is.
    """

    def __init__(
        self,
        observe: Callable[[Pass], None] = lambda _: None,
        note: Callable[[Ticket, Any], None] = lambda *_: None,
        policy: Policy | None = None,
    ):
        self.policy = policy or Policy()
        self.waiting: list[Waiting] = []  # in the order in which the calls came in
        self.observe, self.note = observe, note
        self.narrow = WeakKeyDictionary[Net, tuple[float, int]]()  # until when, and how many rows

    def __bool__(self) -> bool:
        return bool(self.waiting)

    def width(self, net: Net) -> int:
        """Rows that a pass of the net may have at present: fewer for a while after it ran out of memory."""
        until, rows = self.narrow.get(net, (0.0, net.width))
        return min(rows, net.width) if time.monotonic() < until else net.width

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
        """One forward pass. Returns the tickets that are done with it."""
        if not self.waiting:
            return []
        seating = together(self.policy.turn(self.waiting), self.width)
        self.waiting = [waiting for waiting in self.waiting if waiting not in seating.places]
        began = time.perf_counter()
        outcomes = self._run(seating)
        self.policy.charge(next(iter(seating.places)).account, time.perf_counter() - began)
        for waiting, outcome in outcomes:
            if waiting.call.net.journaled and not isinstance(outcome, Exception):
                self.note(waiting.ticket, outcome)
            self._resume(waiting.ticket, outcome)
        return [waiting.ticket for waiting in seating.places if waiting.ticket.done]

    def _run(self, seating: Seating) -> list[tuple[Waiting, Any]]:
        """Outcomes of one pass. A failing pass is halved until the culprit is alone: it never hurts its neighbours."""
        began = time.perf_counter()
        try:
            outcomes = run(seating)
        except Exception as error:
            calls = len(seating.places)
            log.warning("pass_failed", net=seating.net.name, calls=calls, rows=seating.rows, error=repr(error))
            failure = OutOfMemory(what_it_needed(seating, error)) if ran_out(error) else error
        else:
            used = sum(waiting.call.rows for waiting in seating.places)
            tickets = [waiting.ticket for waiting in seating.places]
            self.observe(Pass(seating.net, len(tickets), used, seating.rows, time.perf_counter() - began, tickets))
            return list(zip(seating.places, outcomes, strict=True))
        if isinstance(failure, OutOfMemory):  # out of `except`, whose traceback holds what the pass had allocated
            self._make_room(seating)
        if len(seating.places) == 1:
            return [(waiting, failure) for waiting in seating.places]
        return [pair for half in halves(seating) for pair in self._run(half)]

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
            ticket.estimate = call.estimate if call.estimate is not None else ticket.estimate
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
    places, used = dict[Waiting, int](), 0
    for waiting in calls:
        places[waiting] = used
        used += waiting.call.rows
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


# -- collate, run, scatter


def take_apart(call: Call) -> Columns:
    """Sort a call's arguments into batched columns and what must be equal by content.

    Raises:
        TypeError: an argument can be neither batched nor compared.
    """
    rows, shared = call.rows, call.net.shared
    key, batched, trees = list[Any]([call.net]), list[Tensor](), dict[str, Any]()
    for name, value in call.args.items():
        leaves: list[Any] = [value]
        spec = ONE_LEAF
        if not isinstance(value, Tensor):
            leaves, spec = torch_pytree.tree_flatten(value)
        key += name, spec
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and name not in shared and (leaf.ndim == 0 or leaf.shape[0] == rows):
                column = leaf if leaf.ndim else leaf.expand(rows)
                batched.append(column)
                leaves[i] = BATCHED
                key.append((column.shape[1:], column.dtype, column.device))
            else:
                key.append(content(name, leaf))
        trees[name] = leaves, spec
    return Columns(tuple(key), batched, trees)


def content(name: str, leaf: Any) -> Any:
    """Something hashable that is equal just when the argument is; a shortened repr would merge strangers."""
    if isinstance(leaf, Tensor):
        flat = leaf.detach().cpu().contiguous().reshape(-1)
        return leaf.dtype, leaf.shape, leaf.device, flat.view(torch.uint8).numpy().tobytes()
    if isinstance(leaf, float):
        return float, leaf.hex()  # 0.0 == -0.0, and not a number is not even equal to itself
    if leaf is None or isinstance(leaf, bool | int | str | torch.dtype | torch.device):
        return type(leaf), leaf
    raise TypeError(f"argument {name!r} is a {type(leaf).__name__}: neither rows nor something to compare")


def run(seating: Seating) -> list[Any]:
    """One call of the net on so many rows; for each seated call, its own rows of what the net returns.

    Empty rows are zeros: whatever a net is told about other rows (an index, a mask), zero is a safe thing to be told.
    """
    placed = sorted(seating.places.items(), key=lambda item: item[1])
    first, _ = placed[0]
    columns = [column_of(placed, k, seating.rows) for k in range(len(first.columns.batched))]
    with torch.no_grad():
        output = seating.net.run(**first.columns.arguments(columns))
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a step is over when its rows are there: beats, cancels, timings mean what they say
    return scatter(output, seating.rows, [slice(at, at + one.call.rows) for one, at in seating.places.items()])


def column_of(placed: Sequence[tuple[Waiting, int]], k: int, rows: int) -> Tensor:
    """The k-th batched argument of all calls, in one tensor of so many rows."""
    parts, at = list[Tensor](), 0
    for waiting, place in placed:
        column = waiting.columns.batched[k]
        if place > at:
            parts.append(column.new_zeros(place - at, *column.shape[1:]))
        parts.append(column)
        at = place + waiting.call.rows
    if rows > at:
        parts.append(parts[-1].new_zeros(rows - at, *parts[-1].shape[1:]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def scatter(output: Any, rows: int, parts: Sequence[slice]) -> list[Any]:
    """Each part's rows of every tensor in `output`."""
    leaves, spec = torch_pytree.tree_flatten(output)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and (leaf.ndim == 0 or leaf.shape[0] != rows):
            raise TypeError(f"a net returned a tensor of shape {tuple(leaf.shape)} for {rows} rows")
    return [
        torch_pytree.tree_unflatten([leaf[part] if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        for part in parts
    ]
