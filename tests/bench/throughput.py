"""Images a second through the whole service: against diffusers' own pipeline in a loop, and the measured curve."""

import statistics
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from app.local import LocalService
from app.settings import Settings
from bench.ceilings import pass_seconds
from models.catalog import Catalog
from models.loading import load_pipeline
from models.prepare import decided
from models.program import generator

STEPS, GUIDANCE = 20, 3.0
PROMPT = "a small rocket in the top left corner on a dark blue background, twemoji style"
IN_FLIGHT = {1: 6, 4: 24, 8: 48, 16: 80}  # how many at once, of how many in all
ROUNDS = 3


def run(service: LocalService) -> None:
    card = Catalog.read(Settings().models).default
    pipeline, ours = (load_pipeline(one, "cpu") for one in (card, decided(card, "cpu")))
    http = httpx2.Client(base_url=service.url, timeout=120)
    curve = pass_seconds(http)
    for one in (pipeline, ours):
        stock_loop(one, 1)
    rates: dict[int, list[float]] = {n: [] for n in IN_FLIGHT}
    ratios: dict[int, list[float]] = {n: [] for n in IN_FLIGHT}
    loops: list[float] = []
    as_ours: list[float] = []
    shares: dict[int, Shares] = {n: Shares() for n in IN_FLIGHT}
    for i in range(ROUNDS):
        as_ours.append(stock_loop(ours, 5))
        loops.append(before := stock_loop(pipeline, 5))
        for n, count in IN_FLIGHT.items():
            began, started = Spent.of(http), time.perf_counter()
            rate = through_service(http, n, count)
            shares[n].add(time.perf_counter() - started, Spent.of(http) - began, curve)
            loops.append(after := stock_loop(pipeline, 2))
            rates[n].append(rate)
            ratios[n].append(rate / ((before + after) / 2))
            before = after
            print(
                f"  round {i + 1} of {ROUNDS}: {n:2} in flight {rate:.2f} images/s, {ratios[n][-1]:.2f} × the loop",
                flush=True,
            )
    print(f"\nstock pipeline in a loop, as it is loaded: {statistics.median(loops):.2f} images/s in float32")
    print(f"and in the precision of the service, {ours.dtype}: {statistics.median(as_ours):.2f}")
    print(f"{STEPS} steps, guidance {GUIDANCE}")
    print("| in flight | images/s | × the stock loop | of the curve's ideal |\n|---|---|---|---|")
    for n in IN_FLIGHT:
        rate, ratio, best = statistics.median(rates[n]), statistics.median(ratios[n]), ideal(curve, n)
        spread = f"{min(ratios[n]):.2f} to {max(ratios[n]):.2f}"
        print(f"| {n} | {rate:.2f} | {ratio:.2f} ({spread}) | {rate / best:.0%} |")
    print("\n| in flight | denoising | decoding | text | between passes | rows a pass | a pass, × at warm-up |")
    print("|---|---|---|---|---|---|---|")
    for n, share in shares.items():
        print(f"| {n} | {share.line()} |")


@dataclass
class Spent:
    """What a worker has done so far: seconds of passes, and how many passes of so many rows."""

    seconds: dict[str, float]
    rows: Counter[int]

    @classmethod
    def of(cls, http: httpx2.Client) -> "Spent":
        seconds, up_to = defaultdict[str, float](float), Counter[int]()
        for family in text_string_to_metric_families(http.get("/metrics").text):
            for sample in family.samples:
                if sample.name == "darkroom_stage_duration_seconds_sum":
                    seconds[sample.labels["stage"]] += sample.value
                if sample.name == "darkroom_batch_rows_bucket" and sample.labels["le"] != "+Inf":
                    up_to[int(float(sample.labels["le"]))] += int(sample.value)
        rows = Counter({n: up_to[n] - up_to[below] for below, n in pairwise([0, *sorted(up_to)])})
        return cls(seconds, rows)

    def __sub__(self, before: "Spent") -> "Spent":
        since = {stage: seconds - before.seconds.get(stage, 0) for stage, seconds in self.seconds.items()}
        return Spent(since, self.rows - before.rows)


@dataclass
class Shares:
    """Where the seconds went in which so many were in flight."""

    wall: float = 0.0
    expected: float = 0.0  # of denoising, had each pass taken what it took at warm-up
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict[str, float](float))
    rows: Counter[int] = field(default_factory=Counter[int])

    def add(self, wall: float, spent: Spent, curve: dict[str, dict[int, float]]) -> None:
        self.wall += wall
        for stage, seconds in spent.seconds.items():
            self.seconds[stage] += seconds
        self.rows += spent.rows
        for rows, passes in spent.rows.items():
            self.expected += passes * curve["denoise"][min(width for width in curve["denoise"] if width >= rows)]

    def line(self) -> str:
        denoising, decoding, text = (self.seconds[net] for net in ("denoise", "decode", "encode_text"))
        between = self.wall - denoising - decoding - text
        shares = " | ".join(f"{seconds / self.wall:.0%}" for seconds in (denoising, decoding, text, between))
        a_pass = sum(rows * passes for rows, passes in self.rows.items()) / self.rows.total()
        return f"{shares} | {a_pass:.1f} | {denoising / self.expected:.2f}"


def stock_loop(pipeline: Any, count: int) -> float:
    began = time.perf_counter()
    for seed in range(count):
        pipeline(
            PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator(seed), output_type="pil"
        )
    return count / (time.perf_counter() - began)


def through_service(http: httpx2.Client, in_flight: int, count: int) -> float:
    """Images a second while so many were in flight: without the filling up and the running dry."""

    def one(seed: int) -> float:
        body = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": seed}
        done = http.post("/v1/generations", json=body, headers={"Prefer": "wait=60"}).json()
        assert done["status"] == "succeeded", done
        assert http.get(done["images"][0]["url"]).status_code == 200
        return time.perf_counter()

    with ThreadPoolExecutor(in_flight) as clients:
        ended = sorted(clients.map(one, range(count)))
        return (count - 2 * in_flight) / (ended[-in_flight - 1] - ended[in_flight - 1])


def ideal(curves: dict[str, dict[int, float]], in_flight: int) -> float:
    """Images a second if nothing took time but the passes, at the cheapest row count that so many can fill."""
    denoise, decode = curves["denoise"], curves["decode"]
    wanted = 2 * in_flight  # with guidance, an image has two rows
    a_row = min(seconds / min(rows, wanted) for rows, seconds in denoise.items())
    return 1 / (STEPS * 2 * a_row + min(seconds / rows for rows, seconds in decode.items()))
