"""The service in one environment and in another, in turns: what a variable brings or costs.

python -m tests.bench.variables THP_MEM_ALLOC_ENABLE=0 THP_MEM_ALLOC_ENABLE=1
python -m tests.bench.variables '' DARKROOM_JOURNAL_INTERVAL=0,DARKROOM_TORCH_THREADS=2
"""

import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import httpx2

from app.local import LocalService
from app.settings import Settings
from tests.bench.throughput import through_service

IN_FLIGHT, COUNT, ROUNDS = 16, 48, 5
OF_EACH = 2  # a process can be lucky with where its memory lies


def begun(environment: str, stack: ExitStack) -> httpx2.Client:
    variables = dict(one.split("=", 1) for one in environment.split(",") if one)
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="darkroom-bench-")))
        service = stack.enter_context(LocalService(Settings(data_dir=folder, port=0, log_level="warning")))
    finally:
        os.environ.clear()
        os.environ.update(before)
    return stack.enter_context(httpx2.Client(base_url=service.url, timeout=120))


def main(environments: list[str]) -> None:
    with ExitStack() as stack:
        services = [(name, begun(name, stack)) for _ in range(OF_EACH) for name in environments]
        rates: dict[str, list[float]] = {name: [] for name in environments}
        for i in range(ROUNDS):
            for name, http in services:
                rates[name].append(through_service(http, IN_FLIGHT, COUNT))
                print(
                    f"  round {i + 1} of {ROUNDS}: {rates[name][-1]:.2f} images/s with {name or 'nothing'}", flush=True
                )
    print(f"\n| {IN_FLIGHT} in flight | images/s | × the first |\n|---|---|---|")
    for name, of_it in rates.items():
        ratios = [rate / first for rate, first in zip(of_it, rates[environments[0]], strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| `{name or 'nothing'}` | {statistics.median(of_it):.2f} | {spread} |")


if __name__ == "__main__":
    main(sys.argv[1:])
