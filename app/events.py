"""Progress over a Redis Stream, one a generation: whoever listens later, or again, misses nothing."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import redis.asyncio
from redis.client import Pipeline

ENDED = frozenset({"succeeded", "failed", "canceled", "expired"})
LONGEST = 1000  # entries a stream keeps; a hundred steps with previews fit many times
FORGOTTEN_AFTER = timedelta(days=8)  # one that never ended; longer than any may wait. The others go with their results
PATIENCE = 10.0  # seconds of silence after which a listener looks whether there is anything left to wait for

# `record` below, for scripts that end a generation or queue it again: its status changes and is told in one step.
RECORD = f"""
local function record(stream, status, ttl)
    local data = cjson.encode({{status = status}})
    redis.call('XADD', stream, 'MAXLEN', '~', {LONGEST}, '*', 'event', status, 'data', data)
    if ttl then redis.call('EXPIRE', stream, ttl, 'LT') end
end
"""


T = TypeVar("T")


class Event(NamedTuple):
    id: str
    name: str
    data: dict[str, Any]


def stream(generation: str) -> str:
    return f"darkroom:events:{generation}"


def record(
    pipe: Pipeline, generation: str, name: str, data: dict[str, Any] | None = None, ttl: timedelta = FORGOTTEN_AFTER
) -> None:
    """Append an event; the caller executes the pipeline."""
    key = stream(generation)
    pipe.xadd(key, {"event": name, "data": json.dumps(data or {})}, maxlen=LONGEST, approximate=True)
    pipe.expire(key, ttl, lt=True)  # a preview that comes after the end does not keep the stream


def parse(entries: list[Any]) -> list[Event]:
    return [Event(text(id), text(fields[b"event"]), json.loads(fields[b"data"])) for id, fields in entries]


def flat(id: bytes, fields: list[bytes]) -> Event:
    """One as scripts hand it on, names and values in a row."""
    return parse([(id, dict(zip(fields[::2], fields[1::2], strict=True)))])[0]


def text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


class Listeners:
    """Those who wait for events in this process: so many at once, and none once it is `leaving`.

    Of one event loop: nothing here is for threads.
    """

    def __init__(self, connection: "redis.asyncio.Redis", most: int):
        self.connection, self.free = connection, most
        self.leaving = asyncio.Event()

    @contextmanager
    def place(self) -> Generator[bool]:
        """One of the places, if one is free."""
        if self.free <= 0:
            yield False
            return
        self.free -= 1
        try:
            yield True
        finally:
            self.free += 1

    async def follow(self, generation: str, after: str = "0-0") -> AsyncIterator[Event | None]:
        """Every event after `after` as it comes, to the one that ends it; None after each `PATIENCE` of silence.

        It also ends when this process is leaving: who listened goes on elsewhere.
        """
        while not self.leaving.is_set():
            reading = self.connection.xread({stream(generation): after}, block=int(PATIENCE * 1000))
            answer = await unless(self.leaving, reading)
            if not answer:
                yield None
                continue
            entries = answer[0][1] if isinstance(answer, list) else next(iter(answer.values()))[0]
            for event in parse(cast(list[Any], entries)):  # the stub does not follow RESP2 and RESP3 that far
                after = event.id
                yield event
                if event.name in ENDED:
                    return


async def unless(passed: asyncio.Event, answer: Awaitable[T]) -> T | None:
    """The answer, or None if `passed` is set before it comes."""
    tasks = asyncio.ensure_future(answer), asyncio.ensure_future(passed.wait())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
