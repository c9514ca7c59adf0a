"""`make bench`: the README's figures, in one run. Ratios are the point: machines differ, and are noisy."""

import sys
import tempfile
from pathlib import Path

from app.local import LocalService
from app.settings import Settings
from tests.bench import journal, latency, queue_costs, recovery, throughput

SECTIONS = {
    "throughput": throughput.run,
    "latency": latency.run,
    "queue": queue_costs.run,
    "journal": journal.run,
    "recovery": recovery.run,
}
NEED_A_WORKER = ("throughput", "latency")


def main(names: list[str]) -> None:
    for name in names or SECTIONS:
        with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as directory:
            settings = Settings(data_dir=Path(directory), port=0, log_level="warning", max_queued=100_000)
            with LocalService(settings, workers=1 if name in NEED_A_WORKER else 0) as service:
                SECTIONS[name](service)


main(sys.argv[1:])
