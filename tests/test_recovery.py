"""Workers end in the middle of a picture: another goes on at its step, towards the same bytes."""

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from redis import Redis
from rq.job import Job

from app.local import LocalService
from app.parts import Part
from tests.conftest import local_settings
from tests.lab import until

LEASE = 3
LONG = {
    "prompt": "a red apple",
    "width": 64,
    "height": 64,
    "num_inference_steps": 60,
    "seed": 3,
    "reproducible": True,
    "scheduler": "unipc",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    """Two workers of one kind, so that bytes are the same."""
    brief = {"lease": LEASE, "journal_interval": 0.1, "torch_threads": 1, "stop_grace": 0.2, "max_rows": 2}
    with LocalService(local_settings(tmp_path_factory.mktemp("pair"), **brief), workers=2) as service:
        yield service


@pytest.fixture(autouse=True)
def both_are_there(pair: LocalService) -> None:
    for part in workers(pair):
        if part.process.poll() is not None:
            part.start()
            part.wait(60)


@pytest.fixture
def http(pair: LocalService) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=pair.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(pair: LocalService) -> str:
    with httpx2.Client(base_url=pair.url, timeout=120) as http:
        done = http.post("/v1/generations", json=LONG, headers={"Prefer": "wait=60"}).json()
        assert done["resumed_at_step"] is None
        return digest(http, done)


def workers(service: LocalService) -> list[Part]:
    return [part for name, part in service.parts.items() if name.startswith("worker")]


def begun(service: LocalService, http: httpx2.Client, step: int, **changed: Any) -> tuple[str, Part]:
    """A generation that has come so far, and who draws it."""
    id = http.post("/v1/generations", json=LONG | changed).json()["id"]
    until(lambda: (http.get(f"/v1/generations/{id}").json()["progress"] or {"step": 0})["step"] >= step)
    with Redis.from_url(service.redis_url) as redis:
        name = (redis.hget(Job.key_for(id), "worker_name") or b"").decode()
    return id, next(part for part in workers(service) if name.endswith(f".{part.process.pid}"))


def ended(http: httpx2.Client, id: str) -> dict[str, Any]:
    until(lambda: http.get(f"/v1/generations/{id}").json()["status"] not in ("queued", "running"), 60)
    return http.get(f"/v1/generations/{id}").json()


def digest(http: httpx2.Client, generation: dict[str, Any]) -> str:
    assert generation["status"] == "succeeded", generation["error"]
    return hashlib.sha256(http.get(generation["images"][0]["url"]).content).hexdigest()


def journals(service: LocalService) -> list[Path]:
    return [path for path in (service.settings.data_dir / "blobs").glob("generations/*/journal/*/*") if path.is_file()]


def metric(http: httpx2.Client, name: str) -> float:
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_a_killed_workers_picture_goes_on_at_its_step_with_the_same_bytes(
    pair: LocalService, http: httpx2.Client, undisturbed: str
):
    saved = metric(http, "darkroom_steps_saved_total")
    id, worker = begun(pair, http, step=12)
    worker.process.kill()
    done = ended(http, id)
    assert digest(http, done) == undisturbed
    assert done["attempts"] == 2
    assert done["resumed_at_step"] >= 8
    assert metric(http, "darkroom_steps_saved_total") - saved >= 8
    until(lambda: not journals(pair))


def test_a_picture_goes_on_a_second_time(pair: LocalService, http: httpx2.Client, undisturbed: str):
    id, first = begun(pair, http, step=8)
    first.process.kill()
    until(lambda: (http.get(f"/v1/generations/{id}").json()["resumed_at_step"] or 0) > 4, 60)
    until(lambda: (http.get(f"/v1/generations/{id}").json()["progress"] or {"step": 0})["step"] >= 20, 60)
    (second,) = (part for part in workers(pair) if part is not first)
    second.process.kill()
    first.start()
    done = ended(http, id)
    assert digest(http, done) == undisturbed
    assert done["attempts"] == 3
    assert done["resumed_at_step"] >= 15


def test_a_worker_that_has_no_time_to_finish_hands_over_at_its_step(
    pair: LocalService, http: httpx2.Client, undisturbed: str
):
    id, worker = begun(pair, http, step=12)
    worker.process.terminate()
    assert worker.process.wait(20) == 0
    done = ended(http, id)
    assert digest(http, done) == undisturbed
    assert done["attempts"] == 2
    assert done["resumed_at_step"] >= 12  # nothing is lost, and no lease has to run out


def test_a_journal_that_does_not_fit_is_discarded(pair: LocalService, http: httpx2.Client, undisturbed: str):
    """One page with a bit that flipped, one that was cut off, the others of another generation."""

    def pages_of(id: str) -> list[Path]:
        return [path for path in journals(pair) if id in path.parts]

    id, worker = begun(pair, http, step=12)
    until(lambda: len(pages_of(id)) >= 3)
    os.kill(worker.process.pid, signal.SIGSTOP)
    other, _ = begun(pair, http, step=8, seed=4)
    until(lambda: pages_of(other))
    flipped, cut, *strange = pages = pages_of(id)
    data = flipped.read_bytes()
    flipped.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    cut.write_bytes(cut.read_bytes()[:-1])
    for path in strange:
        path.write_bytes(pages_of(other)[0].read_bytes())
    worker.process.kill()
    discarded = metric(http, "darkroom_journal_pages_discarded_total")
    done = ended(http, id)
    assert digest(http, done) == undisturbed
    assert done["resumed_at_step"] is None
    assert metric(http, "darkroom_journal_pages_discarded_total") - discarded >= len(pages)


def test_a_frozen_worker_that_wakes_up_changes_nothing(pair: LocalService, http: httpx2.Client, undisturbed: str):
    id, worker = begun(pair, http, step=12)
    os.kill(worker.process.pid, signal.SIGSTOP)
    done = ended(http, id)
    os.kill(worker.process.pid, signal.SIGCONT)
    time.sleep(2)  # it draws on, notices, and lets go
    assert http.get(f"/v1/generations/{id}").json() == done
    assert digest(http, done) == undisturbed
    again = http.post("/v1/generations", json=LONG, headers={"Prefer": "wait=60"}).json()
    assert digest(http, again) == undisturbed
    with Redis.from_url(pair.redis_url) as redis:
        assert redis.xlen(f"rq:results:{id}") == 1


def test_the_default_lane_goes_on_as_well(pair: LocalService, http: httpx2.Client):
    id, worker = begun(pair, http, step=12, reproducible=False, n=2)
    worker.process.kill()
    done = ended(http, id)
    assert done["status"] == "succeeded", done["error"]
    assert len(done["images"]) == 2
    assert done["resumed_at_step"] >= 4
