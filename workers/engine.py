"""Step-level continuous batching: programs in, pictures out. Knows nothing of diffusion.

Each `step()` runs one forward pass: the call that has waited longest and every other that may share its pass. Programs
therefore come and go between any two passes, and none waits for a whole batch to end.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as torch_pytree  # knows tuples, dicts, and the outputs of diffusers and transformers

from models.program import Call, Net, Program


class Canceled(Exception):
    """The ticket's program was closed before its end."""


@dataclass(eq=False)
class Ticket:
    """A program under way. `seat` is set in the exact lane: which rows of its net's reproducible pass it always gets."""

    program: Program
    seat: int | None = None
    call: Call | None = None
    columns: "Columns | None" = None
    at: tuple[int, int] | None = None  # the last denoising step begun, of how many
    estimate: Tensor | None = None
    result: Tensor | None = None
    error: Exception | None = None
    done: bool = False


@dataclass(slots=True)
class Columns:
    """A call's arguments, taken apart: what is batched row by row, and what must be equal to share a pass."""

    key: tuple[Any, ...]
    batched: list[Tensor]
    leaves: list[Any]  # the batched ones hold their place by `BATCHED`
    spec: Any


BATCHED = object()


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
    def __init__(self, observe: Callable[[Pass], None] = lambda _: None):
        self.waiting: deque[Ticket] = deque()  # in the order in which their calls came in
        self.observe = observe

    def __bool__(self) -> bool:
        return bool(self.waiting)

    def submit(self, program: Program, seat: int | None = None) -> Ticket:
        """Run a program to its first call. What it raises there is the ticket's outcome, as later."""
        ticket = Ticket(program, seat)
        self._resume(ticket, None)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Close a program: its rows are free for the next pass."""
        if not ticket.done:
            ticket.program.close()
            ticket.done, ticket.error = True, Canceled()
            self.waiting.remove(ticket)

    def step(self) -> list[Ticket]:
        """One forward pass. Returns the tickets that are done with it."""
        if not self.waiting:
            return []
        tickets = self._share_a_pass()
        for ticket in tickets:
            self.waiting.remove(ticket)
        for ticket, outcome in self._run(tickets):
            self._resume(ticket, outcome)
        return [ticket for ticket in tickets if ticket.done]

    # -- who

    def _share_a_pass(self) -> list[Ticket]:
        first = self.waiting[0]
        alike = [t for t in self.waiting if t.columns.key == first.columns.key]
        if first.seat is None:
            return dense(alike, first.call.net.width)
        if first.call.net.reproducible_rows is None or first.call.rows > first.call.net.reproducible_rows:
            return [first]
        return list(seated(alike, first.call.net.reproducible_rows))

    # -- how

    def _run(self, tickets: list[Ticket]) -> list[tuple[Ticket, Any]]:
        """Outcomes of one pass. A failing pass is halved until the culprit is alone: it never hurts its neighbours."""
        net = tickets[0].call.net
        began = time.perf_counter()
        try:
            rows, outcomes = exact_pass(tickets) if tickets[0].seat is not None else dense_pass(tickets)
        except Exception as error:
            if len(tickets) == 1:
                return [(tickets[0], error)]
            half = len(tickets) // 2
            return self._run(tickets[:half]) + self._run(tickets[half:])
        used = sum(t.call.rows for t in tickets)
        self.observe(Pass(net, len(tickets), used, rows, time.perf_counter() - began, tickets))
        return list(zip(tickets, outcomes, strict=True))

    def _resume(self, ticket: Ticket, outcome: Any) -> None:
        """Hand a program its rows, or what went wrong with them, and note what it wants next."""
        try:
            with torch.no_grad():
                if isinstance(outcome, Exception):
                    ticket.call = ticket.program.throw(outcome)
                else:
                    ticket.call = ticket.program.send(outcome)
            ticket.columns = take_apart(ticket.call)
        except StopIteration as end:
            ticket.done, ticket.result, ticket.call = True, end.value, None
        except Exception as error:
            with suppress(Exception):
                ticket.program.close()
            ticket.done, ticket.error, ticket.call = True, error, None
        else:
            ticket.at = ticket.call.at or ticket.at
            ticket.estimate = ticket.call.estimate if ticket.call.estimate is not None else ticket.estimate
            self.waiting.append(ticket)


# -- which rows


def dense(alike: list[Ticket], width: int) -> list[Ticket]:
    """The default lane: as many as fit, in order; at least the first."""
    chosen, rows = [], 0
    for ticket in alike:
        if ticket.seat is None and (not chosen or rows + ticket.call.rows <= width):
            chosen.append(ticket)
            rows += ticket.call.rows
    return chosen


def seated(alike: list[Ticket], rows: int) -> dict[Ticket, int]:
    """The exact lane: {ticket: its first row}. Exact calls sit where they always sit, or wait for the next pass if the
    seat is taken; default-lane calls fill the gaps, for what a neighbour holds changes nothing."""
    free, places = [True] * rows, dict[Ticket, int]()

    def sit(ticket: Ticket, at: int) -> None:
        taken = slice(at, at + ticket.call.rows)
        if all(free[taken]):
            free[taken] = [False] * ticket.call.rows
            places[ticket] = at

    for ticket in alike:
        if ticket.seat is not None:
            sit(ticket, ticket.seat % (rows // ticket.call.rows) * ticket.call.rows)
    for ticket in alike:
        if ticket.seat is None:
            gaps = (at for at in range(rows - ticket.call.rows + 1) if all(free[at : at + ticket.call.rows]))
            if (gap := next(gaps, None)) is not None:
                sit(ticket, gap)
    return places


# -- collate, run, scatter


def take_apart(call: Call) -> Columns:
    """Sort a call's arguments into batched columns and what must be equal by content.

    Raises:
        TypeError: an argument can be neither batched nor compared.
    """
    net, rows = call.net, call.rows
    leaves, spec = torch_pytree.tree_flatten(call.args)
    names = [name for name, value in call.args.items() for _ in torch_pytree.tree_leaves(value)]
    batched, places, key = [], [], list[Any]()
    for name, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, Tensor) and name not in net.shared and (leaf.ndim == 0 or leaf.shape[0] == rows):
            column = leaf.expand(rows) if leaf.ndim == 0 else leaf
            batched.append(column)
            places.append(BATCHED)
            key.append((tuple(column.shape[1:]), column.dtype))
        else:
            places.append(leaf)
            key.append(content(name, leaf))
    return Columns((id(net), str(spec), tuple(key)), batched, places, spec)


def content(name: str, leaf: Any) -> Any:
    """Something hashable that is equal just when the argument is: never a shortened repr, which would merge strangers."""
    if isinstance(leaf, Tensor):
        return leaf.dtype, tuple(leaf.shape), leaf.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    if leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype | torch.device):
        return type(leaf), leaf
    raise TypeError(f"argument {name!r} is a {type(leaf).__name__}: neither rows nor something to compare")


def dense_pass(tickets: Sequence[Ticket]) -> tuple[int, list[Any]]:
    """Rows back to back, padded to the next bucket."""
    net, used = tickets[0].call.net, sum(t.call.rows for t in tickets)
    rows = next((bucket for bucket in net.buckets if bucket >= used), used)
    places, at = [], 0
    for ticket in tickets:
        places.append(at)
        at += ticket.call.rows
    return rows, run(tickets, places, rows)


def exact_pass(tickets: Sequence[Ticket]) -> tuple[int, list[Any]]:
    """Rows at their seats in a pass of the one size; alone and unpadded where the net has no such size."""
    rows = tickets[0].call.net.reproducible_rows
    if rows is None or tickets[0].call.rows > rows:
        return tickets[0].call.rows, run(tickets, [0], tickets[0].call.rows)
    places = seated(list(tickets), rows)
    return rows, run(tickets, [places[ticket] for ticket in tickets], rows)


def run(tickets: Sequence[Ticket], places: Sequence[int], rows: int) -> list[Any]:
    """One call of the net on `rows` rows; each ticket's own rows of what it returns. Empty rows repeat the first ticket's."""
    first = tickets[0]
    order = sorted(zip(places, tickets, strict=True), key=lambda placed: placed[0])
    columns = []
    for k in range(len(first.columns.batched)):
        filling, parts, at = first.columns.batched[k][:1], [], 0
        for place, ticket in order:
            if place > at:
                parts.append(filling.expand(place - at, *filling.shape[1:]))
            parts.append(ticket.columns.batched[k])
            at = place + ticket.call.rows
        if rows > at:
            parts.append(filling.expand(rows - at, *filling.shape[1:]))
        columns.append(torch.cat(parts) if len(parts) > 1 else parts[0])
    ready = iter(columns)
    leaves = [next(ready) if leaf is BATCHED else leaf for leaf in first.columns.leaves]
    with torch.no_grad():
        output = first.call.net.run(**torch_pytree.tree_unflatten(leaves, first.columns.spec))
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a step is over when its rows are there: beats, cancels and timings mean what they say
    return scatter(output, rows, [slice(place, place + t.call.rows) for place, t in zip(places, tickets, strict=True)])


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
