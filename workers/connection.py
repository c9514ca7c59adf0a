"""The worker's way to Redis, and its patience with it."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from redis import Redis, exceptions
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

T = TypeVar("T")

OUTAGE = 60.0  # seconds that a worker rides out; then it ends, and whoever runs it decides
ANSWER = 3.0  # seconds within which Redis answers: we ask for little at a time, and no command of ours blocks

REFUSING = (exceptions.ReadOnlyError, exceptions.OutOfMemoryError)  # demoted, or full: it reads, and will not write
# A server that loads is a ConnectionError, a replica without its primary a ClusterDownError.
AWAY = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ClusterDownError, OSError, *REFUSING)


class RedisAway(exceptions.ConnectionError):
    """Our patience has come to its end."""


def connect(url: str, outage: float = OUTAGE, answer: float = ANSWER) -> "Redis":
    return Redis.from_url(url, retry=Patience(outage), socket_timeout=answer, socket_connect_timeout=min(answer, 2.0))


class Patience(Retry):
    """Tries again for so many seconds. redis-py counts tries, but one may take no time or all the time of a timeout."""

    def __init__(self, seconds: float):
        super().__init__(ExponentialBackoff(cap=1, base=0.05), -1, AWAY)
        self.seconds, self.trying = seconds, False

    def call_with_retry(self, do: Callable[[], T], fail: Callable[..., Any], *options: Any, **named: Any) -> T:
        if self.trying:
            return do()  # connecting, which is a part of a command: that is tried again as a whole
        since: float | None = None

        def attempt() -> T:
            self.trying = True
            try:
                return do()
            finally:
                self.trying = False

        def failed(error: Exception, *count: int) -> None:
            nonlocal since
            since = since or time.monotonic()
            if time.monotonic() - since >= self.seconds:
                raise RedisAway(f"Redis has been away for {self.seconds:.0f} s: {error}") from None
            try:
                fail(error, *count)  # disconnects; if keys are watched, says that they may have changed
            except exceptions.WatchError:
                if isinstance(error, REFUSING):
                    raise error from None  # the transaction would run again at once and for ever, since it may read
                raise

        return super().call_with_retry(attempt, failed, *options, **named)
