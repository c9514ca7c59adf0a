"""Who is asking: API keys, kept as hashes and compared in constant time."""

import base64
import hashlib
import hmac
from typing import Annotated
from urllib.parse import parse_qsl, urlencode

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import Shapes, Unauthorized
from app.settings import Keys

EVERYBODY = "everybody"  # the owner of all generations where no keys are set

PROTECTED = ("/v1/", "/sdapi/", "/fal/")

bearer = HTTPBearer(auto_error=False, description="Needed where the service has API keys.")


class KeyCheck:
    """Answers 401 before a body is read: FastAPI parses it before it asks any dependency."""

    def __init__(self, app: ASGIApp, keys: Keys, shapes: Shapes):
        self.app, self.keys, self.shapes = app, keys, shapes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(PROTECTED):
            authorization = Headers(scope=scope).get("authorization")
            may_be_signed = scope["method"] in ("GET", "HEAD") and authorization is None
            try:
                by_signature = may_be_signed and signed_for(scope["path"], scope["query_string"], self.keys)
                caller = by_signature or owner_of(authorization, self.keys)
            except Unauthorized as error:
                await self.shapes.answer(scope["path"], error)(scope, receive, send)
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
    if scheme.lower() == "basic":  # of the web UI's clients: any name, and the key for a password
        key = password(key)
    elif scheme.lower() not in ("bearer", "key"):
        key = ""
    if not key:
        raise Unauthorized("an API key is needed: Authorization: Bearer <key>")
    digest = hashlib.sha256(key.strip().encode()).hexdigest()
    matching = [name for name, known in keys if hmac.compare_digest(known, digest)]  # always all of them
    if not matching:
        raise Unauthorized("this API key is not known")
    return matching[0]


def password(credentials: str) -> str:
    """Of HTTP's Basic authentication; empty if these are no credentials."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def signed(path: str, owner: str, keys: Keys) -> str:
    """The query that lets whoever has it fetch the file at this path; empty where everybody may."""
    digests = [digest for name, digest in keys if name == owner]
    return urlencode({"for": owner, "signature": signature(path, digests[0])}) if digests else ""


def signature(path: str, digest: str) -> str:
    return hmac.new(digest.encode(), path.encode(), hashlib.sha256).hexdigest()[:40]


def signed_for(path: str, query: bytes, keys: Keys) -> str | None:
    """Who has signed this path, if anybody has."""
    given = dict(parse_qsl(query.decode("latin-1")))
    name, said = given.get("for", ""), given.get("signature", "")
    right = [digest for known, digest in keys if known == name]
    matches = bool(right) and hmac.compare_digest(signature(path, right[0]).encode(), said.encode())
    return name if matches else None


async def owner(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)] = None) -> str:
    """Whom `KeyCheck` let in; `bearer` is here for the documentation."""
    return request.state.owner


Owner = Annotated[str, Depends(owner)]
