"""`python -m tests.bench.cascades`: what guidance, thresholding and a language model do for the pixel models.

Writes docs/glide.png, docs/thresholding.png, docs/imagen.png and docs/cascades.png, and prints the figures of the
models' page.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from app.plot import Panel, draw
from models.program import Inputs
from models.scoring import Scorer
from tests.bench.guided import DOCS, NOTHING, asked, pictures, resident, sheet

CAPTIONS = [
    f"a {thing} on a {colour} background"
    for thing in ("red apple", "penguin", "rocket", "cactus", "lemon", "car", "rose", "owl")
    for colour in ("blue", "yellow", "pink")
]
SHOWN = ["a red apple on a blue background", "a penguin on a yellow background", "a rocket on a dark blue background",
         "a cactus", "a pizza on a green background", "a lemon next to a strawberry", "a car", "an owl"]  # fmt: skip
STEPS = 12
SYNONYMS = {  # words that no training caption has, and what those have instead
    "pooch": "dog", "hound": "dog", "feline": "cat", "airliner": "airplane", "vessel": "ship", "residence": "house",
    "citadel": "castle", "fort": "castle", "brolly": "umbrella", "tome": "book", "textbook": "book", "hog": "pig",
    "swine": "pig", "hare": "rabbit", "pony": "horse", "stallion": "horse", "viper": "snake", "chimp": "monkey",
    "bovine": "cow", "wasp": "bee", "arachnid": "spider", "gateau": "cake", "grizzly": "bear", "salmon": "fish",
    "trout": "fish", "cephalopod": "octopus",
}  # fmt: skip


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


def synonyms() -> None:
    """What is drawn for words that training never saw, judged by those that it did."""
    scorer, names = Scorer(), sorted(set(SYNONYMS.values()))
    known, new = list(SYNONYMS.values()), list(SYNONYMS)
    captions = scorer.captions([f"a {name}" for name in names])
    shown = list[list[Image.Image]]()
    print("\n| words | text encoder | right one of the things found first | CLIP agreement |\n|---|---|---|---|")
    for name, encoder in (("emoji-glide", "its own, trained on the captions"), ("emoji-imagen", "a language model")):
        model = resident(name)
        for kind, words in (("of training", known), ("never seen", new)):
            drawn = row(model, [f"a {word}" for word in words], guidance_scale=3.0)
            likeness = scorer.pictures(drawn) @ captions.T
            right = torch.tensor([names.index(one) for one in known])
            found = float((likeness.argmax(1) == right).float().mean())
            agrees = float(likeness.gather(1, right[:, None]).mean())
            print(f"| {kind} | {encoder} | {found:.2f} | {agrees:.3f} |", flush=True)
            shown.append(drawn[::3])
    sheet(shown, DOCS / "imagen.png")


if __name__ == "__main__":
    with torch.no_grad():
        draw(glide() + thresholding(), DOCS / "cascades.png")
        synonyms()
