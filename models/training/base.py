"""Trains the 64 px model of emoji-glide and emoji-imagen: pixel diffusion in patches, begun from emoji-sd's denoiser.

    python -m models.training.base WORK OUT --minutes 60

It is told emoji-sd's own words, which emoji-imagen's ear speaks, and what is known of the picture, so that it also
inpaints. It says what the picture is, not what the noise: of so few channels a patch, noise would not get through (Li &
He 2025, "Back to basics: let denoising generative models denoise").
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import avg_pool2d, pixel_shuffle, pixel_unshuffle

from models.catalog import WEIGHTS
from models.training.encode import Encoders, read
from models.training.running import Run, alphas_of, in_half, options

BATCH = 24
LEARNING_RATE = 4e-4
PATCH = 4
DROPPED = 0.1  # captions, for classifier-free guidance
SURE = 5.0  # the loss weighs timesteps by min(SNR + 1, SURE): Hang et al. 2023, of pictures instead of velocities
EXAMPLES = 600  # pictures from which it is judged what a patch looks like as a latent, and back


def begin(pixels: Tensor) -> UNet2DConditionModel:
    """emoji-sd's denoiser, which takes a patch of 4 × 4 pixels for one of its latents."""
    old = UNet2DConditionModel.from_pretrained(WEIGHTS / "emoji-sd" / "unet", torch_dtype=torch.float32)
    colours = 3 * PATCH**2
    new = resized(old, in_channels=2 * colours + PATCH**2, out_channels=colours, sample_size=64 // PATCH)
    encoders = Encoders()
    latents = torch.cat([encoders.latents(some / 255.0) for some in pixels[:EXAMPLES].split(50)])
    z = with_one(latents.permute(0, 2, 3, 1).flatten(0, 2))
    patches = pixel_unshuffle(small(pixels[:EXAMPLES]), PATCH).permute(0, 2, 3, 1).flatten(0, 2)
    to_latents = torch.linalg.lstsq(with_one(patches), z[:, :-1]).solution[:-1]  # [colours, 8]
    to_patches = torch.linalg.lstsq(z, patches).solution[:-1]  # [8, colours]
    with torch.no_grad():
        new.conv_in.weight.zero_()
        new.conv_in.weight[:, :colours] = torch.einsum("olhw,cl->ochw", old.conv_in.weight, to_latents)
        new.conv_in.bias.copy_(old.conv_in.bias)
        new.conv_out.weight.copy_(-torch.einsum("lihw,lc->cihw", old.conv_out.weight, to_patches))  # all noise: x0 = -v
        new.conv_out.bias.copy_(-(old.conv_out.bias @ to_patches))
    return new


def resized(old: Any, **changed: Any) -> Any:
    """A model with the old one's weights wherever the changed configuration leaves their shape alone."""
    new: Any = UNet2DConditionModel.from_config({**old.config, **changed})
    own = new.state_dict()
    new.load_state_dict(
        {k: v for k, v in old.state_dict().items() if k in own and own[k].shape == v.shape}, strict=False
    )
    return new


def with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones(len(rows), 1)], 1)


def small(pixels: Tensor) -> Tensor:
    """[rows, 3, 128, 128] of 255 to [rows, 3, 64, 64] in [-1, 1]"""
    return avg_pool2d(pixels.float() / 127.5 - 1, 2)


def holes(rows: int) -> Tensor:
    """[rows, 1, 64, 64], one where the picture is not known: all of it, a box, or all but a box."""
    at = torch.arange(64) + 0.5
    low, high = (torch.rand(2, rows, 2, 1) * 64).sort(0).values
    inside = (at >= low) & (at <= high)
    box = inside[:, 0, :, None] & inside[:, 1, None, :]
    kind = torch.rand(rows, 1, 1)
    return torch.where(kind < 0.6, True, torch.where(kind < 0.85, box, ~box)).float()[:, None]


def noised(x0: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noised samples, their timesteps (stratified), and what the loss weighs at each, [rows]."""
    rows = len(x0)
    timestep = ((torch.arange(rows) + torch.rand(rows)) / rows * 1000).long().clamp(max=999)
    alpha_bar = alphas_cumprod[timestep].view(-1, 1, 1, 1)
    sample = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * torch.randn_like(x0)
    return sample, timestep, (1 / (1 - alpha_bar)).view(-1).clamp(max=SURE)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--begin", type=Path, help="a trained model to begin with, instead of emoji-sd's denoiser")
    given = options(__doc__, parser)
    pixels, told = read(given.work, "pixels", "context")
    nothing = Encoders().context([""])[0]
    if given.begin:
        model: Any = UNet2DConditionModel.from_pretrained(given.begin, torch_dtype=torch.float32)
    else:
        model = begin(pixels)
    alphas_cumprod = alphas_of("emoji-sd/scheduler")
    run = Run("glide", model.train(), LEARNING_RATE, given, decay=0.999)
    for rows in run.batches(len(pixels), BATCH):
        x0 = small(pixels[rows])
        sample, timestep, weight = noised(x0, alphas_cumprod)
        kept = torch.rand(BATCH, 1, 1) > DROPPED
        context = torch.where(kept, told[rows].float(), nothing)
        hole = holes(BATCH)
        seen = torch.cat([pixel_unshuffle(part, PATCH) for part in (sample, x0 * (1 - hole), hole)], 1)
        with in_half():
            guess = model(seen, timestep, encoder_hidden_states=context, return_dict=False)[0]
        error = (pixel_shuffle(guess.float(), PATCH) - x0).square().mean((1, 2, 3))
        run.step((error * weight).mean(), unweighted=error.detach().mean())
    run.save(given.out)


if __name__ == "__main__":
    main()
