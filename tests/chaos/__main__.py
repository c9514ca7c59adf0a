"""`make chaos`: kill it anywhere, and every accepted job still ends once, with its picture or a reason."""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from tests.chaos import mutations, report
from tests.chaos.audit import audit
from tests.chaos.clients import Crowd, Ledger, Probe, right_checksums
from tests.chaos.faults import Havoc
from tests.chaos.system import System


class Form(NamedTuple):
    jobs: int  # at least
    faults: int
    clients: int


LONG = Form(jobs=2000, faults=110, clients=16)
SHORT = Form(jobs=40, faults=8, clients=12)


def chaos(form: Form, seed: int, mutation: str, directory: Path, say: Callable[[str], None]) -> report.Run:
    began = time.monotonic()
    say("starting")
    with System(directory, mutation=mutation) as system:
        say("drawing every picture undisturbed")
        ledger = Ledger(right_checksums(system))
        crowd, probe = Crowd(system, ledger, seed, form.clients), Probe(system)

        def progress(what: str) -> None:
            say(f"{time.monotonic() - began:4.0f} s · {len(ledger.jobs)} jobs · {havoc.total} faults · {what}")

        havoc = Havoc(system, crowd, seed, progress)
        crowd.start()
        try:
            havoc.run(form.faults, form.jobs)
            while len(ledger.jobs) < form.jobs:
                progress("no more faults, but more jobs")
                time.sleep(2)
        finally:
            system.heal()
            progress("letting them finish")
            crowd.stop()
            probe.stop()
        progress("auditing")
        verdicts = audit(system, ledger)
    verdicts.left += [f"process {pid}" for pid in system.processes_left()]
    return report.Run(system, ledger, havoc, verdicts, probe.longest, time.monotonic() - began)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a minute or so")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--mutate", default="", choices=[*mutations.OF_WORKERS, *mutations.OF_THE_API])
    parser.add_argument("--keep", action="store_true", help="the logs, whatever they say")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whatever was started is stopped
    form = SHORT if given.short else LONG
    form = form._replace(faults=given.faults or form.faults, jobs=given.jobs or form.jobs)
    directory = Path(tempfile.mkdtemp(prefix="darkroom-chaos-"))
    console = Console(width=None if sys.stdout.isatty() else 150)
    with console.status("") as status:
        line = status.update if console.is_terminal else console.print
        run = chaos(form, given.seed, given.mutate, directory, line)
    report.show(run, console)
    if run.failed:
        console.print(f"[bold red]It does not hold.[/] Seed {given.seed}; logs are in {directory}")
        return 1
    console.print(f"[bold green]It holds.[/] Seed {given.seed}")
    if given.keep:
        console.print(f"Logs are in {directory}")
    else:
        shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
