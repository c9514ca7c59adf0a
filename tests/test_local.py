"""`darkroom up` looks after its parts: one service for all tests here, killed part by part."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from app import local, parts
from app.local import EmbeddedRedis
from app.parts import Part, StartFailed, ending
from app.settings import Settings
from tests.lab import until
from tests.test_cli import DARKROOM, path_to_us, running, started_by

GOOD = {"prompt": "a cat", "num_inference_steps": 2, "width": 64, "height": 64}
QUICK = {"DARKROOM_LOG_LEVEL": "error", "DARKROOM_TORCH_THREADS": "1", "DARKROOM_MAX_ROWS": "4"}


@dataclass
class Up:
    """A `darkroom up` of its own."""

    process: subprocess.Popen[bytes]
    errors: Path

    @property
    def said(self) -> str:
        return self.errors.read_text()

    @property
    def url(self) -> str:
        match = re.search(r"ready (http://\S+)", self.said)
        assert match
        return match[1]

    def pid(self, words: str) -> int | None:
        """Of the part whose command line has these words."""
        for pid in started_by(self.process.pid):
            try:
                line = (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if words in line and running(pid):
                return pid
        return None

    def draws(self) -> None:
        """A generation that is accepted now, or as soon as one can be, succeeds."""

        def accepted() -> str | None:
            try:
                answer = httpx2.post(f"{self.url}/v1/generations", json=GOOD, timeout=10)
            except httpx2.TransportError:
                return None
            return answer.json()["id"] if answer.status_code == 202 else None

        deadline = time.monotonic() + 60
        while not (id := accepted()):
            assert time.monotonic() < deadline, self.said
            time.sleep(0.1)

        def status() -> str:
            return httpx2.get(f"{self.url}/v1/generations/{id}", timeout=10).json()["status"]

        until(lambda: status() == "succeeded", 90, lambda: f"{status()}; {self.said}")


def up(folder: Path, *options: str, **environment: str) -> Up:
    errors = folder / "errors"
    with errors.open("wb") as file:
        process = subprocess.Popen(
            [*DARKROOM, "up", "--port", "0", "--data-dir", "data", *options],
            cwd=folder,
            env=path_to_us() | QUICK | environment,
            stderr=file,
        )
    return Up(process, errors)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    service = up(tmp_path_factory.mktemp("up"))
    try:
        until(lambda: "ready http" in service.said, 120, lambda: service.said)
        yield service
    finally:
        service.process.terminate()
        service.process.wait(60)


@pytest.mark.parametrize(
    ("part", "name"),
    [("app.cli worker", "worker 1"), ("app.cli api", "the API"), ("valkey", "the embedded Valkey")],
    ids=["worker", "api", "valkey"],
)
def test_a_part_that_is_killed_comes_back_and_pictures_are_drawn(service: Up, part: str, name: str):
    before = service.pid(part)
    assert before
    os.kill(before, signal.SIGKILL)
    until(lambda: service.pid(part) not in (None, before), 20)
    assert re.search(rf"{name} ended by SIGKILL; it is begun again in [\d.]+ s", service.said)
    service.draws()


def test_killed_itself_it_leaves_no_process_behind(service: Up):
    children = started_by(service.process.pid)
    assert len(children) >= 3
    service.process.kill()
    service.process.wait(10)
    until(lambda: not any(running(child) for child in children), 20)


def test_api_processes_share_a_port_and_its_connections_and_are_begun_again(tmp_path: Path, valkey: EmbeddedRedis):
    port = local.free_port("127.0.0.1")
    environment = path_to_us() | QUICK | {"REDIS_URL": valkey.url, "DARKROOM_API_PROCESSES": "2"}
    errors = tmp_path / "errors"
    with errors.open("wb") as file:
        command = [*DARKROOM, "api", "--port", str(port)]
        service = Up(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=file), errors)

    def shares() -> dict[int, int]:
        """Connections that each process has, of 64 that are open and answered."""
        pids = [pid for pid in started_by(service.process.pid) if running(pid)]
        before = {pid: files(pid) for pid in pids}
        with ExitStack() as stack:
            for _ in range(64):
                client = stack.enter_context(httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=10))
                assert client.get("/livez").text == "ok"
            return {pid: files(pid) - before[pid] for pid in pids}

    def both_answer() -> bool:
        try:
            return len(found := shares()) == 2 and min(found.values()) >= 10
        except (httpx2.TransportError, FileNotFoundError, ProcessLookupError):
            return False  # one of them is just being killed, or has no port yet

    try:
        until(both_answer, 60, lambda: service.said)
        first, second = shares()
        os.kill(first, signal.SIGKILL)
        until(lambda: not running(first) and both_answer(), 60, lambda: service.said)
        assert second in (after := shares())
        assert first not in after
        assert re.search(r"API [12] ended by SIGKILL; it is begun again", service.said)
        scraped = httpx2.get(f"http://127.0.0.1:{port}/metrics").text
        assert "darkroom_redis_up 1.0" in scraped
    finally:
        pids = started_by(service.process.pid)
        service.process.terminate()
        assert service.process.wait(30) == 0
    assert not any(running(pid) for pid in pids)


def files(pid: int) -> int:
    return len(list((Path("/proc") / str(pid) / "fd").iterdir()))


def test_a_model_that_cannot_be_loaded_ends_it_with_the_models_name_and_the_reason(tmp_path: Path):
    card = (Path(__file__).parent.parent / "models" / "cards" / "emoji-sd.toml").read_text()
    card = re.sub(r"^name = .*$", 'name = "gone"', card, count=1, flags=re.M)
    card = re.sub(r"^path = .*$", 'path = "/no/such/folder"', card, count=1, flags=re.M)
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "gone.toml").write_text(card)
    service = up(tmp_path, DARKROOM_CARDS_DIR="cards", DARKROOM_MODELS="gone")
    assert service.process.wait(60) == 1
    assert service.said.splitlines()[-1].startswith("worker 1 has given up: gone cannot be loaded: ")
    assert "/no/such/folder" in service.said.splitlines()[-1]


# -- a part alone


def part(code: str, ready: bool, **given: object) -> Part:
    return Part("clock", [sys.executable, "-c", code], dict(os.environ), lambda _: ready, **given)  # pyright: ignore


def tended(clock: Part, said: list[str], seconds: float = 30) -> None:
    """Until it is given up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        clock.tend(said.append)
        time.sleep(0.01)


