"""What is asked for: mixes of requests, the same ones in the same order for every system that is compared."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

GUIDANCE = 3.0
PROMPTS = (
    "a small rocket in the top left corner on a dark blue background, twemoji style",
    "a red apple on a blue background",
    "a lemon next to a strawberry",
    "a green pear, fluent 3d style",
    "a cat on a yellow background, noto style",
    "a penguin, openmoji style",
)


class Kind(NamedTuple):
    share: float
    steps: int
    guided: bool = True
    size: float = 1.0  # sides, in those of the model's own size
    second: bool = False  # of another model

    @property
    def rows(self) -> int:
        return 2 if self.guided else 1


MIXES: Mapping[str, Sequence[Kind]] = {
    "a": [Kind(1, 20)],
    "b": [Kind(0.8, 4), Kind(0.2, 50)],
    "c": [Kind(0.5, 20), Kind(0.25, 20, size=1.5), Kind(0.25, 20, second=True)],
    "d": [Kind(0.5, 20), Kind(0.5, 20, guided=False)],
}


class Model(NamedTuple):
    """What requests need to know of it."""

    name: str
    second: str  # the same weights, loaded once more
    size: int
    scheduler: str


def requests(mix: str, model: Model, count: int, seed: int) -> list[dict[str, Any]]:
    """In each twenty, kinds come in just their shares: a few more long ones would be the luck of one seed."""
    rng, dealt = random.Random(seed), list[Kind]()
    deck = [kind for kind in MIXES[mix] for _ in range(round(20 * kind.share))]
    while len(dealt) < count:
        dealt += rng.sample(deck, len(deck))
    return [request(kind, model, rng) for kind in dealt[:count]]


def request(kind: Kind, model: Model, rng: random.Random) -> dict[str, Any]:
    side = int(model.size * kind.size)
    return {
        "model": model.second if kind.second else model.name,
        "prompt": rng.choice(PROMPTS),
        "num_inference_steps": kind.steps,
        "guidance_scale": GUIDANCE if kind.guided else 1.0,
        "width": side,
        "height": side,
        "scheduler": model.scheduler,
        "seed": rng.randrange(2**31),
    }


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the beginning, of a Poisson process."""
    rng, at, times = random.Random(seed), 0.0, list[float]()
    for _ in range(count):
        at += rng.expovariate(rate)
        times.append(at)
    return times
