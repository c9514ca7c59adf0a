"""Whose pass is next, who shares it, and how wide it is: decided here, for the engine and for the simulator alike."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol, TypeVar


class Waits(Protocol):
    """A call that waits for a pass, in the order in which calls came in."""

    @property
    def number(self) -> int: ...  # of its request, by when that came in
    @property
    def key(self) -> Hashable: ...  # calls of one key may share a pass
    @property
    def rows(self) -> int: ...
    @property
    def account(self) -> str: ...  # whose device time it takes: its model
    @property
    def rank(self) -> int: ...  # of its priority; 0 goes before 1
    @property
    def left(self) -> int: ...  # rows × steps that its request still needs


W = TypeVar("W", bound=Waits)

CLOSE_TO_PEAK = 0.98  # a wider pass than this needs buys next to no throughput
TURN_PASSES = 4  # of a model, after which another may have its turn
TURN_SECONDS = 0.5  # of the device, likewise: a pass of a video may take longer than that
STILL_TO_COME = 8  # times: how much more those who are not here yet care for throughput than those who are


class Policy:
    """Models share the device by time, requests of a model share passes, and whoever is nearly done goes first.

    Models take turns of a few passes: shared pass by pass, all that they draw would end late.

    Where not all of a model's calls may share a pass, it is one for whoever is nearly done and one for whoever came
    first, in turns. The call that has waited longest always takes part in the next pass of its kind: what has much left
    to do is put off by what has little, never for good.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}  # seconds of the device, of each account that has calls waiting
        self.passes = Counter[str]()  # of each account
        self.whose = ""  # the account whose turn it is
        self.began = 0, 0.0  # its passes and seconds when that began

    def turn(self, waiting: Sequence[W]) -> list[W]:
        """Of those who wait, in the order of their calls: who may share the next pass, in the order to be let in."""
        least = min((self.spent[one.account] for one in waiting if one.account in self.spent), default=0.0)
        self.spent = {one.account: self.spent.get(one.account, least) for one in waiting}  # who comes back starts even
        if self.whose not in self.spent or self._is_over():
            self.whose = min(self.spent, key=self.spent.__getitem__)
            self.began = self.passes[self.whose], self.spent[self.whose]
        own = [one for one in waiting if one.account == self.whose]
        self.passes[self.whose] += 1
        by_age = self.passes[self.whose] % 2 == 0
        lead = min(own, key=lambda one: one.number) if by_age else min(own, key=nearly_done)
        first, *others = [one for one in own if one.key == lead.key]
        return [first, *sorted(others, key=nearly_done)]

    def _is_over(self) -> bool:
        passes, seconds = self.began
        return self.passes[self.whose] - passes >= TURN_PASSES or self.spent[self.whose] - seconds >= TURN_SECONDS

    def charge(self, account: str, seconds: float) -> None:
        """After a pass."""
        self.spent[account] = self.spent.get(account, 0.0) + seconds


def nearly_done(one: Waits) -> tuple[int, int]:
    return one.rank, one.left


def widest(seconds: Mapping[int, float]) -> int:
    """Rows that a pass may have: the fewest within 2 % of the best throughput.

    Args:
        seconds: of a pass, by its rows.
    """
    best = max(rows / took for rows, took in seconds.items())
    return min(rows for rows, took in seconds.items() if rows / took >= CLOSE_TO_PEAK * best)


def worthwhile(seconds: Mapping[int, float], waiting: int) -> int:
    """How wide a pass should be when so many rows wait: narrow while they are few, and the wider the more they are.

    Equal requests of so many rows have all made a step after s(w) * waiting / w seconds, if w rows share a pass that
    takes s(w). They wait for half of it on average, and for half a pass; whoever comes later waits for all of it, which
    is why that part counts for more. Where s(w) is a + b * w, the best w is sqrt(8 * a / b * waiting).

    Args:
        seconds: of a pass, by its rows: of those widths that are to be had.
    """
    return min(seconds, key=lambda rows: seconds[rows] * (STILL_TO_COME * waiting / rows + 1))


def fitting(order: Sequence[W], width: int) -> list[W]:
    """As many as a pass of so many rows takes, in order; at least the first."""
    chosen, rows = list[W](), 0
    for one in order:
        if not chosen or rows + one.rows <= width:
            chosen.append(one)
            rows += one.rows
    return chosen
