"""The systems that are compared, each behind HTTP: begun, asked, and stopped with all that they have begun."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2

from app.local import LocalService, free_port
from app.parts import spawn
from app.settings import Settings
from bench.peers.plan import Plan

ROOT = Path(__file__).parent.parent
OURS = "darkroom"
PEERS = {
    "fastapi": "bench.peers.fastapi_lock",
    "litserve": "bench.peers.litserve_batch",
    "mosec": "bench.peers.mosec_batch",
    "ray": "bench.peers.ray_serve",
}
STARTING_TAKES = 300.0  # seconds


def python() -> str:
    """Of the environment that `make peers` makes; where there is none, ours, which may have what a peer needs."""
    of_peers = ROOT / ".venv-peers" / "bin" / "python"
    return str(of_peers) if of_peers.exists() else sys.executable


@dataclass
class Ours:
    """The whole service: API, worker, embedded Valkey."""

    plan: Plan
    folder: Path
    name = OURS
    protocol = "darkroom"

    def start(self) -> None:
        plan = self.plan
        self.service = LocalService(
            Settings(
                models=tuple(plan.models),
                pinned_models=tuple(plan.models),
                cards_dir=Path(plan.cards) if plan.cards else None,
                data_dir=self.folder / "data",
                port=0,
                device=plan.device,
                dtype=plan.dtype,
                torch_threads=plan.threads,
                log_level="warning",
                log_format="json",
                max_wait=900,
                max_queued=100_000,
            )
        ).__enter__()
        self.url = self.service.url

    def stop(self) -> None:
        self.service.__exit__()


@dataclass
class Peer:
    """`name` is one of `PEERS`; with `+net` behind it, it draws with our nets, with `:16:0.2`, in such batches."""

    name: str
    plan: Plan
    folder: Path
    protocol = "peer"

    def start(self) -> None:
        port = free_port("127.0.0.1")
        library, plan = asked_of(self.name, self.plan)
        variables = replace(plan, port=port).environment() | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        with (self.folder / f"{self.name}.log").open("wb") as log:
            environment = os.environ | variables
            self.process = spawn([python(), "-m", PEERS[library]], environment, output=log)
        self.url = f"http://127.0.0.1:{port}"

    def send(self, number: int) -> bool:
        """A signal to all of its session: LitServe's workers outlive their parent, Ray's lead groups of their own.

        Returns:
            whether there was any; a signal of 0 only asks.
        """
        self.process.poll()  # or it stays as a zombie
        found = False
        for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
            with suppress(ProcessLookupError):
                if os.getsid(pid) == self.process.pid:
                    os.kill(pid, number)
                    found = True
        return found

    def stop(self) -> None:
        self.send(signal.SIGCONT)
        for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 10.0)):
            self.send(number)
            deadline = time.monotonic() + seconds
            while self.send(0) and time.monotonic() < deadline:
                time.sleep(0.1)


def asked_of(name: str, plan: Plan) -> tuple[str, Plan]:
    """The library, and the plan with what the name says of batches and nets: `mosec+net:16:0.2`."""
    what, *batches = name.split(":")
    library, _, net = what.partition("+")
    changes = dict(zip(("batch", "wait"), (int(batches[0]), float(batches[1])), strict=True)) if batches else {}
    return library, replace(plan, net=bool(net), **changes)


System = Ours | Peer


def made(name: str, plan: Plan, folder: Path) -> System:
    return Ours(plan, folder) if name == OURS else Peer(name, plan, folder)


def picture(system: System, request: dict[str, Any]) -> bytes:
    """One, alone.

    Raises:
        RuntimeError: the answer was no picture.
    """
    with httpx2.Client(base_url=system.url, timeout=300) as http:
        if system.protocol == "peer":
            answer = http.post("/predict", json=request)
        else:
            answer = http.post("/v1/generations", json=request, headers={"Prefer": "wait=300"})
            answer = http.get(answer.json()["images"][0]["url"]) if answer.status_code == 200 else answer
        if answer.status_code != 200:
            raise RuntimeError(f"{system.name}: {answer.status_code} {answer.text[:500]}")
        return answer.content


def wait_for(system: System, request: dict[str, Any]) -> None:
    """Until it draws.

    Raises:
        RuntimeError: it does not.
    """
    deadline = time.monotonic() + STARTING_TAKES
    while True:
        try:
            picture(system, request)
        except (httpx2.TransportError, RuntimeError) as error:
            ended = isinstance(system, Peer) and system.process.poll() is not None
            if ended or time.monotonic() > deadline:
                log = system.folder / f"{system.name}.log"
                said = log.read_text()[-2000:] if log.exists() else ""
                raise RuntimeError(f"{system.name} does not start: {error}\n{said}") from error
            time.sleep(0.3)
        else:
            return


def ask(module: str, question: Any) -> Any:
    """A process of its own: JSON in, JSON out."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(question),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return json.loads(done.stdout)
