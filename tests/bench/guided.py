"""`python -m tests.bench.guided`: what guidance does, over its scale, and contact sheets of the small models.

Writes docs/guidance.png, docs/classes.png and docs/unclip.png, and prints the figures of the models' page.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from app.plot import Panel, draw
from app.schemas import Parameters
from models.catalog import Catalog
from models.families import FAMILIES
from models.loading import load_parts, load_pipeline
from models.program import Call, Inputs
from models.scoring import Judge, Scorer
from models.unclip import of_variance_one
from workers.engine import Engine

DOCS = Path(__file__).parents[2] / "docs"
SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
STEPS = 10
SHOWN = ("owl", "snail", "guitar", "castle", "pear", "drum", "rocket", "whale")
NOTHING = Inputs()


def resident(name: str) -> Any:
    card = Catalog.read([name])[name]
    return FAMILIES[card.family](card, load_pipeline(card, "cpu"), load_parts(card, "cpu"))


def asked(model: Any, **given: Any) -> Parameters:
    card = model.card
    defaults = {"width": card.size.width, "height": card.size.height, "num_inference_steps": STEPS, "seed": 0}
    return Parameters.model_validate(
        {"model": card.name, "scheduler": "dpmpp_2m", "guidance_scale": 3.0} | defaults | given
    )


def pictures(model: Any, requests: Sequence[tuple[Parameters, Inputs]]) -> list[Image.Image]:
    engine = Engine()
    tickets = [engine.submit(model.draw(r, r.seed, inputs)) for r, inputs in requests]
    while engine:
        engine.step()
    drawn = list[Image.Image]()
    for ticket in tickets:
        if ticket.result is None:
            raise ticket.error or RuntimeError("nothing was drawn")
        drawn.append(Image.fromarray((ticket.result.permute(1, 2, 0) * 255).round().byte().numpy()))
    return drawn


def sheet(rows: Sequence[Sequence[Image.Image]], path: Path) -> None:
    size = rows[0][0].width + 4
    whole = Image.new("RGB", (size * max(map(len, rows)), size * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            whole.paste(picture, (x * size + 2, y * size + 2))
    whole.save(path, optimize=True)


def guided() -> None:
    """What an independent classifier recognizes, and CLIP's agreement, for each kind of guidance over its scale."""
    model, scorer, judge = resident("emoji-classes"), Scorer(), Judge()
    classes = model.card.classes
    captions = scorer.captions(classes)
    kinds: dict[str, Any] = {
        "classifier": lambda scale: {"guidance_scale": 1.0, "guidance": {"classifier": scale}},
        "CLIP": lambda scale: {"guidance_scale": 1.0, "guidance": {"clip": scale}},
        "classifier-free": lambda scale: {"guidance_scale": 1.0 + scale},
    }
    agreement: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    accuracy: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    shown = list[list[Image.Image]]()
    print("| guidance | scale | right class | CLIP agreement |\n|---|---|---|---|")
    for kind, given in kinds.items():
        for scale in SCALES:
            requests = [(asked(model, prompt=name, seed=i, **given(scale)), NOTHING) for i, name in enumerate(classes)]
            drawn = pictures(model, requests)
            likeness = scorer.pictures(drawn) @ captions.T
            right = float((judge(drawn).argmax(1) == torch.arange(len(classes))).float().mean())
            agrees = float(likeness.diagonal().mean())
            accuracy[kind].append((scale, right))
            agreement[kind].append((scale, agrees))
            print(f"| {kind} | {scale:g} | {right:.3f} | {agrees:.3f} |", flush=True)
            if kind == "classifier" and scale in (0.0, 2.0, 8.0):
                shown.append([drawn[classes.index(name)] for name in SHOWN])
    across = "scale (of classifier-free guidance: s - 1)"
    draw(
        [
            Panel("right class, as emoji-judge judges", across, accuracy),
            Panel("CLIP agreement", across, agreement),
        ],
        DOCS / "guidance.png",
    )
    sheet(shown, DOCS / "classes.png")


def unclip() -> None:
    """Text-to-image, variations, interpolation between captions and between pictures, and moving by captions."""
    model, source = resident("emoji-unclip"), resident("emoji-sd")
    captions = ["a red apple on a blue background", "a penguin on a yellow background", "a rocket", "a cactus",
                "a pizza on a green background", "a pumpkin", "a dog on a pink background"]  # fmt: skip
    given = pictures(source, [(asked(source, prompt=one, num_inference_steps=20), NOTHING) for one in captions[:2]])
    mixes = [i / 6 for i in range(7)]
    variation = {"task": "variation", "image": "given"}
    moved = variation | {"prompt": captions[0], "end_prompt": "a red apple on a yellow background"}
    ends = {"task": "interpolate", "image": "given", "end_image": "given"}
    between = {"prompt": captions[0], "end_prompt": captions[1]}

    def row(requests: list[tuple[dict[str, Any], Inputs]]) -> list[Image.Image]:
        return pictures(model, [(asked(model, num_inference_steps=20, **one), inputs) for one, inputs in requests])

    sheet(
        [
            row([({"prompt": one, "seed": 1}, NOTHING) for one in captions]),
            [given[0], *row([(variation | {"seed": seed}, Inputs(given[0])) for seed in range(6)])],
            row([(between | {"mix": mix, "seed": 3}, NOTHING) for mix in mixes]),
            row([(ends | {"mix": mix, "seed": 3}, Inputs(given[0], None, given[1])) for mix in mixes]),
            [given[0], *row([(moved | {"mix": 0.08 * i, "seed": 5}, Inputs(given[0])) for i in range(6)])],
        ],
        DOCS / "unclip.png",
    )


def prior_against_text() -> None:
    """Unseen captions found in what is drawn from the prior, and from the caption's own embedding."""
    model, scorer = resident("emoji-unclip"), Scorer()
    things = ("kite", "lemon", "t shirt", "rose", "llama", "hedgehog", "giraffe", "strawberry")
    colours = ("brown", "red", "teal", "dark blue", "pink", "green", "gray", "orange")
    told = [f"a {thing} on a {colour} background" for thing in things for colour in colours]
    captions = scorer.captions(told)

    def found(drawn: list[Image.Image]) -> tuple[float, float]:
        likeness = scorer.pictures(drawn) @ captions.T
        return float((likeness.argmax(1) == torch.arange(len(told))).float().mean()), float(likeness.diagonal().mean())

    requests = [(asked(model, prompt=one, seed=i), NOTHING) for i, one in enumerate(told)]
    print("\n| decoder is told | caption found first | CLIP agreement |\n|---|---|---|")
    print("| what the prior drew | {:.3f} | {:.3f} |".format(*found(pictures(model, requests))), flush=True)
    model.embedding = lambda r, *_: own_embedding(model, r)
    print("| the caption's own embedding | {:.3f} | {:.3f} |".format(*found(pictures(model, requests))))


def own_embedding(model: Any, r: Parameters) -> Any:
    caption: Tensor = yield Call(model.caption_encoder, {"input_ids": model.tokens([r.prompt])}, 1)
    return of_variance_one(caption)


if __name__ == "__main__":
    with torch.no_grad():
        unclip()
        prior_against_text()
        guided()
