"""From `darkroom worker` to a worker that draws: with its files in memory, and from the disk where that can be had."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from app.local import LocalService

ROUNDS = 3
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def run(service: LocalService) -> None:
    dropped = may_drop()
    begun: dict[str, list[list[float]]] = {"warm": [], **({"cold": []} if dropped else {})}
    start(service)  # whatever the first of all leaves behind
    for i in range(ROUNDS):
        for kind, found in begun.items():
            if kind == "cold":
                drop()
            found.append(start(service))
            print(f"  round {i + 1} of {ROUNDS}: {kind} {found[-1][-1]:.2f} s", flush=True)
    print("\n| start of a worker, s | imports | reads the weights | measures its passes | ready after |")
    print("|---|---|---|---|---|")
    for kind, found in begun.items():
        columns = [f"{median(column):.2f}" for column in zip(*found, strict=True)]
        print(f"| {kind} page cache | {' | '.join(columns)} |")
    if not dropped:
        print("no cold figure: the page cache is not ours to drop")
    print(imports())


def start(service: LocalService) -> list[float]:
    """Seconds of each part, and of all."""
    environment = os.environ | {"REDIS_URL": service.redis_url, "DARKROOM_LOG_FORMAT": "json"}
    environment["DARKROOM_DATA_DIR"] = str(service.settings.data_dir)
    began = time.monotonic()
    worker = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "worker"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        at = dict[str, float]()
        measuring = 0.0
        for line in worker.stdout or ():
            event = json.loads(line) if line.startswith(b"{") else {}
            at[event.get("event", "")] = time.monotonic() - began
            if event.get("event") == "warm":
                measuring = event["measured"]
                break
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    return [at["worker_starts"], at["warm"] - at["loading"] - measuring, measuring, at["warm"]]


def may_drop() -> bool:
    try:
        drop()
    except OSError:
        return False
    return True


def drop() -> None:
    os.sync()
    DROP_CACHES.write_text("3")


def imports(most: int = 8) -> str:
    """Where the time of the imports goes: the packages that take longest, with all that they bring."""
    command = [sys.executable, "-X", "importtime", "-c", "import workers.main"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    taken = dict[str, int]()
    for line in told.splitlines()[1:]:
        _, cumulative, name = line.removeprefix("import time:").split("|")
        if "." not in (name := name.strip()):
            taken[name] = int(cumulative)
    slowest: Callable[[str], int] = taken.__getitem__
    names = sorted(taken, key=slowest, reverse=True)[:most]
    return "imports, ms with what they bring: " + ", ".join(f"{name} {taken[name] / 1000:.0f}" for name in names)
