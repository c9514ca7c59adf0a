"""Chaos and soak in their short forms, and that they would notice. The long ones: `make chaos`, `make soak`."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from tests.chaos import mutations, soak
from tests.chaos.faults import deal
from tests.chaos.orders import PICTURES, order

LONG = pytest.mark.long
ROOT = Path(__file__).parents[1]
SEED = 11372  # its short form: a freeze at a claim and one at an end, a full disk, a damaged journal, Valkey killed


def run(*arguments: str, module: str = "tests.chaos") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)


@pytest.mark.timeout(400)
def test_every_accepted_job_ends_once_with_its_picture_or_a_reason_whatever_is_killed():
    done = run("--short", "--seed", str(SEED))
    assert done.returncode == 0, done.stdout + done.stderr


@LONG
@pytest.mark.timeout(3600)
def test_nothing_is_lost_of_two_thousand_jobs_under_a_hundred_faults():
    done = run("--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr


@LONG
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutation", [*mutations.OF_WORKERS, *mutations.OF_THE_API])
def test_chaos_notices_a_service_that_does_not_check(mutation: str):
    done = run("--short", "--seed", str(SEED), "--mutate", mutation)
    assert done.returncode == 1, done.stdout + done.stderr


def test_every_mutation_finds_the_line_that_it_changes():
    program = "from tests.chaos.mutations import *\nfor mutate in (OF_WORKERS | OF_THE_API).values(): mutate()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_seed_always_deals_the_same_faults_and_orders():
    def dealt(seed: int) -> list[object]:
        return [name for name, _ in islice(deal(seed), 40)] + [order(seed, number) for number in range(40)]

    assert dealt(7) == dealt(7)
    assert dealt(7) != dealt(8)


def test_the_pictures_are_of_every_kind():
    kinds = {("image" in body, "mask" in body, body.get("n", 1) > 1) for body in PICTURES.values()}
    assert {(False, False, False), (False, False, True), (True, False, False), (True, True, False)} <= kinds
    assert all(body["reproducible"] for body in PICTURES.values())


@pytest.mark.timeout(180)
def test_nothing_grows_over_sixty_generations(tmp_path: Path):
    """Beyond a tenth and what `soak.MEASURES` allows for each."""
    samples = soak.soak(60, tmp_path / "soak", kept=2, every=0.3)
    assert not soak.grown(samples)
    soak.plot(samples, tmp_path / "soak.png")
    with Image.open(tmp_path / "soak.png") as plot:
        assert plot.size == (1120, 600)


@LONG
@pytest.mark.timeout(3600)
def test_nothing_grows_over_three_thousand_generations(tmp_path: Path):
    done = run("--plot", str(tmp_path / "soak.png"), module="tests.chaos.soak")
    assert done.returncode == 0, done.stdout
