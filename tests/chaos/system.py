"""The system under test: Valkey behind a bad network, two APIs, two workers. What ends is started again."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import redis.exceptions
from redis import Redis

from app.jobs import PRIORITIES, pace_key, queue_name
from app.local import EmbeddedRedis, free_port, port_open
from app.parts import die_with_parent
from app.settings import Settings
from tests.lab import FAKETIME, Server, until
from tests.proxy import Proxy

MODEL = "emoji-sd"
QUEUES = tuple(queue_name(MODEL, priority) for priority in PRIORITIES)
LEASE = 4  # seconds
MAX_ATTEMPTS = 4  # each of which costs a worker, if it is poison; more than bad luck needs
DISK = "512m"
RESTART_AFTER = 0.3  # seconds
LONGEST_FREEZE = 40.0  # seconds, at an ambush
WRONG_CLOCK = "+300s"  # with a monotonic clock that is not shifted as well, libfaketime breaks `time.sleep`
WANTED = {  # settings, of those that there are
    "lease": LEASE,
    "max_attempts": MAX_ATTEMPTS,
    "torch_threads": 1,
    "journal_interval": 0.1,  # short, as the pictures are
    "stop_grace": 1,
    "result_ttl": 7200,  # nothing is forgotten before it is audited
    "log_format": "json",
}


class Valkey(Server):
    """As a careful operator runs it: what it has answered for is on the disk."""

    def __init__(self, directory: Path):
        EmbeddedRedis.__init__(self, directory, fsync="always")
        self.down_until = 0.0  # time.monotonic()

    def kill(self) -> None:
        self.part.process.kill()


@dataclass
class Part:
    """An API or a worker, whichever process it is at present."""

    name: str
    command: str
    environment: dict[str, str]
    log: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    ended_at: float | None = None  # time.monotonic(), until it is started again

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        if self.runs:
            os.kill(self.pid, number)

    def start(self) -> None:
        parent = os.getpid()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.part", self.command],
                env=self.environment,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: die_with_parent(parent),
            )
        self.ended_at = None


class System:
    """`with System(directory) as system:` everything runs, and what ends is started again.

    Whoever starts a process must outlive it, by `die_with_parent`: so all are started by one thread, the keeper.
    """

    def __init__(self, directory: Path, apis: int = 2, workers: int = 2, mutation: str = "", **settings: object):
        self.directory = directory
        self.marks, self.blobs, logs = (directory / name for name in ("marks", "blobs", "logs"))
        for folder in (self.marks, self.blobs, logs):
            folder.mkdir(parents=True)
        self.disk = os.geteuid() == 0 and self._mount()
        self.clock = FAKETIME if workers > 1 else None
        self.valkey = Valkey(directory / "valkey")
        self.redis = Redis.from_url(self.valkey.url)
        self.proxy = Proxy(self.valkey.url)
        self.exits: Counter[tuple[str, int]] = Counter()
        self.restarts: Counter[str] = Counter()
        self.thaws: dict[Path, float] = {}
        wanted = {name: value for name, value in (WANTED | settings).items() if name in Settings.model_fields}
        environment = {
            **os.environ,
            **{f"DARKROOM_{name.upper()}": str(value) for name, value in wanted.items()},
            "DARKROOM_DATA_DIR": str(directory),
            "DARKROOM_BLOB_URL": self.blobs.as_uri(),
            "REDIS_URL": self.proxy.redis_url,
            "CHAOS_MARKS": str(self.marks),
            "CHAOS_MUTATION": mutation,
        }
        self.apis, self.workers = list[Part](), list[Part]()
        for i in range(apis):
            port = free_port("127.0.0.1")
            own = environment | {"DARKROOM_PORT": str(port)}
            self.apis.append(Part(f"api {i + 1}", "api", own, logs / f"api-{i + 1}.log", port))
        for i in range(workers):
            wrong = {"FAKETIME": WRONG_CLOCK, "LD_PRELOAD": str(self.clock)} if i == 1 and self.clock else {}
            self.workers.append(Part(f"worker {i + 1}", "worker", environment | wrong, logs / f"worker-{i + 1}.log"))
        self.closing = threading.Event()
        self.keeper = threading.Thread(target=self._keep, name="keeper")

    def __enter__(self) -> "System":
        self.keeper.start()
        try:
            until(self.ready, 120, lambda: f"the system does not start, see {self.directory}")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ready(self) -> bool:
        """All parts run, and every worker has said how fast it is."""
        apis = all(api.runs and port_open("127.0.0.1", api.port) for api in self.apis)
        return apis and all(self.name_of(worker).encode() in self.paces() for worker in self.workers)

    def paces(self) -> list[bytes]:
        try:
            return self.redis.hkeys(pace_key(MODEL))
        except redis.exceptions.RedisError:
            return []

    def name_of(self, worker: Part) -> str:
        """As it calls itself in Redis."""
        return f"{socket.gethostname()}.{worker.pid}"

    def held_by(self, worker: Part) -> list[str]:
        """The generations that it holds."""
        try:
            leases = [lease for queue in QUEUES for lease in self.redis.zrange(f"rq:wip:{queue}", 0, -1)]
            ids = [lease.decode().partition(":")[0] for lease in leases]
            owners = [self.redis.hget(f"rq:job:{id}", "worker_name") for id in ids]
        except redis.exceptions.RedisError:
            return []
        return [id for id, owner in zip(ids, owners, strict=True) if owner == self.name_of(worker).encode()]

    def left_in_redis(self) -> dict[str, int]:
        """What RQ has not done with."""
        counts = {f"rq:queue:{queue}{part}": 0 for queue in QUEUES for part in ("", ":intermediate")}
        counts = {key: self.redis.llen(key) for key in counts}
        counts |= {f"rq:wip:{queue}": self.redis.zcard(f"rq:wip:{queue}") for queue in QUEUES}
        return {key: count for key, count in counts.items() if count}

    @property
    def sleeps(self) -> bool:
        """Whether a worker is frozen at an ambush: then the others should be left to take over from it."""
        return any(self.thaws.get(mark) != 0 for mark in self.marks.glob("*.freeze-*"))

    def heal(self) -> None:
        """End all faults that last. Whatever was killed is on its way already."""
        self.proxy.heal()
        for part in (*self.apis, *self.workers):
            part.signal(signal.SIGCONT)
        self.full_disk().unlink(missing_ok=True)
        self.valkey.down_until = 0.0

    def close(self) -> None:
        self.heal()
        self.closing.set()
        self.keeper.join()
        for part in (*self.workers, *self.apis):
            part.signal(signal.SIGTERM)
        for part in (*self.workers, *self.apis):
            if part.process:
                end(part.process)
        self.redis.close()
        self.proxy.close()
        self.valkey.stop()
        if self.disk:
            subprocess.run(["umount", "--lazy", str(self.blobs)], check=True)

    def processes_left(self) -> list[str]:
        """Those that were started for this run: they carry the folder of its marks."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"CHAOS_MARKS={self.marks}".encode() in (process / "environ").read_bytes():
                    found.append(process.name)
        return found

    def full_disk(self) -> Path:
        return self.blobs / "full"

    def history(self, id: str) -> Iterator[str]:
        """What the logs say of a generation."""
        for log in sorted((self.directory / "logs").iterdir()):
            for line in log.read_text(errors="replace").splitlines():
                if id in line:
                    yield f"{log.stem}: {line}"

    # -- the keeper

    def _keep(self) -> None:
        while not self.closing.wait(0.05):
            self._revive_valkey()
            for part in (*self.apis, *self.workers):
                self._revive(part)
            self._thaw()

    def _revive(self, part: Part) -> None:
        if part.process is None:
            part.start()
        elif (code := part.process.poll()) is None:
            return
        elif part.ended_at is None:
            part.ended_at = time.monotonic()
            self.exits[part.command, code] += 1
        elif time.monotonic() - part.ended_at > RESTART_AFTER:
            part.start()
            self.restarts[part.command] += 1

    def _revive_valkey(self) -> None:
        if self.valkey.part.process.poll() is not None and time.monotonic() > self.valkey.down_until:
            self.valkey.start()
            self.restarts["valkey"] += 1

    def _thaw(self) -> None:
        """Whoever froze at an ambush sleeps until its job has ended without it."""
        for mark in self.marks.glob("*.freeze-*"):
            if mark not in self.thaws:
                self.thaws[mark] = time.monotonic() + LONGEST_FREEZE
            elif self.thaws[mark] and (time.monotonic() > self.thaws[mark] or self._overtaken(mark)):
                self.thaws[mark] = 0
                for worker in self.workers:
                    if str(worker.pid) == mark.name.split(".")[1]:
                        worker.signal(signal.SIGCONT)

    def _overtaken(self, mark: Path) -> bool:
        try:
            status = self.redis.hget(f"rq:job:{mark.name.split('.')[0]}", "status")
        except redis.exceptions.RedisError:
            return False
        return status not in (b"queued", b"started")

    def _mount(self) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(self.blobs)]
        return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


def end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
