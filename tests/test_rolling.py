"""A new version is rolled out under load: APIs and workers are replaced one by one, behind the nginx of `deploy/`."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from app.local import LocalService, free_port, port_open
from app.parts import Part
from tests.conftest import local_settings
from tests.test_deploy import NGINX, proxy_to

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

BODY = {"prompt": "a dog", "width": 64, "height": 64, "num_inference_steps": 4}


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[tuple[list[Part], int]]:
    """Two APIs and two workers, and the port in front of them."""
    with LocalService(local_settings(tmp_path, torch_threads=1, lease=5, max_rows=2), workers=2) as service:
        port = free_port("127.0.0.1")
        first = service.parts["api"]
        environment = first.environment | {"DARKROOM_PORT": str(port)}
        second = Part("second API", first.command, environment, lambda _: port_open("127.0.0.1", port))
        try:
            second.wait(30)
            with proxy_to(tmp_path, int(service.url.rpartition(":")[2]), port) as public:
                yield [first, second, *(service.parts[f"worker {i}"] for i in (1, 2))], public
        finally:
            second.stop()


def test_a_rolling_restart_of_everything_under_load_refuses_nothing(fleet: tuple[list[Part], int]):
    parts, port = fleet
    over, wrong, done = threading.Event(), list[str](), list[str]()

    def client(number: int) -> None:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            while not over.is_set():
                headers = {"Prefer": "wait=20"} if number % 2 else {}
                answers = [http.post("/v1/generations", json=BODY, headers=headers)]
                while answers[-1].is_success and answers[-1].json()["status"] in ("queued", "running"):
                    answers.append(http.get(f"/v1/generations/{answers[-1].json()['id']}"))
                    over.wait(0.05)
                if answers[-1].is_success:
                    done.append(answers[-1].json()["id"])
                    assert answers[-1].json()["status"] == "succeeded"
                    answers.append(http.get(answers[-1].json()["images"][0]["url"]))
                wrong.extend(
                    f"{a.request.method} {a.url.path}: {a.status_code} {a.text}" for a in answers if a.is_error
                )

    clients = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for one in clients:
        one.start()
    for part in parts:
        part.stop()
        assert part.process.returncode in (0, -signal.SIGTERM)  # uvicorn ends by the signal it was sent
        part.start()
        part.wait(60)
        time.sleep(3)  # nginx does not ask an API that was away for another 2 s
    over.set()
    for one in clients:
        one.join(60)
    assert not wrong
    assert len(done) > 20
