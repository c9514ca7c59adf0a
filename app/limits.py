"""A body that is too large is refused before it is read, and one that stops coming is not waited for."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BodyTooLarge, BodyTooSlow, Shapes


class BodyLimit:
    """Answers 413 by `Content-Length`, or as soon as a body without one has grown beyond `largest` bytes.

    And 408 when nothing more of it has come for `silence` seconds.
    """

    def __init__(self, app: ASGIApp, largest: int, silence: float, shapes: Shapes):
        self.app, self.largest, self.silence, self.shapes = app, largest, silence, shapes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = BodyTooLarge(f"the body is larger than {self.largest / 2**20:g} MiB")
        if int(Headers(scope=scope).get("content-length", 0)) > self.largest:
            await self.shapes.answer(scope["path"], too_large)(scope, receive, send)
            return
        read, complete = 0, False

        async def limited() -> Message:
            nonlocal read, complete
            if complete:  # what comes now is that the client has gone, however late
                return await receive()
            try:
                async with asyncio.timeout(self.silence):
                    message = await receive()
            except TimeoutError:
                raise BodyTooSlow(f"nothing more of the body has come for {self.silence:g} s") from None
            read += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read > self.largest:
                raise too_large
            return message

        await self.app(scope, limited, send)
