"""A body that is too large is refused before it is read."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BodyTooLarge, show_error_of


class BodyLimit:
    """Answers 413 by `Content-Length`, or as soon as a body without one has grown beyond `largest` bytes."""

    def __init__(self, app: ASGIApp, largest: int):
        self.app, self.largest = app, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = f"the body is larger than {self.largest / 2**20:g} MiB"
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) > self.largest:
            await show_error_of(BodyTooLarge(too_large))(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.largest:
                raise HTTPException(413, too_large)  # the only kind that FastAPI lets through while it reads a body
            return message

        await self.app(scope, counted, send)
