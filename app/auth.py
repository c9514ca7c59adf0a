"""Who is asking: API keys, kept as hashes and compared in constant time."""

import hashlib
import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import Unauthorized, problem
from app.settings import Keys

EVERYBODY = "everybody"  # the owner of all generations where no keys are set

bearer = HTTPBearer(auto_error=False, description="Needed where the service has API keys.")


class KeyCheck:
    """Answers 401 before a body is read: FastAPI parses it before it asks any dependency."""

    def __init__(self, app: ASGIApp, keys: Keys):
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            try:
                caller = owner_of(Headers(scope=scope).get("authorization"), self.keys)
            except Unauthorized as error:
                await problem(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["owner"] = caller
        await self.app(scope, receive, send)


def owner_of(authorization: str | None, keys: Keys) -> str:
    """The name of the caller's key.

    Raises:
        Unauthorized: there are keys, and this is none of them.
    """
    if not keys:
        return EVERYBODY
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key:
        raise Unauthorized("an API key is needed: Authorization: Bearer <key>")
    digest = hashlib.sha256(key.strip().encode()).hexdigest()
    matching = [name for name, known in keys if hmac.compare_digest(known, digest)]  # always all of them
    if not matching:
        raise Unauthorized("this API key is not known")
    return matching[0]


def owner(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)] = None) -> str:
    """Whom `KeyCheck` let in; `bearer` is here for the documentation."""
    return request.state.owner


Owner = Annotated[str, Depends(owner)]
