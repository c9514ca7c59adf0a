"""`Darkroom`, and `AsyncDarkroom` with the same methods: what sends the exchanges."""

import asyncio
import builtins
import os
import time
from collections.abc import AsyncIterator, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

import httpx2

from app.schemas import Generation, Image, Model, Status
from darkroom.events import Event, Preview
from darkroom.exchange import TIMEOUT, Exchange, Exchanges, Watch, drawn, ended, expected
from darkroom.fields import Fields, numbered

T = TypeVar("T")

URL = "http://127.0.0.1:8000"
PATIENCE = 60.0  # seconds: a service that is restarted, with its models, is back


def connection(url: str | None, api_key: str | None) -> dict[str, Any]:
    """Of one's own, or as `DARKROOM_URL` and `DARKROOM_API_KEY` say."""
    key = api_key or os.environ.get("DARKROOM_API_KEY")
    return {
        "base_url": url or os.environ.get("DARKROOM_URL") or URL,
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        "timeout": TIMEOUT,
        "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=20),  # each watch holds one
    }


class Darkroom:
    """A client of the service at `url`; threads may share it."""

    def __init__(self, url: str | None = None, api_key: str | None = None, *, patience: float = PATIENCE):
        self._http = httpx2.Client(**connection(url, api_key))
        self._exchanges = Exchanges(self._http, patience)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def submit(
        self, prompt: str | None = None, *, idempotency_key: str | None = None, **fields: Unpack[Fields]
    ) -> Generation:
        """Queue a generation.

        Raises:
            Refused: a field is wrong, or the queue stays full; nothing was queued.
        """
        return self._do(self._exchanges.submit(prompt, fields, idempotency_key))

    def generate(
        self, prompt: str | None = None, *, idempotency_key: str | None = None, **fields: Unpack[Fields]
    ) -> Generation:
        """Queue a generation, and wait for its pictures, as long as it takes.

        Raises:
            Refused: as `submit`.
            NotDrawn: there will be none.
        """
        return drawn(self.wait(self.submit(prompt, idempotency_key=idempotency_key, **fields)))

    def wait(self, generation: Generation | str) -> Generation:
        """A generation when it has ended, however it did."""
        return ended(list(self.watch(generation)))

    def watch(self, generation: Generation | str) -> Iterator[Event]:
        """Its events from the first to the last, as they come; goes on where a connection broke."""
        watch = Watch(self._exchanges, generation)
        while not watch.ended:
            stream = self._do(watch.connect())
            try:
                for sent in httpx2.EventSource(expected(stream, "text/event-stream")):
                    yield watch.heard(sent)
            except httpx2.TransportError:
                continue
            finally:
                stream.close()

    def get(self, generation: Generation | str) -> Generation:
        """A generation as it stands."""
        return self._do(self._exchanges.get(generation))

    def cancel(self, generation: Generation | str) -> Generation:
        """End it, queued or running.

        Raises:
            Refused: with status 409, because it has ended otherwise.
        """
        return self._do(self._exchanges.cancel(generation))

    def image(self, image: Image | Preview) -> bytes:
        """A picture's file, as it is or as it was on the way."""
        return self._do(self._exchanges.image(image))

    def save(self, generation: Generation, path: str | PathLike[str]) -> builtins.list[Path]:
        """Write its pictures: to `path`, or, of several, to `apple-1.png`, `apple-2.png`, …"""
        paths = numbered(Path(path), len(generation.images))
        for image, to in zip(generation.images, paths, strict=True):
            to.write_bytes(self.image(image))
        return paths

    def models(self) -> builtins.list[Model]:
        """What there is to draw with, the default first."""
        return self._do(self._exchanges.models())

    def list(self, *, status: Status | None = None, model: str | None = None) -> Iterator[Generation]:
        """Your generations, newest first, as many as are asked for."""
        cursor = None
        while True:
            page = self._do(self._exchanges.page(cursor, status, model))
            yield from page.data
            if (cursor := page.next_cursor) is None:
                return

    def _do(self, exchange: Exchange[T]) -> T:
        try:
            ask = next(exchange)
            while True:
                time.sleep(ask.after)
                try:
                    answer = self._http.send(ask.request, stream=ask.stream)
                    if not answer.is_success:
                        answer.read()
                except (httpx2.TransportError, httpx2.DecodingError) as error:
                    ask = exchange.throw(error)
                else:
                    ask = exchange.send(answer)
        except StopIteration as done:
            return done.value


class AsyncDarkroom:
    """`Darkroom`, for asyncio."""

    def __init__(self, url: str | None = None, api_key: str | None = None, *, patience: float = PATIENCE):
        self._http = httpx2.AsyncClient(**connection(url, api_key))
        self._exchanges = Exchanges(self._http, patience)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def submit(
        self, prompt: str | None = None, *, idempotency_key: str | None = None, **fields: Unpack[Fields]
    ) -> Generation:
        return await self._do(self._exchanges.submit(prompt, fields, idempotency_key))

    async def generate(
        self, prompt: str | None = None, *, idempotency_key: str | None = None, **fields: Unpack[Fields]
    ) -> Generation:
        return drawn(await self.wait(await self.submit(prompt, idempotency_key=idempotency_key, **fields)))

    async def wait(self, generation: Generation | str) -> Generation:
        return ended([event async for event in self.watch(generation)])

    async def watch(self, generation: Generation | str) -> AsyncIterator[Event]:
        watch = Watch(self._exchanges, generation)
        while not watch.ended:
            stream = await self._do(watch.connect())
            try:
                async for sent in httpx2.EventSource(expected(stream, "text/event-stream")):
                    yield watch.heard(sent)
            except httpx2.TransportError:
                continue
            finally:
                await stream.aclose()

    async def get(self, generation: Generation | str) -> Generation:
        return await self._do(self._exchanges.get(generation))

    async def cancel(self, generation: Generation | str) -> Generation:
        return await self._do(self._exchanges.cancel(generation))

    async def image(self, image: Image | Preview) -> bytes:
        return await self._do(self._exchanges.image(image))

    async def save(self, generation: Generation, path: str | PathLike[str]) -> builtins.list[Path]:
        paths = numbered(Path(path), len(generation.images))
        for image, to in zip(generation.images, paths, strict=True):
            to.write_bytes(await self.image(image))
        return paths

    async def models(self) -> builtins.list[Model]:
        return await self._do(self._exchanges.models())

    async def list(self, *, status: Status | None = None, model: str | None = None) -> AsyncIterator[Generation]:
        cursor = None
        while True:
            page = await self._do(self._exchanges.page(cursor, status, model))
            for generation in page.data:
                yield generation
            if (cursor := page.next_cursor) is None:
                return

    async def _do(self, exchange: Exchange[T]) -> T:
        try:
            ask = next(exchange)
            while True:
                await asyncio.sleep(ask.after)
                try:
                    answer = await self._http.send(ask.request, stream=ask.stream)
                    if not answer.is_success:
                        await answer.aread()
                except (httpx2.TransportError, httpx2.DecodingError) as error:
                    ask = exchange.throw(error)
                else:
                    ask = exchange.send(answer)
        except StopIteration as done:
            return done.value
