"""A cheap picture of half-finished latents: a colour for each latent, without the decoder."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentColours:
    """Colours as a linear function of latents."""

    weights: Tensor  # [C + 1, 3]; the last row is the bias

    @classmethod
    def fit(cls, encode: Callable[[Tensor], Tensor], device: torch.device, size: int = 128) -> "LatentColours":
        """Least squares over smooth random pictures, shown to the model's own encoder.

        Args:
            encode: [rows, 3, H, W] in [-1, 1] to latents [rows, C, h, w].
        """
        rng = torch.Generator().manual_seed(0)
        coarse = torch.rand(8, 3, 4, 4, generator=rng) * 2 - 1
        pictures = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(-1, 1)
        with torch.no_grad():
            latents = encode(pictures.to(device)).float().cpu()
        height, width = latents.shape[-2:]
        colours = torch.nn.functional.adaptive_avg_pool2d(pictures, (height, width))
        return cls(torch.linalg.lstsq(with_bias(latents), pixels_last(colours)).solution)

    def paint(self, latents: Tensor) -> Tensor:
        """[1, C, h, w] to [h, w, 3] uint8."""
        height, width = latents.shape[-2:]
        colours = (with_bias(latents.float().cpu()) @ self.weights).view(height, width, 3)
        return ((colours / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def pixels_last(x: Tensor) -> Tensor:
    """[rows, C, h, w] to [rows · h · w, C]"""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def with_bias(latents: Tensor) -> Tensor:
    flat = pixels_last(latents)
    return torch.cat([flat, torch.ones(len(flat), 1)], 1)
