"""Images a second through the whole service: against diffusers' own pipeline in a loop, and the measured curve."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from app.local import LocalService
from app.settings import Settings
from models.catalog import Catalog
from models.loading import load_pipeline
from models.program import generator

STEPS, GUIDANCE = 20, 3.0
PROMPT = "a small rocket in the top left corner on a dark blue background, twemoji style"
IN_FLIGHT = {1: 5, 4: 12, 8: 24, 16: 32}  # how many at once, of how many in all
ROUNDS = 3


def run(service: LocalService) -> None:
    pipeline = load_pipeline(Catalog.read(Settings().models).default, "cpu")
    http = httpx2.Client(base_url=service.url, timeout=120)
    curve = pass_seconds(http)
    stock_loop(pipeline, 1)
    rates: dict[int, list[float]] = {n: [] for n in IN_FLIGHT}
    ratios: dict[int, list[float]] = {n: [] for n in IN_FLIGHT}
    loops: list[float] = []
    for i in range(ROUNDS):
        loops.append(before := stock_loop(pipeline, 5))
        for n, count in IN_FLIGHT.items():
            rate = through_service(http, n, count)
            loops.append(after := stock_loop(pipeline, 2))
            rates[n].append(rate)
            ratios[n].append(rate / ((before + after) / 2))
            before = after
            print(
                f"  round {i + 1} of {ROUNDS}: {n:2} in flight {rate:.2f} images/s, {ratios[n][-1]:.2f} × the loop",
                flush=True,
            )
    print(f"\nstock pipeline in a loop: {statistics.median(loops):.2f} images/s ({STEPS} steps, guidance {GUIDANCE})")
    print("| in flight | images/s | × the stock loop | of the curve's ideal |\n|---|---|---|---|")
    for n in IN_FLIGHT:
        rate, ratio, best = statistics.median(rates[n]), statistics.median(ratios[n]), ideal(curve, n)
        spread = f"{min(ratios[n]):.2f} to {max(ratios[n]):.2f}"
        print(f"| {n} | {rate:.2f} | {ratio:.2f} ({spread}) | {rate / best:.0%} |")


def stock_loop(pipeline, count: int) -> float:
    began = time.perf_counter()
    for seed in range(count):
        pipeline(
            PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator(seed), output_type="pil"
        )
    return count / (time.perf_counter() - began)


def through_service(http: httpx2.Client, in_flight: int, count: int) -> float:
    def one(seed: int) -> None:
        body = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": seed}
        done = http.post("/v1/generations", json=body, headers={"Prefer": "wait=60"}).json()
        assert done["status"] == "succeeded", done
        assert http.get(done["images"][0]["url"]).status_code == 200

    with ThreadPoolExecutor(in_flight) as clients:
        began = time.perf_counter()
        list(clients.map(one, range(count)))
        return count / (time.perf_counter() - began)


def pass_seconds(http: httpx2.Client) -> dict[str, dict[int, float]]:
    """{net: {rows: seconds}} as the worker measured at warm-up."""
    curves: dict[str, dict[int, float]] = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        if family.name == "darkroom_pass_seconds":
            for sample in family.samples:
                curves.setdefault(sample.labels["net"], {})[int(sample.labels["rows"])] = sample.value
    return curves


def ideal(curves: dict[str, dict[int, float]], in_flight: int) -> float:
    """Images a second if nothing took time but the passes, at the cheapest row count that so many can fill."""
    denoise, decode = curves["denoise"], curves["decode"]
    wanted = 2 * in_flight  # with guidance, an image has two rows
    a_row = min(seconds / min(rows, wanted) for rows, seconds in denoise.items())
    return 1 / (STEPS * 2 * a_row + min(seconds / rows for rows, seconds in decode.items()))
