"""Guidance: functions of the model's outputs, each citing its paper."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def classifier_free(e: Tensor, scale: Tensor, unconditional: Tensor, conditional: Tensor) -> Tensor:
    """ẽ = e_u + s (e_c - e_u) for each row of a mixed batch: Ho & Salimans 2022, equation 6 (with s = 1 + w).

    Args:
        e: [rows, …] the model's outputs. Rows of one sample stand together, in any order and number.
        scale: [rows] guidance scale s.
        unconditional, conditional: [rows] where each row's pair stands, counted from the row itself (-1, 0 or 1). A row
            that is its own pair (0, 0) is returned as it is, so that samples without guidance need no second row.
    Returns:
        [rows, …] the guided output, the same for all rows of a sample.
    """
    row = torch.arange(len(e), device=e.device)
    e_u, e_c = e[row + unconditional], e[row + conditional]
    return e_u + over(scale, e) * (e_c - e_u)


def rescale(guided: Tensor, e: Tensor, conditional: Tensor, factor: Tensor) -> Tensor:
    """Guided outputs with a part of their excess contrast taken back: Lin et al. 2023, section 3.4.

    Args:
        guided, e: [rows, …] with and without guidance; conditional: [rows] as above; factor: [rows] φ in [0, 1].
    """
    e_c = e[torch.arange(len(e), device=e.device) + conditional]
    dims = list(range(1, e.ndim))
    shrunk = guided * (e_c.std(dims, keepdim=True) / guided.std(dims, keepdim=True).clamp(min=1e-8))
    return torch.lerp(guided, shrunk, over(factor, e))


def in_interval(interval: Sequence[float] | None, i: int, calls: int) -> bool:
    """Whether call i of so many is guided, 0 being the first call and 1 past the last: Kynkäänniemi et al. 2024."""
    return interval is None or interval[0] <= i / calls < interval[1]


def reused(interval: Sequence[float] | None, every: int | None, calls: int) -> frozenset[int]:
    """The guided calls that add what guidance added at the last one that computed it: all but every so manieth.

    What guidance adds changes slowly from step to step: Lyu et al. 2025 (FasterCache), section 3.3.
    """
    guided = [i for i in range(calls) if in_interval(interval, i, calls)]
    return frozenset(i for k, i in enumerate(guided) if k % (every or 1))


def strength_embedding(scale: float, width: int) -> Tensor:
    """[1, width] what a denoiser that guides itself is told of the scale: Meng et al. 2023, Luo et al. 2023."""
    frequencies = torch.exp(torch.arange(width // 2) * -(torch.tensor(10_000.0).log() / (width // 2 - 1)))
    angles = (scale - 1) * 1000 * frequencies
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))[None]


def thresholded(x0: Tensor, percentile: Tensor | None = None) -> Tensor:
    """Estimates of pictures, brought back into [-1, 1]: Saharia et al. 2022 (Imagen), section 2.3.

    Args:
        x0: [rows, …]; percentile: [rows] of each row's magnitudes that become black or white ("dynamic thresholding":
            all is divided by it, where it is more than one). None: what lies outside is cut off ("static").
    """
    if percentile is None:
        return x0.clamp(-1, 1)
    magnitudes = x0.abs().flatten(1).sort(-1).values
    at = percentile[:, None] * (magnitudes.shape[1] - 1)
    low = at.long().clamp(max=magnitudes.shape[1] - 2)
    limit = over(torch.lerp(magnitudes.gather(1, low), magnitudes.gather(1, low + 1), at - low).clamp(min=1), x0)
    return x0.clamp(-limit, limit) / limit


def clip(seen: Tensor, caption: Tensor) -> Tensor:
    """[rows] how well what CLIP sees agrees with its caption, both [rows, width]: Nichol et al. 2021, section 2.4."""
    return (seen * caption).sum(-1)


def classifier(seen: Tensor, classes: Tensor, label: Tensor) -> Tensor:
    """[rows] log p(y | x) of a noisy classifier: Dhariwal & Nichol 2021, section 4.

    Args:
        seen: [rows, width]; classes: [classes, width], whose products are the logits; label: [rows].
    """
    return torch.log_softmax(seen @ classes.T, -1).gather(1, label[:, None])[:, 0]


def gradient(objective: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∇ₓ of each row's own objective. Rows do not interact, so one backward of their sum serves them all."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        return torch.autograd.grad(objective(leaf).sum(), leaf)[0]


def over(scalars: Tensor, x: Tensor) -> Tensor:
    """[rows] shaped to multiply [rows, …]."""
    return scalars.view(-1, *[1] * (x.ndim - 1))


def weighted(states: Tensor, weights: Tensor) -> Tensor:
    """The states of a prompt's words, each as heavy as it was asked for: as the AUTOMATIC1111 web UI does it.

    Weighing moves the mean of a prompt's states, which is then restored; of each prompt its own, so that no neighbour
    counts. In float64: the mean may be a thousandth of their size. Weights of 1 change nothing.

    Args:
        states: [rows, tokens, width]; weights: [rows, tokens].
    """
    exact = states.double()
    heavy = exact * weights[..., None]
    return (heavy * (exact.mean((1, 2), keepdim=True) / heavy.mean((1, 2), keepdim=True))).to(states.dtype)
