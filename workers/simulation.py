"""What a policy would do: the engine's own policy over measured curves, with requests that arrive at random.

Discrete events, no device: a pass takes what the curve says. Encoding, decoding and the network are left out.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles
from typing import NamedTuple, TypeVar

from workers.policy import Policy, Waits, fitting, widest, worthwhile

W = TypeVar("W", bound=Waits)
Width = Callable[[Mapping[int, float], int], int]  # of a pass, from seconds by rows and the rows that wait
Curves = Mapping[str, Mapping[int, float]]  # of each model: seconds of a pass by its rows

CURVES: Curves = {  # one H100, as CUDA graphs: 512 × 512 and 1024 × 1024 pixels
    "sd15": {1: 0.0074, 2: 0.0106, 4: 0.0168, 8: 0.0295, 16: 0.0557, 32: 0.1086},
    "sdxl": {2: 0.0446, 4: 0.0807, 8: 0.1573, 16: 0.3031, 32: 0.609},
    "small": {1: 0.00173, 2: 0.00177, 4: 0.00179, 8: 0.00191, 16: 0.00206, 32: 0.00232, 64: 0.00285, 128: 0.004},
}


LOADS = (0.3, 0.5, 0.8, 0.9, 1.2)  # of what the device could do


class Kind(NamedTuple):
    share: float
    steps: int
    rows: int = 2  # with classifier-free guidance
    model: str | None = None  # another than the one that is asked about
    size: float = 1  # times the pixels, and what a pass takes


MIXES: Mapping[str, Sequence[Kind]] = {
    "a": [Kind(1, 20)],
    "b": [Kind(0.8, 4), Kind(0.2, 50)],
    "c": [Kind(0.6, 20), Kind(0.2, 20, size=2.25), Kind(0.2, 20, model="sdxl")],
    "d": [Kind(0.5, 20), Kind(0.5, 20, rows=1)],
}


class FirstCome(Policy):
    """For comparison: whatever has waited longest, with all that may share its pass."""

    def turn(self, waiting: Sequence[W]) -> list[W]:
        return [one for one in waiting if one.key == waiting[0].key]


@dataclass(eq=False)
class Request:
    """As the engine sees it: at each moment it waits for one pass."""

    number: int
    arrives: float
    steps: int
    rows: int
    account: str
    size: float = 1
    short: bool = False  # of the cheapest kind
    done: int = 0
    rank: int = 0
    ended: float = 0.0

    @property
    def key(self) -> tuple[str, float]:
        return self.account, self.size

    @property
    def left(self) -> int:
        return self.rows * (self.steps - self.done)

    @property
    def latency(self) -> float:
        return self.ended - self.arrives


def passes(
    requests: Sequence[Request], curves: Curves, policy: Policy, overbooking: float, width: Width = worthwhile
) -> Iterator[list[Request]]:
    """Each pass until all have ended: who took part in it."""
    queue, waiting, now = deque(sorted(requests, key=lambda one: one.arrives)), list[Request](), 0.0
    widths = {model: widest(curve) for model, curve in curves.items()}

    def held(model: str) -> int:
        return sum(one.rows for one in waiting if one.account == model)

    while queue or waiting:
        if not waiting:
            now = max(now, queue[0].arrives)
        for one in [one for one in queue if one.arrives <= now]:
            if held(one.account) < overbooking * widths[one.account]:
                queue.remove(one)
                waiting.append(one)
        order = policy.turn(waiting)
        model = order[0].account
        to_be_had = {rows: seconds for rows, seconds in curves[model].items() if rows <= widths[model]}
        chosen = fitting(order, width(to_be_had, held(model)))
        curve, rows = curves[model], sum(one.rows for one in chosen)
        took = curve[min((bucket for bucket in curve if bucket >= rows), default=max(curve))] * chosen[0].size
        now += took
        policy.charge(chosen[0].account, took)
        waiting = [one for one in waiting if one not in chosen]
        for one in chosen:
            one.done += 1
            if one.done == one.steps:
                one.ended = now
            else:
                waiting.append(one)
        yield chosen


def seconds(kind: Kind, model: str, curves: Curves) -> float:
    """Of the device, if its passes are as wide as is best."""
    curve = curves[kind.model or model]
    return kind.steps * kind.rows * kind.size * min(seconds / rows for rows, seconds in curve.items())


def arrivals(mix: Sequence[Kind], model: str, curves: Curves, load: float, count: int, seed: int) -> list[Request]:
    """Poisson arrivals at a share of what the device could do if every pass were as wide as is best."""
    rng, at, requests = random.Random(seed), 0.0, list[Request]()
    mean = sum(kind.share * seconds(kind, model, curves) for kind in mix)
    shortest = min(mix, key=lambda kind: seconds(kind, model, curves))
    for number in range(count):
        at += rng.expovariate(load / mean)
        (kind,) = rng.choices(mix, [kind.share for kind in mix])
        of_model = kind.model or model
        requests.append(Request(number, at, kind.steps, kind.rows, of_model, kind.size, kind is shortest))
    return requests


class Outcome(NamedTuple):
    """Seconds from arrival to end, and requests a second."""

    p50: float
    p99: float
    p99_short: float  # of those that take the least time
    throughput: float


POLICIES: Mapping[str, tuple[type[Policy], float, Width]] = {  # policy, passes held, how wide each is
    "one by one": (FirstCome, 0.01, worthwhile),
    "first come": (FirstCome, 1.0, worthwhile),
    "holding 1": (Policy, 1.0, worthwhile),
    "holding 2": (Policy, 2.0, worthwhile),
    "holding 4": (Policy, 4.0, worthwhile),
    "full width": (Policy, 2.0, lambda to_be_had, _: max(to_be_had)),
}


def run(policy: str, mix: str, model: str, load: float, count: int, seed: int, curves: Curves = CURVES) -> Outcome:
    requests = arrivals(MIXES[mix], model, curves, load, count, seed)
    decides, overbooking, width = POLICIES[policy]
    for _ in passes(requests, curves, decides(), overbooking, width):
        pass
    short = [one.latency for one in requests if one.short]
    everybody = quantiles([one.latency for one in requests], n=100)
    ended = max(one.ended for one in requests)
    return Outcome(everybody[49], everybody[98], quantiles(short, n=100)[98], count / ended)


def averaged(outcomes: Sequence[Outcome]) -> Outcome:
    return Outcome(*(fmean(column) for column in zip(*outcomes, strict=True)))
