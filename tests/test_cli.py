"""The command line, as a user has it: real processes, a real terminal program, real kills."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from app.local import LocalService
from darkroom import Darkroom
from tests.lab import Lab, Server, until

DARKROOM = [sys.executable, "-m", "app.cli"]


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*DARKROOM, *arguments], cwd=cwd, env=path_to_us() | environment, capture_output=True, text=True, timeout=120
    )


def path_to_us() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}


def started_by(pid: int) -> set[int]:
    """All processes below `pid`."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    below, added = set(), {pid}
    while added:
        added = {child for child, parent in parents.items() if parent in added} - below
        below |= added
    return below


def running(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(holds, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return found


def test_generate_draws_on_a_running_service_and_says_where_the_picture_is(service: LocalService, tmp_path: Path):
    done = run(
        "generate",
        "a green pear",
        "-o",
        "pear.webp",
        "--seed",
        "0",
        "--steps",
        "4",
        cwd=tmp_path,
        DARKROOM_URL=service.url,
    )
    assert done.returncode == 0, done.stderr
    assert "pear.webp" in done.stderr
    assert "seed 0" in done.stderr
    assert "step 4 of 4" in done.stderr
    with Image.open(tmp_path / "pear.webp") as picture:
        assert (picture.format, picture.size) == ("WEBP", (128, 128))


def test_several_pictures_get_numbered_names(service: LocalService, tmp_path: Path):
    done = run("generate", "a dog", "-o", "dog.png", "--n", "2", "--steps", "2", cwd=tmp_path, DARKROOM_URL=service.url)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dog-1.png").read_bytes() != (tmp_path / "dog-2.png").read_bytes()


def test_a_picture_can_be_started_from_a_file(service: LocalService, tmp_path: Path):
    Image.new("RGB", (128, 128), (10, 200, 10)).save(tmp_path / "green.png")
    done = run(
        "generate", "a pear", "-o", "out.png", "--image", "green.png", "--strength", "0.3", "--steps", "6",
        cwd=tmp_path, DARKROOM_URL=service.url,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out.png") as picture:
        red, green, blue = picture.convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert green > red + 50
    assert green > blue + 50


def test_what_the_service_refuses_is_said_in_one_line(service: LocalService, tmp_path: Path):
    done = run("generate", "a dog", "--scheduler", "magic", cwd=tmp_path, DARKROOM_URL=service.url)
    assert done.returncode == 1
    assert "scheduler" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_cancels_what_is_being_drawn(service: LocalService, tmp_path: Path):
    command = [*DARKROOM, "generate", "a dog", "--steps", "100", "--url", service.url]
    process = subprocess.Popen(command, cwd=tmp_path, env=path_to_us(), stderr=subprocess.PIPE, text=True)
    with Darkroom(service.url) as client:
        drawing = wait_for(lambda: next(client.list(status="running"), None))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 130, said
        assert client.get(drawing).status == "canceled"
    assert not list(tmp_path.iterdir())


def test_an_unknown_setting_stops_every_command(tmp_path: Path):
    done = run("api", cwd=tmp_path, DARKROOM_PROT="80")
    assert done.returncode == 1
    assert "DARKROOM_PROT" in done.stderr


def test_a_part_alone_says_that_it_needs_redis(tmp_path: Path):
    done = run("worker", cwd=tmp_path, REDIS_URL="")
    assert done.returncode == 1
    assert "REDIS_URL" in done.stderr


def test_models_lists_the_cards(tmp_path: Path):
    assert "emoji-sd" in run("models", cwd=tmp_path).stdout


def test_dead_lists_what_failed_with_its_reason_shows_its_traceback_and_queues_it_again(tmp_path: Path):
    server = Server(tmp_path / "valkey")
    lab = Lab(server, tmp_path)
    lab.worker()
    (id,) = lab.put(crash=1)
    lab.wait([id], "failed")
    wide = {"REDIS_URL": server.url, "COLUMNS": "160"}
    listed = run("dead", cwd=tmp_path, **wide).stdout
    assert all(word in listed for word in (id, "alpha", "ada", "error: ZeroDivisionError: of the program"))
    assert "ZeroDivisionError: of the program" in run("dead", "--traceback", id, cwd=tmp_path, **wide).stdout
    assert f"{id} is queued again" in run("dead", "--requeue", id, cwd=tmp_path, **wide).stderr
    until(lambda: lab.get(id).attempts == 2)
    lab.wait([id], "failed")
    refused = run("dead", "--requeue", "0" * 32, cwd=tmp_path, **wide)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    lab.close()
    server.stop()
    away = run("dead", cwd=tmp_path, **wide)
    assert (away.returncode, away.stderr.startswith("Redis does not answer")) == (1, True)


def test_without_a_service_generate_starts_one_and_leaves_nothing_behind(tmp_path: Path):
    process = subprocess.Popen(
        [*DARKROOM, "generate", "a dog", "-o", "dog.png", "--fresh", "--steps", "4"],
        cwd=tmp_path, env=path_to_us() | {"TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    children = wait_for(lambda: len(found := started_by(process.pid)) == 3 and found)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert (tmp_path / "dog.png").stat().st_size > 1000
    assert not any(running(child) for child in children)
    assert not list(tmp_path.glob("darkroom-*")), "temporary files are left"


UP = 5  # parts of `darkroom up`: Valkey, the API, a worker, the evaluator, the postman


@pytest.fixture
def begun() -> Iterator[list[subprocess.Popen[bytes]]]:
    """What a test has begun; it does not outlive the test, whatever becomes of that."""
    processes = list[subprocess.Popen[bytes]]()
    yield processes
    for process in processes:
        process.kill()


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda kill: kill.name)
@pytest.mark.parametrize("moment", [0.0, 6.0])
def test_up_killed_at_any_moment_leaves_no_process_behind(
    tmp_path: Path, kill: signal.Signals, moment: float, begun: list[subprocess.Popen[bytes]]
):
    process = subprocess.Popen(
        [*DARKROOM, "up", "--port", "0", "--data-dir", "data"],
        cwd=tmp_path,
        env=path_to_us(),
        stderr=subprocess.DEVNULL,
    )
    begun.append(process)
    children = wait_for(lambda: len(found := started_by(process.pid)) == UP and found)
    time.sleep(moment)
    process.send_signal(kill)
    process.wait(40)
    wait_for(lambda: not any(running(child) for child in children), 20)


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGINT], ids=lambda kill: kill.name)
def test_a_signal_that_comes_while_python_tidies_up_is_not_lost(kill: signal.Signals):
    """What is raised in a `__del__` goes no further."""
    script = """
import time
from app.cli import end_at_sigterm

class Slow:
    def __del__(self):
        print("tidying", flush=True)
        time.sleep(1)

end_at_sigterm(7)
try:
    Slow()
    time.sleep(60)
except KeyboardInterrupt:
    raise SystemExit(7)
"""
    process = subprocess.Popen([sys.executable, "-c", script], env=path_to_us(), stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    process.send_signal(kill)
    assert process.wait(20) == 7


def test_killed_with_its_parent_when_make_is_killed(tmp_path: Path, begun: list[subprocess.Popen[bytes]]):
    script = f"{sys.executable} -m app.cli up --port 0 --data-dir data --with-parent; true"
    shell = subprocess.Popen(["sh", "-c", script], cwd=tmp_path, env=path_to_us(), stderr=subprocess.DEVNULL)
    begun.append(shell)
    everything = wait_for(lambda: len(found := started_by(shell.pid)) == UP + 1 and found)
    shell.kill()
    shell.wait(10)
    wait_for(lambda: not any(running(process) for process in everything), 40)
