"""A bad network: bytes between a TCP port and a Unix socket, which can be slow, cut, or lost without a word."""

import asyncio
import threading


class Proxy:
    """Passes connections on to the socket at `upstream`. What is lost in a black hole arrives once it is healed."""

    def __init__(self, upstream: str):
        self.upstream, self.lag = upstream, 0.0
        self.writers: set[asyncio.StreamWriter] = set()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="proxy", daemon=True).start()
        self.port = asyncio.run_coroutine_threadsafe(self._listen(), self.loop).result()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def cut(self) -> None:
        """Close every connection; new ones are welcome."""
        self.loop.call_soon_threadsafe(lambda: [writer.close() for writer in self.writers])

    def black_hole(self) -> None:
        self.loop.call_soon_threadsafe(self.flowing.clear)

    def delay(self, seconds: float) -> None:
        """Each way."""
        self.lag = seconds

    def heal(self) -> None:
        self.lag = 0.0
        self.loop.call_soon_threadsafe(self.flowing.set)

    async def _listen(self) -> int:
        self.flowing = asyncio.Event()
        self.flowing.set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return server.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.flowing.wait()
        try:
            upstream = await asyncio.open_unix_connection(self.upstream)
        except OSError:
            writer.close()
            return
        self.writers |= {writer, upstream[1]}
        await asyncio.gather(self._relay(reader, upstream[1]), self._relay(upstream[0], writer))
        self.writers -= {writer, upstream[1]}

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self.flowing.wait()
                if self.lag:
                    await asyncio.sleep(self.lag)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # one side has gone; so the other must
        finally:
            writer.close()
