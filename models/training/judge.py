"""Trains the classifier that judges emoji-classes and has no part in drawing: from nothing, on pictures of the classes.

python -m models.training.judge DATA WORK OUT --minutes 7
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, cross_entropy
from transformers import ResNetConfig, ResNetForImageClassification

from models.catalog import Catalog
from models.training.running import Run, in_half, options
from models.training.scenes import World

BATCH = 48
LEARNING_RATE = 2e-3
SIZE = 64
SMOOTHED = 0.05  # of each label
NOISE = 0.15  # at most, of pictures in [-1, 1]: what is drawn is less clean than what is rendered


def begin(classes: list[str]) -> ResNetForImageClassification:
    names = dict(enumerate(classes))
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 192],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            id2label=names,
            label2id={name: i for i, name in names.items()},
        )
    )


def drawings(world: Any, classes: list[str]) -> list[list[int]]:
    """The numbers of each class's drawings: those that it is a name of, or with their colour (a red heart)."""
    called = [{sprite["name"], *sprite["synonyms"]} for sprite in world.sprites]
    for sprite, names in zip(world.sprites, called, strict=True):
        names |= {sprite["name"].removeprefix(f"{colour} ") for colour in sprite["colors"]}
    return [[i for i, names in enumerate(called) if name in names] for name in classes]


def some_scenes(rng: np.random.Generator, own: list[list[int]], labels: list[int]) -> list[dict[str, Any]]:
    """One drawing of each label's class, of any size and place, in front of any colour; of these, many are white."""
    scenes = list[dict[str, Any]]()
    for label in labels:
        scale = float(rng.uniform(0.55, 1.0))
        cx, cy = (0.5 + (1 - scale) / 2 * rng.uniform(-1, 1, 2)).tolist()
        background = [255, 255, 255] if rng.random() < 0.5 else rng.integers(0, 256, 3).tolist()
        item = {"index": int(rng.choice(own[label])), "cx": cx, "cy": cy, "scale": scale}
        scenes.append({"background": background, "items": [item]})
    return scenes


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("data", type=Path)
    given = options(__doc__, parser)
    classes = Catalog.read(["emoji-classes"])["emoji-classes"].classes
    world, rng = World(given.data), np.random.default_rng()
    own = drawings(world, classes)
    model: Any = begin(classes).train()
    run = Run("judge", model, LEARNING_RATE, given, decay=0.998)
    for labels in run.batches(len(classes) * BATCH, BATCH):
        labels = labels % len(classes)
        pixels = avg_pool2d(world.render(some_scenes(rng, own, labels.tolist())) * 2 - 1, 128 // SIZE)
        pixels = pixels + NOISE * torch.rand(BATCH, 1, 1, 1) * torch.randn_like(pixels)
        with in_half():
            logits = model(pixel_values=pixels).logits.float()
        right = (logits.argmax(1) == labels).float().mean()
        run.step(cross_entropy(logits, labels, label_smoothing=SMOOTHED), right=right)
    run.save(given.out)


if __name__ == "__main__":
    main()
