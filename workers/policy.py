"""Whose pass is next, and who shares it: decided here, for the engine and for the simulator alike."""

from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar


class Waits(Protocol):
    """A call that waits for a pass, in the order in which calls came in."""

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


class Policy:
    """Models share the device by time, requests of a model share passes, and whoever is nearly done goes first.

    The call that has waited longest always takes part in its model's next pass: what has much left to do is put off by
    what has little, never for good.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}  # seconds of the device, of each account that has calls waiting

    def turn(self, waiting: Sequence[W]) -> list[W]:
        """Those who may share the next pass, in the order in which they are to be let in."""
        least = min((self.spent[one.account] for one in waiting if one.account in self.spent), default=0.0)
        self.spent = {one.account: self.spent.get(one.account, least) for one in waiting}  # who comes back starts even
        account = min(self.spent, key=self.spent.__getitem__)
        first, *others = [one for one in waiting if one.account == account]
        alike = [one for one in others if one.key == first.key]
        return [first, *sorted(alike, key=lambda one: (one.rank, one.left))]

    def charge(self, account: str, seconds: float) -> None:
        """After a pass."""
        self.spent[account] = self.spent.get(account, 0.0) + seconds


def fitting(order: Sequence[W], width: int) -> list[W]:
    """As many as a pass of so many rows takes, in order; at least the first."""
    chosen, rows = list[W](), 0
    for one in order:
        if not chosen or rows + one.rows <= width:
            chosen.append(one)
            rows += one.rows
    return chosen
