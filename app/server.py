"""uvicorn, for clients that are slow and for restarts that nobody notices."""

import asyncio
import os
import socket
from contextlib import suppress
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

KEEP_ALIVE = 75  # seconds that an idle connection stays: proxies keep theirs for 60, and should be the ones to close
LOOKS = 4  # in each `client_timeout`
SEND_BUFFER = 128 * 1024  # bytes; Linux doubles it


def serve(app: FastAPI, host: str, port: int, shares_port: bool = False) -> None:
    """Until SIGTERM or SIGINT."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Connection,
        loop="asyncio",  # with uvloop, redis-py takes a connection that broke for a bug
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=10,  # what is left then is cut: submissions that a store keeps waiting
    )
    if not shares_port:
        return Server(config).run()
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.create_server(address[:2], family=family, backlog=config.backlog, reuse_port=True) as listening:
        return Server(config).run([listening])


class Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Whoever waits or listens is answered first: uvicorn tells the app only when all connections have ended.

        What the kernel has accepted and we have not is answered as well: to close its socket is to reset it.
        """
        listening = [socket.socket(fileno=os.dup(one.fileno())) for server in self.servers for one in server.sockets]
        for server in self.servers:
            server.close()  # which leaves those open
        accepted = list[socket.socket]()
        for one in listening:
            one.setblocking(False)
            with one, suppress(BlockingIOError):
                while True:
                    accepted.append(one.accept()[0])
        for one in accepted:
            await asyncio.get_running_loop().connect_accepted_socket(self.connection, one)
        cast(FastAPI, self.config.app).state.listeners.leaving.set()
        await asyncio.sleep(0.1)  # what was accepted just now is read, and begins
        await super().shutdown(sockets)

    def connection(self) -> asyncio.Protocol:
        """As uvicorn makes them."""
        return Connection(self.config, self.server_state, self.lifespan.state)


class Connection(HttpToolsProtocol):
    """Cuts a client that leaves its request unfinished or its answer unread: uvicorn waits as long as it takes.

    Only the transport can: to close it is to wait until all has been read. (Of a body, `BodyLimit` takes care.)
    """

    left = 0  # bytes that the client had not read when we last looked
    idle = 0  # looks since it last did anything that we wait for

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Of the kernel's own 2.5 MB, a third must be free before it takes more: slow clients would seem to stall.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.look_again()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.idle = 0

    def look_again(self) -> None:
        timeout: Any = cast(FastAPI, self.config.app).state.settings.client_timeout
        self.loop.call_later(timeout.total_seconds() / LOOKS, self.look)

    def look(self) -> None:
        left, before = self.transport.get_write_buffer_size(), self.left
        if self.transport.is_closing() and not left:
            return
        between_requests = getattr(self.cycle, "response_complete", True)  # there is no cycle before the first
        kept_alive = self.timeout_keep_alive_task is not None  # nothing of its next request has come, nor need it
        waited_for = left >= before if left else between_requests and not kept_alive
        self.left, self.idle = left, self.idle + 1 if waited_for else 0
        if self.idle > LOOKS:
            self.transport.abort()
        else:
            self.look_again()
