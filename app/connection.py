"""How the API talks to a Redis that may be away: never long, and never everybody at once."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import redis.asyncio
import redis.asyncio.retry
from redis import ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.connection import Connection
from redis.exceptions import ConnectionError, TimeoutError
from redis.retry import Retry

PAUSE = 1.0  # seconds

T = TypeVar("T")


def connect(url: str, timeout: float) -> "Redis":
    """`timeout` seconds are for each: to connect, and to be silent."""
    pool = Pool.from_url(url, retry=OnceMore(), socket_timeout=timeout, socket_connect_timeout=timeout)
    return Redis.from_pool(pool)


def connect_async(url: str, timeout: float) -> "redis.asyncio.Redis":
    """As `connect`, for an event loop; who uses it notices silences himself."""
    once_more = redis.asyncio.retry.Retry(NoBackoff(), 1, supported_errors=(ConnectionError,))
    return redis.asyncio.Redis.from_url(url, retry=once_more, socket_timeout=timeout, socket_connect_timeout=timeout)


class OnceMore(Retry):
    """Again at once where a connection broke, as all do when Redis restarts. Not where it was silent: that took long.

    After such a silence, nobody asks for a second: all threads would soon wait for Redis, and clients for a thread.
    """

    silent_until = 0.0  # time.monotonic()

    def __init__(self) -> None:
        super().__init__(NoBackoff(), 1, supported_errors=(ConnectionError,))

    def __deepcopy__(self, _: dict[int, Any]) -> "OnceMore":
        return self  # each connection copies its own, but what one of them finds out, all are to know

    @contextmanager
    def noticing(self) -> Generator[None]:
        try:
            yield
        except TimeoutError:
            self.silent_until = time.monotonic() + PAUSE
            raise

    def call_with_retry(self, do: Callable[[], T], *how: Any, **more: Any) -> T:
        with self.noticing():
            return super().call_with_retry(do, *how, **more)


class Pool(ConnectionPool):
    def get_connection(self, *arguments: Any, **more: Any) -> Connection:
        once_more: OnceMore = self.connection_kwargs["retry"]
        if time.monotonic() < once_more.silent_until:
            raise TimeoutError("it was silent a moment ago")
        with once_more.noticing():  # to greet a server is not among what is retried
            return super().get_connection(*arguments, **more)
