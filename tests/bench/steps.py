"""`python -m tests.bench.steps`: what fewer steps and less guidance cost in quality, and save in time, with emoji-sd.

Writes docs/steps.png. Settings take turns at each eight captions, so that all share what else the machine does.
"""

import sys
import time
from typing import Any

import torch
from torch import Tensor

from app.plot import Panel, draw
from app.schemas import Parameters
from models.catalog import Catalog
from models.loading import load_pipeline
from models.prepare import decided
from models.scoring import Scorer
from models.stable_diffusion import StableDiffusion
from tests.bench.guided import DOCS, NOTHING, asked
from tests.test_stable_diffusion import as_image
from workers.engine import Engine

THINGS = ("owl", "snail", "guitar", "castle", "pear", "drum", "rocket", "whale")
COLOURS = ("dark blue", "yellow", "pink")
CAPTIONS = [f"a {thing} on a {colour} background" for thing in THINGS for colour in COLOURS]
AT_ONCE = 8
WHOLE = {"num_inference_steps": 20}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "steps": {str(n): {"num_inference_steps": n} for n in (2, 4, 6, 8, 12, 16, 20)},
    "guided first": {f"0 to {b:g}": WHOLE | {"guidance": {"interval": [0.0, b]}} for b in (0.5, 0.75)},
    "guided later": {f"0.25 to {b:g}": WHOLE | {"guidance": {"interval": [0.25, b]}} for b in (0.75, 1.0)},
    "every": {str(n): WHOLE | {"guidance": {"every": n}} for n in (2, 3, 5)},
    "unguided": {"": WHOLE | {"guidance_scale": 1.0}},
}


def main() -> None:
    card = decided(Catalog.read(["emoji-sd"]).default, "cpu")
    model, scorer = StableDiffusion(card, load_pipeline(card, "cpu")), Scorer()
    found = {(kind, name): [list[Tensor](), 0.0, 0] for kind, some in SETTINGS.items() for name in some}
    for begin in range(0, len(CAPTIONS), AT_ONCE):
        print(f"  {begin} of {len(CAPTIONS)} captions", file=sys.stderr, flush=True)
        for kind, some in SETTINGS.items():
            for name, given in some.items():
                captions = CAPTIONS[begin : begin + AT_ONCE]
                requests = [asked(model, prompt=one, seed=begin + i, **given) for i, one in enumerate(captions)]
                drawn, seconds, rows = timed(model, requests)
                totals = found[kind, name]
                found[kind, name] = [totals[0] + drawn, totals[1] + seconds, totals[2] + rows]
    whole, whole_seconds, _ = found["steps", "20"]
    captions = scorer.captions(CAPTIONS)
    agreement, distance = ({kind: list[tuple[float, float]]() for kind in SETTINGS} for _ in range(2))
    print("| | | rows a picture | time, of 20 steps | caption found first | CLIP agreement | levels from 20 steps |")
    print("|---|---|---|---|---|---|---|")
    for (kind, name), (drawn, seconds, rows) in found.items():
        likeness = scorer.pictures([as_image(one) for one in drawn]) @ captions.T
        first = float((likeness.argmax(1) == torch.arange(len(CAPTIONS))).float().mean())
        agrees = float(likeness.diagonal().mean())
        apart = float((torch.stack(drawn) - torch.stack(whole)).abs().mean()) * 255
        each = rows / len(CAPTIONS)
        agreement[kind].append((each, agrees))
        distance[kind].append((each, apart))
        shares = f"{each:.0f} | {seconds / whole_seconds:.2f} | {first:.3f} | {agrees:.3f} | {apart:.1f}"
        print(f"| {kind} | {name} | {shares} |", flush=True)
    across = "rows of the denoiser that a picture takes (20 guided steps: 40)"
    panels = [("CLIP agreement", agreement), ("Levels of 255 from the picture of 20 steps", distance)]
    draw(
        [
            Panel(title, across, {kind: sorted(some) for kind, some in curves.items() if kind != "unguided"})
            for title, curves in panels
        ],
        DOCS / "steps.png",
    )


def timed(model: Any, requests: list[Parameters]) -> tuple[list[Tensor], float, int]:
    """Their pictures, the seconds that all of them took, and the rows of the denoiser."""
    rows = list[int]()
    engine = Engine(lambda done: rows.append(done.rows) if done.net is model.denoiser else None)
    began = time.perf_counter()
    tickets = [engine.submit(model.draw(r, r.seed, NOTHING)) for r in requests]
    while engine:
        engine.step()
    seconds = time.perf_counter() - began
    return [ticket.result for ticket in tickets if ticket.result is not None], seconds, sum(rows)


if __name__ == "__main__":
    with torch.no_grad():
        main()
