"""`make bench`: the README's figures, in one run. Ratios are the point: machines differ, and are noisy."""

import sys
import tempfile
from pathlib import Path

from app.local import LocalService
from app.settings import Settings
from tests.bench import journal, latency, precision, queue_costs, recovery, startup, throughput

SECTIONS = {
    "throughput": throughput.run,
    "latency": latency.run,
    "queue": queue_costs.run,
    "journal": journal.run,
    "recovery": recovery.run,
    "precision": precision.run,
    "startup": startup.run,
}
NEED_A_WORKER = ("throughput", "latency")


def main(names: list[str]) -> None:
    for name in names or SECTIONS:
        with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as directory:
            settings = Settings(
                data_dir=Path(directory), port=0, log_level="warning", max_queued=200_000, max_listeners=2_000
            )
            with LocalService(settings, workers=1 if name in NEED_A_WORKER else 0) as service:
                SECTIONS[name](service)


main(sys.argv[1:])
