"""Who is asking: API keys, kept as hashes and compared in constant time."""

import hashlib
import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.errors import Unauthorized

EVERYBODY = "everybody"  # the owner of all generations where no keys are set

bearer = HTTPBearer(auto_error=False, description="Needed where the service has API keys.")


def owner(request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)] = None) -> str:
    """The name of the caller's key.

    Raises:
        Unauthorized: there are keys, and this is none of them.
    """
    keys = request.app.state.settings.api_keys
    if not keys:
        return EVERYBODY
    if credentials is None:
        raise Unauthorized("an API key is needed: Authorization: Bearer <key>")
    digest = hashlib.sha256(credentials.credentials.encode()).hexdigest()
    matching = [name for name, known in keys if hmac.compare_digest(known, digest)]  # always all of them
    if not matching:
        raise Unauthorized("this API key is not known")
    return matching[0]


Owner = Annotated[str, Depends(owner)]
