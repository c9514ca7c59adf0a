"""A body that is too large is refused before it is read."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BodyTooLarge, problem


class BodyLimit:
    """Answers 413 by `Content-Length`, or as soon as a body without one has grown beyond `largest` bytes."""

    def __init__(self, app: ASGIApp, largest: int):
        self.app, self.largest = app, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = BodyTooLarge(f"the body is larger than {self.largest / 2**20:g} MiB")
        if int(Headers(scope=scope).get("content-length", 0)) > self.largest:
            await problem(too_large)(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.largest:
                raise too_large
            return message

        await self.app(scope, counted, send)
