"""A pass that hangs takes its process down: whatever it hangs in, nothing else would end it.

By SIGALRM, which is what the exit status then says, with the tracebacks of all threads on standard error. The signal
needs nothing of Python's, so it also ends C code that never lets go of the GIL. `faulthandler.dump_traceback_later`
would do as well, but starts a thread each time: 89 µs a step instead of 2.

The timer goes on while the process is stopped (SIGSTOP), and the signal comes the moment it goes on: who was stopped in
a pass for longer than the limit dies of it. The limit is therefore never less than a lease: by then the process holds
nothing any more.
"""

import faulthandler
import signal
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LEAST = 60.0  # seconds; the first pass of a shape, or with a busy neighbour, may take many times the usual
TIMES = 20  # the slowest pass that was measured


class Watchdog:
    """Args:
    limit: seconds that a pass may take; 0: `TIMES` the slowest measured, and at least `LEAST` and `lease`.
    """

    def __init__(self, limit: float, lease: float):
        self.limit, self.least = limit, max(LEAST, lease)
        faulthandler.register(signal.SIGALRM, chain=True)

    def die_if_it_hangs(self, run_pass: Callable[[], T], slowest: float) -> T:
        """Its name stands in the traceback."""
        signal.setitimer(signal.ITIMER_REAL, self.limit or max(self.least, TIMES * slowest))
        try:
            return run_pass()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
