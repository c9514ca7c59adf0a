"""The denoising loop that all diffusion programs share, and the step that they take inside their nets."""

from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.program import Call, Net
from models.samplers import Sampler, steps_done

Told = Callable[[int], tuple[int, dict[str, Tensor]]]
"""The rows of call i, and what the net is told in them beside what every step needs."""


@dataclass(frozen=True)
class Steering:
    """A net whose output is the gradient of a log probability, and how hard to follow it."""

    net: Net
    told: dict[str, Tensor]  # beside the sample and its timestep
    strength: float


@dataclass(frozen=True)
class Span:
    """A loop's share of its generation's steps, and the stage that it is, if there are several."""

    before: int
    steps: int
    total: int
    stage: str = ""

    def at(self, i: int, calls: int) -> tuple[int, int]:
        """Progress at call i of so many."""
        return self.before + steps_done(i, calls, self.steps)[0], self.total


def moved(sample: Tensor, e: Tensor, noise: Tensor, memory: Tensor, coefficients: Tensor) -> Tensor:
    """The sampler's update x' = c · (x, e, noise, e₁, x₁, e₂, x₂) of each row, see `models.samplers`.

    Args:
        sample, e, noise: [rows, C, h, w]; memory: [rows, 4, C, h, w]; coefficients: [rows, 7].
    """
    terms = torch.cat([torch.stack([sample, e, noise], 1), memory], 1)
    return torch.einsum("rk,rkchw->rchw", coefficients, terms)


def denoised(
    net: Net,
    sampler: Sampler,
    x: Tensor,
    rng: torch.Generator,
    told: Told,
    span: Span,
    steering: Steering | None = None,
    settled: Callable[[int, Tensor], Tensor] = lambda i, x: x,
    reused: Collection[int] = (),
) -> Generator[Call, Any, Tensor]:
    """The end of the sampler's way from x, [1, C, h, w].

    Args:
        net: returns the next sample and the guided output, which are the same for all rows.
        settled: has the last word on each sample, before the next call.
        reused: calls without guidance to which is added what it added last; of two rows, the second is then unguided.
    """
    tables = sampler.timesteps.float(), sampler.scales, sampler.coefficients, sampler.pushes
    timesteps, scales, coefficients, pushes = (table.to(x.device, non_blocking=True) for table in tables)
    calls = len(timesteps)
    e1 = x1 = e2 = x2 = nothing = added = torch.zeros_like(x)
    remembers, no_memory = bool(sampler.coefficients[:, 3:].any()), torch.zeros(1, 4, *x.shape[1:], device=x.device)
    estimate = None
    for i in range(calls):
        at, (rows, conditions) = span.at(i, calls), told(i)
        fresh = sampler.noise(i, x, rng)
        args = conditions | {
            "sample": x.expand(rows, -1, -1, -1),
            "noise": (nothing if fresh is None else fresh).expand(rows, -1, -1, -1),
            "memory": (torch.stack([e1, x1, e2, x2], 1) if remembers else no_memory).expand(rows, -1, -1, -1, -1),
            "timestep": timesteps[i],
            "scale": scales[i],
            "coefficients": coefficients[i].expand(rows, -1),
        }
        if steering is not None:
            seen = {"sample": x * scales[i], "timestep": timesteps[i]}
            uphill = yield Call(steering.net, seen | steering.told, 1, at, estimate, span.stage)
            args["push"] = (steering.strength * pushes[i] * uphill).expand(rows, -1, -1, -1)
        if i in reused:
            args["push"] = added + args.get("push", 0)
        updated, e = yield Call(net, args, rows, at, estimate, span.stage)
        if reused and rows == 2:
            added = e[:1] - e[1:]
        updated, e = updated[:1], e[:1]
        estimate = partial(sampler.estimate, i, x, e)
        e2, x2, e1, x1 = e1, x1, e, x
        x = settled(i, sampler.settle(i, x, e, updated, rng))
    return x
