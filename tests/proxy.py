"""A network to break: a TCP proxy in front of a server, in a thread of its own."""

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: to close is to send RST, and what was still to be sent is dropped


class Proxy:
    """`Proxy("/path/of.sock")` or `Proxy("host:port")` listens on `host:port` until it is closed.

    The port stays ours all the time: while nobody listens on it, connections are refused.
    """

    def __init__(self, upstream: str):
        self.upstream = upstream.removeprefix("unix://")
        self.reserved = socket.socket()
        self.reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.reserved.bind(("127.0.0.1", 0))
        self.host, self.port = self.reserved.getsockname()
        self.seconds = 0.0
        self.swallowing = False
        self.fatal: bytes | None = None  # `cut_at`
        self.deaf: bytes | None = None  # `lose_answer_to`
        self.server: asyncio.Server | None = None
        self.open: set[asyncio.StreamWriter] = set()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="proxy", daemon=True)
        self.thread.start()
        self.heal()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def redis_url(self) -> str:
        return f"redis://{self.address}"

    def cut(self) -> None:
        """Reset all connections and refuse new ones."""
        self._do(self._cut())

    def black_hole(self) -> None:
        """Accept, swallow, never answer; connections that there are fall silent."""
        self._do(self._serve(swallowing=True))

    def delay(self, seconds: float) -> None:
        """Let every piece of data, either way, wait so long."""
        self._do(self._serve(seconds=seconds))

    def cut_at(self, word: bytes) -> None:
        """Cut when a client sends something with `word` in it, before that arrives."""
        self.fatal = word

    def lose_answer_to(self, word: bytes) -> None:
        """Once: what has `word` in it arrives, and its sender is reset before it is answered; new connections work."""
        self.deaf = word

    def heal(self) -> None:
        """All is well again. Connections of which something was swallowed are reset: they would make no sense."""
        self._do(self._serve())

    def close(self) -> None:
        self._do(self._cut())
        self._do(self._end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        self.reserved.close()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- in the thread

    def _do(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self.loop).result(10)

    async def _serve(self, *, swallowing: bool = False, seconds: float = 0.0) -> None:
        if self.swallowing and not swallowing:
            self._reset()
        self.swallowing, self.seconds = swallowing, seconds
        if self.server is None:
            self.server = await asyncio.start_server(self._accept, self.host, self.port, backlog=1024)

    async def _cut(self) -> None:
        if self.server is not None:
            self.server.close()
            self.server = None
        self._reset()
        self.swallowing, self.seconds = False, 0.0

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _reset(self) -> None:
        for writer in self.open:
            end = writer.get_extra_info("socket")
            if end.fileno() != -1:  # not closed a moment ago
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.add(writer)
        try:
            if self.swallowing:
                while await reader.read(65536):
                    pass
                return
            there, back = await self._connect()
        except OSError:  # nobody there: as if the server itself had refused, or been reset
            writer.transport.abort()
            return
        finally:
            self.open.discard(writer)
        self.open |= {writer, back}
        try:
            with suppress(asyncio.CancelledError):  # asyncio would log it
                await asyncio.gather(self._pump(reader, back, asks=True), self._pump(there, writer))
        finally:
            self.open -= {writer, back}
            writer.transport.abort()
            back.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.upstream.startswith("/"):
            return await asyncio.open_unix_connection(self.upstream)
        host, _, port = self.upstream.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asks: bool = False) -> None:
        """Until one end closes or is reset, then that end of the other connection too."""
        with suppress(OSError):
            await self._copy(reader, writer, asks)
        while self.swallowing:  # nobody hears of the end either
            await asyncio.sleep(0.05)
        if writer.can_write_eof():
            with suppress(OSError):
                writer.write_eof()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asks: bool) -> None:
        while data := await reader.read(65536):
            if self.seconds:
                await asyncio.sleep(self.seconds)
            if asks and self.fatal and self.fatal in data:
                self.fatal = None
                await self._cut()
            elif not self.swallowing:
                lost = asks and self.deaf and self.deaf in data
                self.swallowing = bool(lost)
                writer.write(data)
                await writer.drain()
                if lost:
                    self.deaf = None
                    await asyncio.sleep(0.1)  # the server acts on it
                    await self._serve()
