"""A pass that hangs: a real worker, with the shipped model, whose denoiser no longer returns."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis

from app.jobs import Jobs, pace_key
from app.local import EmbeddedRedis
from app.schemas import GenerationRequest
from app.settings import Settings
from app.storage import open_store
from models.catalog import Catalog
from tests.lab import until
from workers.watchdog import LEAST, TIMES, Watchdog

ROOT = Path(__file__).parent.parent

WORKER = """
import ctypes, sys, time
from pathlib import Path
from app.settings import Settings
from workers import main

load, how = main.resident, sys.argv[3]
data_dir = Path(sys.argv[2])

def hang():
    if how == "sleeps":
        time.sleep(1000)
    ctypes.PyDLL(None).sleep(1000)  # and keeps the GIL

def resident(card, device):
    model = load(card, device)
    run = model.denoiser.run
    model.denoiser.run = lambda **args: hang() if (data_dir / "hang").exists() else run(**args)
    return model

main.resident = resident
main.run(Settings(data_dir=data_dir, torch_threads=1, step_timeout=1.5, max_rows=2), sys.argv[1])
"""


@pytest.mark.parametrize("how", ["sleeps", "keeps the GIL"])
def test_a_worker_whose_pass_hangs_ends_and_says_where(
    how: str, valkey: EmbeddedRedis, connection: "Redis", tmp_path: Path
):
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, valkey.url, str(tmp_path), how],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: connection.hlen(pace_key("emoji-sd")) or worker.poll() is not None, 90)
    settings = Settings(data_dir=tmp_path)
    jobs = Jobs(connection, open_store(settings.blobs), Catalog.read(["emoji-sd"]), settings)
    (tmp_path / "hang").touch()
    jobs.submit(GenerationRequest(prompt="a cat"), "ada")
    _, said = worker.communicate(timeout=60)
    assert worker.returncode == -signal.SIGALRM
    assert "in die_if_it_hangs" in said
    assert "in hang" in said


def test_a_pass_that_takes_its_time_is_not_taken_for_hung():
    def limits(slowest: float, limit: float = 0, lease: float = 30) -> float:
        """What the timer says in a pass."""
        return Watchdog(limit, lease).die_if_it_hangs(lambda: signal.getitimer(signal.ITIMER_REAL)[0], slowest)

    before = signal.getitimer(signal.ITIMER_REAL)
    try:
        assert limits(slowest=0.05) == pytest.approx(LEAST, abs=1)
        assert limits(slowest=10) == pytest.approx(10 * TIMES, abs=1)
        assert limits(slowest=0.05, lease=300) == pytest.approx(300, abs=1)
        assert limits(slowest=10, limit=5) == pytest.approx(5, abs=1)
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)  # pytest-timeout's
