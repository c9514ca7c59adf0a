"""Trains the super-resolution model that a cascade ends with: 64 px to 128, one 64 px window at a time.

    python -m models.training.upsampler WORK OUT --minutes 30

It is shown the small picture with some noise on it and told how much (noise conditioning augmentation, Ho et al. 2021
"Cascaded Diffusion Models", section 4), so that it forgives what the model before it gets wrong.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle

from models.training.base import PATCH, noised, small
from models.training.encode import read
from models.training.running import Run, alphas_of, in_half, options

BATCH = 24
LEARNING_RATE = 1e-3
WINDOW = 64
NOISIEST = 400  # timestep: more is never put on the small picture


def begin() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=6 * PATCH**2,
        out_channels=3 * PATCH**2,
        block_out_channels=(96, 128),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        add_attention=False,
        class_embed_type="timestep",
    )


def windows(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The same random part of each picture and of what a small picture shows of it, [rows, 3, WINDOW, WINDOW] both."""
    large = pixels.float() / 127.5 - 1
    blurred = interpolate(small(pixels), scale_factor=2, mode="bicubic")
    at = torch.randint(0, (128 - WINDOW) // PATCH + 1, (len(pixels), 2)) * PATCH
    cut = [(slice(None), slice(int(y), int(y) + WINDOW), slice(int(x), int(x) + WINDOW)) for y, x in at]
    return torch.stack([p[c] for p, c in zip(large, cut, strict=True)]), torch.stack(
        [p[c] for p, c in zip(blurred, cut, strict=True)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--begin", type=Path, help="a trained model to begin with")
    given = options(__doc__, parser)
    (pixels,) = read(given.work, "pixels")
    alphas_cumprod = alphas_of("emoji-sd/scheduler")
    model: Any = UNet2DModel.from_pretrained(given.begin, torch_dtype=torch.float32) if given.begin else begin()
    run = Run("upsampler", model, LEARNING_RATE, given, decay=0.999)
    for rows in run.batches(len(pixels), BATCH):
        x0, low = windows(pixels[rows])
        sample, timestep, weight = noised(x0, alphas_cumprod)
        level = torch.randint(0, NOISIEST, (BATCH,))
        alpha_bar = alphas_cumprod[level].view(-1, 1, 1, 1)
        low = alpha_bar.sqrt() * low + (1 - alpha_bar).sqrt() * torch.randn_like(low)
        seen = torch.cat([pixel_unshuffle(sample, PATCH), pixel_unshuffle(low, PATCH)], 1)
        with in_half():
            guess = model(seen, timestep, class_labels=level, return_dict=False)[0]
        error = (pixel_shuffle(guess.float(), PATCH) - x0).square().mean((1, 2, 3))
        run.step((error * weight).mean(), unweighted=error.detach().mean())
    run.save(given.out)


if __name__ == "__main__":
    main()
