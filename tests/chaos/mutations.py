"""Errors put into the service on purpose: `make chaos` must fail with each, or it proves nothing.

Each replaces a line of the service's source in the process that starts; one whose line is gone fails loudly.
"""

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from app import jobs, scripts


def lease() -> None:
    """A worker ends a job without asking whether it is still its own."""
    from workers import leases

    edit(
        leases,
        "END",
        "if job[1] ~= 'started' or job[2] ~= ARGV[2] or not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end",
        "",
    )


def claim() -> None:
    """A worker claims what it popped, whatever became of it since."""
    from workers import leases

    rewrite(leases.Leases, "_claim", 'if status != b"queued":', "if False:")


def guard() -> None:
    """A page of a journal is trusted without its digest."""
    from workers import journal

    rewrite(journal, "read", "if told != digest(body, key):", "if False:")


def order() -> None:
    """A job is settled while its picture is still to be stored."""
    from workers import studio

    rewrite(studio.Studio, "_store", "self.blobs.save(key, data)", "self.files.submit(self.blobs.save, key, data)")


def cancel() -> None:
    """What has ended can still be canceled."""
    rewrite(jobs.Jobs, "end", 'if standing not in ("queued", "running"):', "if False:")


def idempotency() -> None:
    """A request that is sent again is drawn again."""
    jobs.SUBMIT = scripts.Script(replaced(jobs.SUBMIT.text, "if known then", "if false then"))


def takeover() -> None:
    """Nobody takes over what a dead worker held."""
    from workers import leases

    leases.Leases.run_out = lambda self, queue: []  # type: ignore[method-assign]


OF_WORKERS: dict[str, Callable[[], None]] = {f.__name__: f for f in (lease, claim, guard, order, takeover)}
OF_THE_API: dict[str, Callable[[], None]] = {f.__name__: f for f in (cancel, idempotency)}


def edit(module: Any, name: str, old: str, new: str) -> None:
    """Change a text of a module."""
    setattr(module, name, replaced(getattr(module, name), old, new))


def rewrite(owner: Any, name: str, old: str, new: str) -> None:
    """Change a line of a function of a module or class."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    found: dict[str, Any] = {}
    exec(replaced(source, old, new), function.__globals__, found)
    setattr(owner, name, found[name])


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"the line that this mutation changes is not there: {old}"
    return text.replace(old, new)
