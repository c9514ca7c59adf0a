"""`python -m tests.bench.cascades`: what guidance and thresholding do for the pixel model.

Writes docs/glide.png, docs/thresholding.png and docs/cascades.png, and prints the figures of the models' page.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from models.program import Inputs
from models.scoring import Scorer
from tests.bench.guided import DOCS, NOTHING, asked, pictures, resident, sheet
from tests.chaos.plot import Panel, draw

CAPTIONS = [
    f"a {thing} on a {colour} background"
    for thing in ("red apple", "penguin", "rocket", "cactus", "lemon", "car", "rose", "owl")
    for colour in ("blue", "yellow", "pink")
]
SHOWN = ["a red apple on a blue background", "a penguin on a yellow background", "a rocket on a dark blue background",
         "a cactus", "a pizza on a green background", "a lemon next to a strawberry", "a car", "an owl"]  # fmt: skip
STEPS = 12


def agreement(scorer: Scorer, drawn: list[Image.Image], captions: list[str]) -> float:
    return float((scorer.pictures(drawn) * scorer.captions(captions)).sum(-1).mean())


def saturated(drawn: list[Image.Image]) -> float:
    """The part of all values that is quite black or quite white."""
    values = np.stack([np.asarray(one) for one in drawn])
    return float(((values <= 1) | (values >= 254)).mean())


def row(model: Any, captions: list[str], **given: Any) -> list[Image.Image]:
    ask = {"num_inference_steps": STEPS} | given
    return pictures(model, [(asked(model, prompt=one, seed=i, **ask), NOTHING) for i, one in enumerate(captions)])


def glide() -> list[Panel]:
    """CLIP agreement over the scale of either guidance, and what inpainting leaves and makes."""
    model, scorer = resident("emoji-glide"), Scorer()
    kinds: dict[str, Any] = {
        "classifier-free": lambda scale: {"guidance_scale": 1.0 + scale},
        "CLIP": lambda scale: {"guidance_scale": 1.0, "guidance": {"clip": scale}},
    }
    curves: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    print("| guidance | scale | CLIP agreement |\n|---|---|---|")
    for kind, given in kinds.items():
        for scale in (0.0, 1.0, 2.0, 4.0, 8.0):
            agrees = agreement(scorer, row(model, CAPTIONS, **given(scale)), CAPTIONS)
            curves[kind].append((scale, agrees))
            print(f"| {kind} | {scale:g} | {agrees:.3f} |", flush=True)
    free = row(model, SHOWN, guidance_scale=3.0)
    hole = Image.new("L", (128, 128), 0)
    ImageDraw.Draw(hole).rectangle((28, 28, 100, 100), fill=255)
    given = {"image": "given", "mask": "given", "strength": 1.0, "guidance_scale": 3.0, "num_inference_steps": 20}
    things = [SHOWN[i - 1] for i in range(len(SHOWN))]
    repainted = pictures(
        model,
        [(asked(model, prompt=things[i], seed=i, **given), Inputs(one, hole)) for i, one in enumerate(free)],
    )
    holes = [Image.composite(Image.new("RGB", one.size, "gray"), one, hole) for one in free]
    sheet([row(model, SHOWN, guidance_scale=1.0), free, holes, repainted], DOCS / "glide.png")
    kept = [np.array_equal(np.asarray(a)[np.asarray(hole) == 0], np.asarray(b)[np.asarray(hole) == 0])
            for a, b in zip(free, repainted, strict=True)]  # fmt: skip
    print(f"\ninpainting: every value outside the hole kept in {sum(kept)} of {len(kept)} pictures; "
          f"agreement with the new prompt {agreement(scorer, repainted, things):.3f}, "
          f"of the old pictures with it {agreement(scorer, free, things):.3f}")  # fmt: skip
    return [Panel("emoji-glide: CLIP agreement", "scale (of classifier-free guidance: s - 1)", curves)]


def thresholding() -> list[Panel]:
    """Saturation over the guidance scale, with either kind of thresholding."""
    model, scorer = resident("emoji-glide"), Scorer()
    curves: dict[str, list[tuple[float, float]]] = {"static": [], "dynamic": []}
    print("\n| guidance_scale | saturated values: static | dynamic (0.9) | CLIP agreement: static | dynamic |")
    print("|---|---|---|---|---|")
    dynamic = {"guidance": {"dynamic_threshold": 0.9}}
    for scale in (1.0, 3.0, 6.0, 12.0, 20.0):
        drawn = [row(model, CAPTIONS, guidance_scale=scale, **given) for given in ({}, dynamic)]
        for kind, some in zip(curves, drawn, strict=True):
            curves[kind].append((scale, saturated(some)))
        figures = [*map(saturated, drawn), *(agreement(scorer, some, CAPTIONS) for some in drawn)]
        print(f"| {scale:g} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |", flush=True)
    shown = [row(model, SHOWN, guidance_scale=scale, **given) for scale in (6.0, 15.0) for given in ({}, dynamic)]
    sheet(shown, DOCS / "thresholding.png")
    return [Panel("emoji-glide: values quite black or white", "guidance_scale", curves)]


if __name__ == "__main__":
    with torch.no_grad():
        draw(glide() + thresholding(), DOCS / "cascades.png")
