"""A request is a program: a generator that yields `Call`s and is resumed with its rows' outputs.

All that a request owns (latents, position, sampler, generator, guidance) is a local variable of its program. A program
is deterministic but for the outputs of its nets, and knows nothing of the others that share its forward passes.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

BUCKETS = (1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48)  # 64 rows and more trace another graph in Upsample2D


@dataclass(eq=False)
class Net:
    """A resident callable and how its rows may be batched. Identity is what calls are grouped by.

    `run` takes keyword arguments and returns tensors (in any nesting of tuples, lists, dicts and diffusers outputs)
    whose first dimension is the rows; empty rows, which it must bear, are zeros. `shared` names arguments that are not
    per row: calls meet only where these are equal.
    """

    name: str
    run: Callable[..., Any]
    shared: frozenset[str] = frozenset()
    buckets: tuple[int, ...] = ()  # row counts it may be run at, the rest is padding; none: any
    width: int = 16  # rows in one pass at most, unless one call alone has more
    seconds: Mapping[int, float] = field(default_factory=dict[int, float])  # of a pass, by its rows, where measured
    reproducible_rows: int | None = None  # the exact lane's row count; none: the call runs alone, at its own
    recordable: bool = False  # it only launches work of its device, the same for the same shapes: see workers/graphs.py
    journaled: bool = False  # what it returns is worth keeping: not done again when another worker takes over


@dataclass(slots=True)
class Call:
    """Evaluate `net` on my rows.

    Tensors in `args` whose first dimension is `rows` are batched, 0-dimensional ones are repeated for each row, and
    everything else must be equal in all calls of a batch.
    """

    net: Net
    args: dict[str, Any]
    rows: int
    at: tuple[int, int] | None = None  # i of n denoising steps are done, over all stages: progress
    estimate: Callable[[], Tensor | None] | None = None  # what it looks like so far, [1, C, h, w] latents: previews
    stage: str = ""  # the stage that the step belongs to, of a model that has several


@dataclass(frozen=True)
class Inputs:
    """What came with a request as pictures."""

    image: Image.Image | None = None
    mask: Image.Image | None = None
    end_image: Image.Image | None = None
    control_image: Image.Image | None = None
    ip_adapter_image: Image.Image | None = None


Program = Generator[Call, Any, Tensor]
"""Returns the picture, wherever it is: float32 [3, height, width] in [0, 1]; [frames, 3, height, width] of a video."""


def generator(seed: int) -> torch.Generator:
    """The noise of one picture: always from the CPU, so that a seed means the same on every device."""
    return torch.Generator("cpu").manual_seed(seed)
