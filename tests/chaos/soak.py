"""`make soak`: thousands of short generations through one API and one worker, and nothing grows."""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx2
from rich.console import Console
from rich.table import Table

from app.plot import Panel, draw
from tests.chaos.system import System

PLOT = Path(__file__).parents[2] / "docs" / "soak.png"
BODY = {"prompt": "a red apple", "num_inference_steps": 2, "width": 64, "height": 64, "guidance_scale": 1.0}
CLIENTS = 8
KEPT = 20  # seconds that a result is kept, so that as much is swept as comes in
MIB = 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")


class Measure(NamedTuple):
    name: str
    unit: str
    slack: float  # what it may grow by, beside a tenth, between the first third of a run and the last


MEASURES = {
    "api": Measure("API, resident", "MiB", 10),
    "worker": Measure("worker, resident", "MiB", 40),  # what torch's allocator keeps for each new shape
    "valkey": Measure("Valkey, resident", "MiB", 10),
    "redis": Measure("Redis, used_memory", "MiB", 1),
    "api_files": Measure("API, open files", "", 4),
    "worker_files": Measure("worker, open files", "", 4),
    "blobs": Measure("files in the blob store", "", 60),  # between two sweeps; journals come and go
}

Samples = list[tuple[float, dict[str, float]]]
"""How many generations had been drawn, and what was measured then."""


def soak(generations: int, directory: Path, kept: float = KEPT, every: float = 2.0) -> Samples:
    samples: Samples = []
    with System(directory, apis=1, workers=1, result_ttl=kept) as system:
        numbers, done = itertools.count(), itertools.count()
        drawn = threading.Event()
        count = [0]

        def client() -> None:
            with httpx2.Client(base_url=system.apis[0].url, timeout=60) as http:
                while (number := next(numbers)) < generations:
                    body = BODY | {"seed": number}
                    answer = http.post("/v1/generations", json=body, headers={"Prefer": "wait=50"}).json()
                    assert answer["status"] == "succeeded", answer
                    http.get(answer["images"][0]["url"]).raise_for_status()
                    count[0] = next(done) + 1

        def sample() -> None:
            while not drawn.wait(every):
                samples.append((count[0], measured(system)))

        with ThreadPoolExecutor(CLIENTS + 1) as threads:
            sampler = threads.submit(sample)
            clients = [threads.submit(client) for _ in range(CLIENTS)]
            try:
                for one in clients:
                    one.result()
            finally:
                drawn.set()
                sampler.result()
    return samples


def measured(system: System) -> dict[str, float]:
    api, worker = system.apis[0].pid, system.workers[0].pid
    blobs = sum(len(files) for _, _, files in os.walk(system.blobs / "generations"))  # bears what is swept meanwhile
    return {
        "api": resident(api),
        "worker": resident(worker),
        "valkey": resident(system.valkey.part.process.pid),
        "redis": int(system.redis.info("memory")["used_memory"]) / MIB,
        "api_files": open_files(api),
        "worker_files": open_files(worker),
        "blobs": blobs,
    }


def resident(pid: int) -> float:
    """MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / MIB


def open_files(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def thirds(samples: Samples) -> Mapping[str, tuple[float, float]]:
    """Medians of the first and of the last third of the generations. The first tenth is the run's own warming up."""
    last = samples[-1][0]
    first = [values for n, values in samples if 0.1 * last <= n <= 0.4 * last]
    final = [values for n, values in samples if n >= 0.7 * last]
    return {
        name: (statistics.median(v[name] for v in first), statistics.median(v[name] for v in final))
        for name in MEASURES
    }


def grown(samples: Samples) -> list[str]:
    """What has grown by more than a tenth and its slack."""
    return [
        f"{MEASURES[name].name}: from {first:.1f} to {final:.1f} {MEASURES[name].unit}"
        for name, (first, final) in thirds(samples).items()
        if final > 1.1 * first + MEASURES[name].slack
    ]


def plot(samples: Samples, path: Path) -> None:
    def curve(name: str) -> list[tuple[float, float]]:
        return [(n, values[name]) for n, values in samples]

    across = "generations drawn"
    panels = [
        Panel("resident memory, MiB", across, {name: curve(name) for name in ("worker", "api", "valkey")}),
        Panel("Redis, used_memory, MiB", across, {"redis": curve("redis")}),
        Panel("open files", across, {"worker": curve("worker_files"), "api": curve("api_files")}),
        Panel(f"files in the blob store (results are kept for {KEPT} s)", across, {"blobs": curve("blobs")}),
    ]
    draw(panels, path)


def show(samples: Samples, console: Console) -> None:
    table = Table("medians", "first third", "last third")
    for name, (first, final) in thirds(samples).items():
        measure = MEASURES[name]
        table.add_row(f"{measure.name} {measure.unit}", f"{first:.1f}", f"{final:.1f}")
    console.print(table)


def main(say: Callable[..., None] = print) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__)
    parser.add_argument("--generations", type=int, default=3000)
    parser.add_argument("--plot", type=Path, default=PLOT)
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="darkroom-soak-", ignore_cleanup_errors=True) as directory:
        samples = soak(given.generations, Path(directory))
    plot(samples, given.plot)
    show(samples, Console(width=100))
    say(f"{given.generations} generations in {time.monotonic() - began:.0f} s; {given.plot}")
    for line in grown(samples):
        say(f"grows: {line}")
    return 1 if grown(samples) else 0


if __name__ == "__main__":
    sys.exit(main())
