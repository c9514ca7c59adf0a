"""The status of the service: who draws, how full its passes are, and what waits."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from app.local import LocalService
from app.status import status
from tests.conftest import local_settings
from tests.lab import Lab, Server, until


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    server = Server(tmp_path / "server")
    lab = Lab(server, tmp_path)
    yield lab
    lab.close()
    server.stop()


def test_what_waits_is_told_where_nobody_draws(lab: Lab):
    lab.put(3, priority="high")
    shown = status(lab.jobs)
    assert shown.workers == []
    assert [(model.name, model.waiting["high"]) for model in shown.models] == [("alpha", 3), ("beta", 0)]
    assert [model.eta for model in shown.models] == [None, None]


def test_a_worker_is_shown_until_it_stops_or_its_lease_has_run_out(lab: Lab):
    stopped, killed = lab.worker(), lab.worker()
    until(lambda: [worker.name for worker in status(lab.jobs).workers] == ["w0", "w1"])
    stopped.terminate()
    stopped.join(10)
    assert [worker.name for worker in status(lab.jobs).workers] == ["w1"]
    os.kill(killed.pid or 0, signal.SIGKILL)
    until(lambda: not status(lab.jobs).workers, 10)


def test_a_stopping_worker_says_so(lab: Lab):
    worker = lab.worker()
    lab.put(steps=400)
    until(lambda: any(model.running for worker in status(lab.jobs).workers for model in worker.models))
    worker.terminate()
    until(lambda: [worker.stopping for worker in status(lab.jobs).workers] == [True])


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    settings = local_settings(tmp_path_factory.mktemp("status"))
    with LocalService(settings) as service, httpx2.Client(base_url=service.url, timeout=60) as client:
        yield client


def test_a_real_worker_tells_how_full_its_passes_are(http: httpx2.Client):
    body = {"prompt": "a dog", "num_inference_steps": 100}
    drawn = [http.post("/v1/generations", json=body).raise_for_status() for _ in range(3)]
    found = list[dict]()

    def busy() -> bool:
        (worker,) = http.get("/v1/status").json()["workers"]
        (model,) = worker["models"]
        found.append(model)
        return model["rows"] > 0 and model["running"] > 0

    until(busy, 30, lambda: str(found[-1]))
    assert found[-1]["name"] == "emoji-sd"
    assert found[-1]["rows"] <= found[-1]["width"]  # which is what this machine's curve says, on the day
    assert found[-1]["rows_per_second"] > 0
    for answer in drawn:
        http.delete(answer.headers["location"]).raise_for_status()
