"""Trains the discrete autoencoder of emoji-dalle and emoji-parti: a picture as 16 × 16 of 1,024 codes.

    python -m models.training.vq WORK OUT --minutes 15

It is emoji-sd's, whose latents are rounded to the nearest of a codebook: their k means. Its encoder stays as it is, so
that transformers can learn the codes while the decoder still learns to make up for the rounding.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from models.catalog import WEIGHTS
from models.training.encode import read
from models.training.running import Run, in_half, options

BATCH = 8
LEARNING_RATE = 3e-4
CODES = 1024
ROUNDS = 25  # of k-means
EXAMPLES = 300_000  # latents from which the codebook is made


def begin(codebook: Tensor) -> VQModel:
    """emoji-sd's autoencoder with the codebook [codes, 8] between its halves."""
    old: Any = AutoencoderKL.from_pretrained(WEIGHTS / "emoji-sd" / "vae", torch_dtype=torch.float32)
    shared = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "norm_num_groups")
    channels = old.config.latent_channels
    new: Any = VQModel(
        **{name: old.config[name] for name in shared},
        latent_channels=channels,
        num_vq_embeddings=len(codebook),
        mid_block_add_attention=False,
    )
    new.encoder.load_state_dict(
        {k: v for k, v in old.encoder.state_dict().items() if not k.startswith("conv_out")}, strict=False
    )
    new.decoder.load_state_dict(old.decoder.state_dict())
    mean, scale = old.quant_conv.weight[:channels, :, 0, 0], old.config.scaling_factor
    with torch.no_grad():  # the mean of the posterior, as one convolution
        new.encoder.conv_out.weight.copy_(torch.einsum("om,mihw->oihw", mean, old.encoder.conv_out.weight) * scale)
        new.encoder.conv_out.bias.copy_((mean @ old.encoder.conv_out.bias + old.quant_conv.bias[:channels]) * scale)
        new.quant_conv.weight.copy_(torch.eye(channels)[:, :, None, None])
        new.quant_conv.bias.zero_()
        new.quantize.embedding.weight.copy_(codebook)
        new.post_quant_conv.weight.copy_(old.post_quant_conv.weight / scale)
        new.post_quant_conv.bias.copy_(old.post_quant_conv.bias)
    return new


def means(latents: Tensor, count: int) -> Tensor:
    """[count, C]: k means of [latents, C]; one that hardly any latent is near moves to where they are far from all."""
    centres = latents[torch.randperm(len(latents))[:count]].clone()
    for turn in range(ROUNDS):
        own = torch.cat([nearest_of(some, centres) for some in latents.split(20_000)])
        members = torch.zeros(count).index_add_(0, own, torch.ones(len(own)))
        sums = torch.zeros_like(centres).index_add_(0, own, latents)
        centres = torch.where(members[:, None] > 0, sums / members[:, None].clamp(min=1), centres)
        idle = (members < len(latents) / count / 30).nonzero()[:, 0]
        if len(idle) and turn < ROUNDS - 5:
            error = (latents - centres[own]).square().sum(1)
            centres[idle] = latents[torch.multinomial(error, len(idle))]
    return centres


def nearest_of(latents: Tensor, codebook: Tensor) -> Tensor:
    """[n] of [n, C]"""
    return (codebook.square().sum(1) - 2 * latents @ codebook.T).argmin(1)


def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """[rows, C, h, w] to codes [rows, h, w]"""
    rows, _, height, width = latents.shape
    return nearest_of(latents.permute(0, 2, 3, 1).flatten(0, 2), codebook).view(rows, height, width)


def main() -> None:
    given = options(__doc__)
    latents, pixels = read(given.work, "latents", "pixels")
    if given.out.exists():  # a new codebook would be another language
        model: Any = VQModel.from_pretrained(given.out, torch_dtype=torch.float32)
    else:
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
        model = begin(means(flat[torch.randperm(len(flat))[:EXAMPLES]].float(), CODES))
    for part in (model.encoder, model.quant_conv, model.quantize):
        part.requires_grad_(False)
    codebook = model.quantize.embedding.weight
    run = Run("vq", model.train(), LEARNING_RATE, given, decay=0.998)
    for rows in run.batches(len(pixels), BATCH):
        rounded = codebook[nearest(latents[rows].float(), codebook)].permute(0, 3, 1, 2)
        wanted = pixels[rows].float() / 127.5 - 1
        with in_half():
            drawn = model.decode(rounded, force_not_quantize=True, return_dict=False)[0]
        error = drawn.float() - wanted
        run.step(error.abs().mean() + error.square().mean())
    run.save(given.out)


if __name__ == "__main__":
    main()
