"""Trains the denoiser of emoji-classes: emoji-sd's without its ear for prompts, told the number of a class.

    python -m models.training.classes DATA WORK OUT --minutes 45

Its convolutions begin with emoji-sd's weights; what it is told, and how it looks at a picture as a whole, is new.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.catalog import WEIGHTS, Catalog
from models.training.base import resized
from models.training.decoder import moving
from models.training.encode import Encoders
from models.training.judge import drawings, some_scenes
from models.training.running import Run, alphas_of, in_half, options
from models.training.scenes import World

BATCH = 32
LEARNING_RATE = 4e-4
EACH = 120  # pictures of each class
AT_ONCE = 60
DROPPED = 0.1  # classes, for classifier-free guidance
NO_CLASS = 0


def begin(classes: int) -> UNet2DConditionModel:
    old = UNet2DConditionModel.from_pretrained(WEIGHTS / "emoji-sd" / "unet", torch_dtype=torch.float32)
    new = resized(
        old,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=56,
        num_class_embeds=1 + classes,
    )
    torch.nn.init.normal_(new.class_embedding.weight, std=0.1)
    return new


def encoded(place: Path, data: Path, classes: list[str]) -> tuple[Tensor, Tensor]:
    """Latents of each class's drawings, [pictures, 8, 16, 16], and what each is of, [pictures]: one, two, …"""
    if not place.exists():
        world, encoders, rng = World(data), Encoders(), np.random.default_rng(0)
        labels = list(range(len(classes))) * EACH
        own, latents = drawings(world, classes), list[Tensor]()
        for at in range(0, len(labels), AT_ONCE):
            pictures = world.render(some_scenes(rng, own, labels[at : at + AT_ONCE]))
            latents.append(encoders.latents(pictures).half())
            print(f"{at} of {len(labels)} pictures encoded", flush=True)
        save_file({"latents": torch.cat(latents), "label": torch.tensor(labels) + 1}, place)
    found = load_file(place)
    return found["latents"], found["label"]


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("data", type=Path)
    given = options(__doc__, parser)
    classes = Catalog.read(["emoji-classes"])["emoji-classes"].classes
    latents, label = encoded(given.work / "classes.latents", given.data, classes)
    latents, label = latents.to(given.device), label.to(given.device)
    alphas_cumprod = alphas_of("emoji-sd/scheduler")
    model: Any = begin(len(classes)).train()
    run = Run("classes", model, LEARNING_RATE, given, decay=0.999)
    for rows in run.batches(len(latents), BATCH):
        noised, timestep, velocity, weight = moving(latents[rows].float(), alphas_cumprod)
        told = torch.where(torch.rand(BATCH) > DROPPED, label[rows], NO_CLASS)
        with in_half():
            guess = model(noised, timestep, encoder_hidden_states=None, class_labels=told, return_dict=False)[0]
        error = (guess.float() - velocity).square().mean((1, 2, 3))
        run.step((error * weight).mean(), unweighted=error.detach().mean())
    run.save(given.out)


if __name__ == "__main__":
    main()
