"""How fast each precision and option is, and how far its pictures are from float32's: turn by turn, in one process."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from app.local import LocalService
from app.schemas import Parameters
from models.catalog import Catalog, Dtype, ModelCard, Speed
from models.families import FAMILIES
from models.loading import load_parts, load_pipeline
from models.prepare import decided
from models.program import Call, Inputs
from workers.curve import example_calls, tiled
from workers.engine import Engine

MODELS = ("emoji-sd", "emoji-unclip", "emoji-classes")
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "float32, channels_last": ("float32", {"channels_last": "both"}),
    "bfloat16": ("bfloat16", {}),
    "bfloat16, channels_last": ("bfloat16", {"channels_last": "both"}),
    "bfloat16, fused_qkv": ("bfloat16", {"fused_qkv": True}),
    "bfloat16, storage float8": ("bfloat16", {"storage": "float8"}),
    "bfloat16, compile regional": ("bfloat16", {"compile": "regional"}),
    "bfloat16, compile whole": ("bfloat16", {"compile": "whole"}),
}
ROUNDS, DENOISED, DECODED, DRAWN, STEPS = 5, 16, 8, 8, 20


def run(_: LocalService) -> None:
    precisions()
    threads()


def precisions() -> None:
    print(f"\nms a row: denoiser at {DENOISED} rows, decoder at {DECODED}; pictures of {STEPS} steps")
    print("| model | precision | denoiser | × | decoder | × | mean, largest difference of 255 |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in MODELS:
        card = Catalog.read([name]).default
        options = OPTIONS if name == "emoji-sd" else {how: OPTIONS[how] for how in OPTIONS if "," not in how}
        models = {how: load(card, *given) for how, given in options.items()}
        passes = {how: passes_of(model) for how, model in models.items()}
        seconds = {how: list[tuple[float, float]]() for how in models}
        for _ in range(ROUNDS):
            for how, (denoise, decode) in passes.items():
                seconds[how].append((timed(denoise) / DENOISED, timed(decode) / DECODED))
        exact, first = pictures(models["float32"]), seconds["float32"]
        for how, model in models.items():
            apart = (pictures(model) - exact).abs() * 255
            cells = [f"| {name} | {how} "]
            for k in range(2):
                mine, theirs = [pair[k] for pair in seconds[how]], [pair[k] for pair in first]
                ratio = statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
                cells.append(f"| {1000 * statistics.median(mine):.2f} | {ratio:.2f} ")
            print("".join(cells) + f"| {apart.mean():.2f}, {apart.max():.0f} |", flush=True)


def load(card: ModelCard, dtype: str, speed: dict[str, Any]) -> Any:
    card = card.model_copy(update={"dtype": Dtype(cpu=dtype), "speed": Speed(**speed)})  # pyright: ignore[reportArgumentType]
    return FAMILIES[card.family](card, load_pipeline(card, "cpu"), load_parts(card, "cpu"))


def passes_of(model: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    def wide(call: Call, rows: int) -> Callable[[], Any]:
        columns = tiled(call, rows).columns
        arguments = columns.arguments(columns.batched)
        return lambda: call.net.run(**arguments)

    with torch.no_grad():
        step, decode = example_calls(model)
        made = wide(step, DENOISED), wide(decode, DECODED)
        for one in made:
            one()
    return made


def timed(one: Callable[[], Any]) -> float:
    with torch.no_grad():
        began = time.perf_counter()
        one()
    return time.perf_counter() - began


def pictures(model: Any) -> Tensor:
    card, engine = model.card, Engine()
    defaults = card.defaults
    asked = {
        "model": card.name,
        "prompt": "a small rocket on a dark blue background",
        "width": card.size.width,
        "height": card.size.height,
        "num_inference_steps": defaults.num_inference_steps if card.sampling else STEPS,
        "guidance_scale": defaults.guidance_scale,
        "scheduler": defaults.scheduler,
    }
    if card.classes:
        asked["prompt"] = card.classes[0]
    requests = [Parameters.model_validate(asked | {"seed": seed}) for seed in range(DRAWN)]
    tickets = [engine.submit(model.draw(r, r.seed, Inputs())) for r in requests]
    while engine:
        engine.step()
    return torch.stack([ticket.result for ticket in tickets])


def threads() -> None:
    """Rows a second through emoji-sd's denoiser by the threads that torch is given (DARKROOM_TORCH_THREADS)."""
    card = Catalog.read(["emoji-sd"]).default
    denoise, _ = passes_of(load(card, decided(card, "cpu").dtype.cpu, {}))
    own = torch.get_num_threads()
    counts = sorted({1, *(2**i for i in range(10) if 2**i <= own), own, 2 * own})
    seconds = {count: list[float]() for count in counts}
    for _ in range(ROUNDS):
        for count in counts:
            torch.set_num_threads(count)
            seconds[count].append(timed(denoise))
    torch.set_num_threads(own)
    print(f"\ntorch's own choice is {own} threads\n| threads | rows/s at {DENOISED} rows |\n|---|---|")
    for count in counts:
        print(f"| {count} | {DENOISED / statistics.median(seconds[count]):.1f} |")