@pytest.fixture
def _hurried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(parts, "LONGEST_PAUSE", 0.2)


@pytest.mark.usefixtures("_hurried")
def test_a_part_that_is_never_ready_is_given_up_after_pauses_that_double():
    said: list[str] = []
    with pytest.raises(StartFailed, match="clock ended 5 times before it was ready, at last with status 3"):
        tended(part("raise SystemExit(3)", ready=False), said)
    assert [re.search(r"in ([\d.]+) s", line)[1] for line in said] == ["0.05", "0.1", "0.2", "0.2"]  # pyright: ignore


@pytest.mark.usefixtures("_hurried")
@pytest.mark.parametrize(("status", "ready"), [(3, True), (os.EX_TEMPFAIL, False)])
def test_a_part_that_was_ready_or_only_missed_redis_is_never_given_up(status: int, ready: bool):
    said: list[str] = []
    tended(part(f"raise SystemExit({status})", ready), said, 3)
    assert len(said) > 5


@pytest.mark.usefixtures("_hurried")
def test_after_a_good_life_the_pauses_begin_anew(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    tended(part("raise SystemExit(3)", ready=True), said, 1)
    monkeypatch.setattr(parts, "GOOD_LIFE", 0)
    said.clear()
    tended(part("raise SystemExit(3)", ready=True), said, 1)
    assert {re.search(r"in ([\d.]+) s", line)[1] for line in said} == {"0.05"}  # pyright: ignore


def test_how_it_ended_is_said_by_name():
    assert ending(-9) == "by SIGKILL"
    assert ending(-14) == "by SIGALRM: a pass hung"
    assert ending(os.EX_TEMPFAIL) == "with status 75: Redis was away for too long"


# -- what each worker has of its own


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(local, "cores", lambda: 8)
    assert local.shares(Settings(), 1) == [{}]
    assert local.shares(Settings(), 3) == [{"DARKROOM_TORCH_THREADS": "2"}] * 3
    assert local.shares(Settings(), 20) == [{"DARKROOM_TORCH_THREADS": "1"}] * 20
    assert local.shares(Settings(torch_threads=4), 3) == [{}] * 3


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-ab")
    assert local.shares(Settings(), 3) == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("2", "GPU-ab", "2")]
    assert local.shares(Settings(device="cuda:1"), 2) == [{}] * 2
    monkeypatch.setattr(local, "cores", lambda: 2)
    assert local.shares(Settings(device="cpu"), 2) == [{"DARKROOM_TORCH_THREADS": "1"}] * 2
