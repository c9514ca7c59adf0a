"""A part of the system under test: `python -m tests.chaos.part worker` runs what `darkroom worker` does.

Beside that, requests that ask for it in their `metadata` kill their worker: `poison` at one of their steps, every time;
an `ambush` once, at a moment that random signals would rarely hit. A frozen worker is thawed by the harness.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from app.cli import cli
from tests.chaos import mutations

POISONED_CALL = 3  # of the program to a net: a step or two is done
POISONS: Mapping[str, Callable[[], None]] = {
    "segv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "abort": os.abort,
    "oom-kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}
AMBUSHES = {
    "freeze-at-claim": signal.SIGSTOP,  # popped, and nobody's
    "kill-at-claim": signal.SIGKILL,
    "freeze-at-end": signal.SIGSTOP,  # drawn and stored, and not told
    "kill-at-end": signal.SIGKILL,
    "kill-after-end": signal.SIGKILL,  # told, and not tidied up
}


def start_quickly() -> None:
    """One row count instead of a measured curve: workers are started a hundred times, on as good as no cores."""
    from workers import curve

    def measured(net: Any, call: Any, max_rows: int, runner: Any) -> curve.Curve:
        return curve.Curve({4 * call.rows: curve.timed(net, curve.tiled(call, 4 * call.rows), runner)})

    curve.measure = measured


def sweep_soon() -> None:
    """Files go when their result does: a soak of minutes is no place for a grace of ten."""
    from app import retention

    retention.GRACE, retention.SOONEST = timedelta(seconds=15), timedelta(seconds=5)


def make_vulnerable() -> None:
    from models.stable_diffusion import StableDiffusion
    from workers.leases import Leases

    draw, claim, end = StableDiffusion.draw, Leases.claim, Leases.end

    def deadly_draw(self: Any, r: Any, seed: int, inputs: Any) -> Any:
        program = draw(self, r, seed, inputs)
        return until_the_end(program, POISONS[r.metadata["poison"]]) if "poison" in r.metadata else program

    def ambushed_claim(self: Any, job: Any, queue: Any) -> Any:
        ambush(job, "at-claim")
        return claim(self, job, queue)

    def ambushed_end(self: Any, seat: Any, *outcome: Any) -> bool:
        ambush(seat.job, "at-end")
        ended = end(self, seat, *outcome)
        ambush(seat.job, "after-end")
        return ended

    StableDiffusion.draw, Leases.claim, Leases.end = deadly_draw, ambushed_claim, ambushed_end


def until_the_end(program: Any, end: Callable[[], None]) -> Any:
    outcome = None
    for _ in range(POISONED_CALL):
        outcome = yield program.send(outcome)
    end()


def ambush(job: Any, moment: str) -> None:
    """Once a job: the mark that it leaves says so, and tells the harness whom to thaw."""
    name = job.kwargs["parameters"].get("metadata", {}).get("ambush", "")
    if name.endswith(moment):
        mark = Path(os.environ["CHAOS_MARKS"], f"{job.id}.{os.getpid()}.{name}")
        if not any(mark.parent.glob(f"{job.id}.*")):
            mark.touch()
            os.kill(os.getpid(), AMBUSHES[name])


def main(command: str) -> None:
    those = mutations.OF_WORKERS if command == "worker" else mutations.OF_THE_API
    if mutate := those.get(os.environ.get("CHAOS_MUTATION", "")):
        mutate()
    if command == "worker":
        start_quickly()
        make_vulnerable()
        sweep_soon()
    cli([command])


if __name__ == "__main__":
    main(sys.argv[1])
