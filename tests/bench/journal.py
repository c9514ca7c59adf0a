"""What the journal costs: the same pictures drawn with and without one, turn by turn, in one process."""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from app.local import LocalService
from app.schemas import Parameters
from app.settings import Settings
from app.storage import open_store
from models.catalog import Catalog
from models.loading import load_pipeline
from models.program import Inputs
from models.stable_diffusion import StableDiffusion
from workers.engine import Engine
from workers.journal import Journal, Record

STEPS, ROUNDS = 20, 12


def run(_: LocalService) -> None:
    card = Catalog.read(Settings().models).default
    model = StableDiffusion(card, load_pipeline(card, "cpu"))
    print("\n| in flight | step without, ms | with, ms | ratio, median (quartiles) |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(open_store(Path(folder).as_uri()), torch.device("cpu"), Settings().journal_interval, 2**30)
        for crowd in (1, 6):
            drawn(model, crowd, None)
            pairs = [(drawn(model, crowd, None), drawn(model, crowd, journal)) for _ in range(ROUNDS)]
            ratios = statistics.quantiles([with_one / without for without, with_one in pairs], n=4)
            without, with_one = (1000 * statistics.median(pair[i] for pair in pairs) for i in range(2))
            print(
                f"| {crowd} | {without:.1f} | {with_one:.1f} | {ratios[1]:.3f} ({ratios[0]:.3f} to {ratios[2]:.3f}) |"
            )
        journal.close()


def drawn(model: StableDiffusion, crowd: int, journal: Journal | None) -> float:
    """Seconds a step of a crowd."""
    card, records = model.card, dict[object, Record]()

    def note(ticket: object, outputs: object) -> None:
        if journal:
            journal.note(records[ticket], ticket.calls, outputs)  # type: ignore[attr-defined]

    engine = Engine(note=note)
    began = time.perf_counter()
    for i in range(crowd):
        request = {"model": card.name, "prompt": "a red apple", "seed": i, "num_inference_steps": STEPS}
        defaults = {
            "width": card.size.width,
            "height": card.size.height,
            "guidance_scale": 3.0,
            "scheduler": "dpmpp_2m",
        }
        ticket = engine.submit(model.draw(Parameters.model_validate(request | defaults), i, Inputs()))
        records[ticket] = Record(f"{i:032x}", 0, 1, b"k" * 32)
    while engine:
        engine.step()
    return (time.perf_counter() - began) / STEPS
