"""Without HTTP: the stock pipeline, and one step of our net eager, as graphs, and compiled; for `bench/gpu.sh`.

    python -m bench.nets emoji-sd --device cuda --rows 2,8,64

Prints a line as soon as it is measured, so that a run cut off is a shorter run.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.ceilings import measured
from bench.mixes import Model, requests
from bench.peers.drawing import Stock, catalog_of
from bench.peers.plan import Plan
from models.catalog import Catalog, ModelCard
from models.families import FAMILIES
from models.loading import load_parts, load_pipeline
from workers.curve import example_calls, tiled, timed
from workers.graphs import Graphs
from workers.passes import Eager, Runner

TRIES = 10


def ways(card: ModelCard, device: str, wanted: list[str]) -> Iterator[tuple[str, ModelCard, Runner]]:
    eager = Eager(torch.device(device))
    on_gpu = device.startswith("cuda")
    runner = Graphs() if on_gpu else eager
    for way in wanted:
        if way == "eager":
            yield way, card, eager
        elif way == "graphs" and on_gpu:
            yield way, card, runner
        elif way in ("regional", "reduce-overhead"):  # the second records graphs of its own
            speed = card.speed.model_copy(update={"compile": way})
            yield way, card.model_copy(update={"speed": speed}), runner if way == "regional" else eager


def stock(plan: Plan, model: Model, steps: int, batches: list[int]) -> None:
    draw = Stock(catalog_of(plan), plan.device)
    for batch in batches:
        asked = [one | {"num_inference_steps": steps} for one in requests("a", model, batch, 0)]
        draw([one | {"num_inference_steps": 2} for one in asked])  # kernels are chosen at the first
        began = time.perf_counter()
        draw(asked)
        took = time.perf_counter() - began
        print(f"| stock pipeline, {steps} steps | {batch} pictures | {took:.3f} s | {batch / took:.2f}/s |", flush=True)


def passes(card: ModelCard, device: str, runner: Runner, rows: list[int], way: str, found: dict[str, Any]) -> None:
    resident = FAMILIES[card.family](card, load_pipeline(card, device), load_parts(card, device))
    with torch.no_grad():
        step, decode = example_calls(resident)
        for net, call, wanted in ((resident.denoiser, step, rows), (resident.decoder, decode, [1, 4])):
            for n in wanted:
                if n % call.rows:
                    continue
                wide = tiled(call, n)
                for _ in range(runner.prepares):
                    timed(net, wide, runner)
                seconds = min(timed(net, wide, runner) for _ in range(TRIES))
                tflop = n * found["row_tflop" if net is resident.denoiser else "decode_tflop"]
                mfu = tflop / seconds / found["matmul_tflops"]
                print(f"| {net.name}, {way} | {n} rows | {1000 * seconds:.2f} ms | MFU {mfu:.0%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.nets")
    parser.add_argument("model")
    parser.add_argument("--cards")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", default="2,4,8,16")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ways", default="stock,eager,graphs,regional")
    given = parser.parse_args()
    plan = Plan([given.model], given.cards, given.device)
    torch.set_grad_enabled(False)
    catalog: Catalog = catalog_of(plan)
    card, found, wanted = catalog.default, measured(plan), given.ways.split(",")
    model = Model(card.name, card.name, card.size.width, card.defaults.scheduler)
    print(f"\n{card.name} on {given.device}, {found['dtype']}: product {found['matmul_tflops']:.3g} TFLOP/s, ", end="")
    print(f"copy {1000 * found['copy_tbs']:.4g} GB/s, a row {found['row_tflop']:.4g} TFLOP\n")
    print("| | | takes | |\n|---|---|---|---|", flush=True)
    if "stock" in wanted:
        stock(plan, model, given.steps, [int(n) for n in given.batches.split(",")])
    for way, dressed, runner in ways(card, given.device, wanted):
        try:
            passes(dressed, given.device, runner, [int(n) for n in given.rows.split(",")], way, found)
        except Exception as error:  # the other ways are worth having without this one
            print(f"| {way} | | {type(error).__name__}: {str(error)[:200]} | |", flush=True)


if __name__ == "__main__":
    main()
