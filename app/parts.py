"""The processes of a service on one machine: begun, watched, and begun again when they end by themselves."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG = 1
STOPPING_TAKES = 30.0  # seconds; a worker finishes what it has in flight
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds until a part is begun again; each time twice as many
GOOD_LIFE = 60.0  # seconds of running after which the pauses begin anew
TRIES = 5  # times in a row that a part may end before it has been ready
MEANINGS = {-signal.SIGALRM: ": a pass hung", os.EX_TEMPFAIL: ": Redis was away for too long"}


class StartFailed(Exception):
    """A part of the service ended before it was ready, and trying again is of no use."""


def die_with_parent(parent: int, with_signal: signal.Signals = signal.SIGKILL) -> None:
    """Linux: end this process when its parent ends, even by SIGKILL. `parent` tells whether it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, with_signal)
        if os.getppid() != parent:
            os._exit(1)


def spawn(
    command: Sequence[str],
    environment: dict[str, str],
    with_signal: signal.Signals = signal.SIGKILL,
    output: IO[bytes] | None = None,  # none: where ours goes
) -> subprocess.Popen[bytes]:
    """A child in a session of its own, so that Ctrl-C reaches only us, and we stop the parts in order.

    Linux takes the thread that calls this for the parent: when it ends, so does the child.
    """
    parent = os.getpid()
    return subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        preexec_fn=lambda: die_with_parent(parent, with_signal),
    )


@dataclass
class Part:
    """A process that is to run as long as we do."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    ready: Callable[[int], bool]  # by its process id
    with_signal: signal.Signals = signal.SIGKILL  # when we are killed
    last_words: Path | None = None  # where it says why trying again is of no use, if it ends with EX_CONFIG
    process: subprocess.Popen[bytes] = field(init=False)
    pause: float = 0.0
    failures: int = 0  # ends in a row before it was ready
    back_at: float | None = None  # time.monotonic() at which it is begun again, if it has ended

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.process = spawn(self.command, self.environment, self.with_signal)
        self.began, self.was_ready, self.back_at = time.monotonic(), False, None

    def look(self) -> bool:
        """Whether it has been ready.

        Raises:
            StartFailed: it says that trying again is of no use.
        """
        if self.last_words and self.process.poll() == os.EX_CONFIG:
            raise StartFailed(f"{self.name} has given up: {self.last_words.read_text()}")
        self.was_ready = self.was_ready or self.ready(self.process.pid)
        return self.was_ready

    def wait(self, seconds: float) -> None:
        """Until it is ready.

        Raises:
            StartFailed: it ended, or takes longer.
        """
        try:
            wait_until(self.look, self.process, seconds, self.name)
        except StartFailed:
            self.look()  # it may have ended just after we looked, with a reason
            raise

    def tend(self, say: Callable[[str], None]) -> bool:
        """If it has ended, begin it again, in a while. Returns whether this is when we learned of its end.

        Raises:
            StartFailed: it will not do.
        """
        if self.back_at is not None:
            if time.monotonic() >= self.back_at:
                self.start()
            return False
        status = self.process.poll()
        self.look()
        if status is None:
            return False
        if self.was_ready:
            self.failures = 0
        elif status != os.EX_TEMPFAIL:
            self.failures += 1
        if self.failures == TRIES:
            raise StartFailed(f"{self.name} ended {TRIES} times before it was ready, at last {ending(status)}")
        good_life = time.monotonic() - self.began > GOOD_LIFE
        self.pause = FIRST_PAUSE if good_life else min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * self.pause))
        self.back_at = time.monotonic() + self.pause
        say(f"{self.name} ended {ending(status)}; it is begun again in {self.pause:g} s")
        return True

    def stop(self) -> None:
        """Ask it to end, and wait; then no longer ask."""
        self.process.terminate()
        try:
            self.process.wait(STOPPING_TAKES)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def ending(status: int) -> str:
    how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
    return how + MEANINGS.get(status, "")


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if process.poll() is not None:
            raise StartFailed(f"{what} ended {ending(process.returncode)} before it was ready")
        if time.monotonic() > deadline:
            raise StartFailed(f"{what} is not ready after {seconds:.0f} s")
        time.sleep(0.02)
