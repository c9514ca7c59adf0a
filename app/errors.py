"""What can go wrong for a client, each with its status, answered as RFC 9457 problem documents.

ServiceError
 ├─ InvalidRequest 422         a field is wrong; `errors` names it
 ├─ MalformedBody 400          not JSON at all
 ├─ UnsupportedMediaType 415   not `application/json`
 ├─ BodyTooLarge 413
 ├─ Unauthorized 401
 ├─ NotFound 404               no such thing, or not yours
 ├─ NotCancelable 409          it has ended already
 ├─ IdempotencyConflict 422    the key was used with another body
 ├─ QueueFull 503              with Retry-After
 └─ StoreUnavailable 503       Redis or the blob store does not answer
"""

import http
from collections.abc import Sequence
from typing import Any

import redis.exceptions
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from obstore.exceptions import BaseError as BlobStoreError
from starlette.exceptions import HTTPException

log = structlog.get_logger()


class ServiceError(Exception):
    """Base of all errors that a client is told about."""

    status = 500
    kind = "internal-error"

    def __init__(self, detail: str, *, errors: Sequence[tuple[str, str]] = (), headers: dict[str, str] | None = None):
        super().__init__(detail)
        self.detail, self.errors, self.headers = detail, list(errors), headers or {}


class InvalidRequest(ServiceError):
    """One or more fields are wrong: `errors` holds (field, what is wrong with it)."""

    status, kind = 422, "invalid-request"

    def __init__(self, errors: Sequence[tuple[str, str]]):
        super().__init__("; ".join(f"{field}: {problem}" for field, problem in errors), errors=errors)


class MalformedBody(ServiceError):
    status, kind = 400, "malformed-body"


class UnsupportedMediaType(ServiceError):
    status, kind = 415, "unsupported-media-type"


class BodyTooLarge(ServiceError):
    status, kind = 413, "body-too-large"


class Unauthorized(ServiceError):
    status, kind = 401, "unauthorized"

    def __init__(self, detail: str):
        super().__init__(detail, headers={"WWW-Authenticate": "Bearer"})


class NotFound(ServiceError):
    status, kind = 404, "not-found"


class NotCancelable(ServiceError):
    status, kind = 409, "not-cancelable"


class IdempotencyConflict(ServiceError):
    status, kind = 422, "idempotency-key-reused"


class QueueFull(ServiceError):
    status, kind = 503, "queue-full"

    def __init__(self, detail: str, retry_after: float):
        super().__init__(detail, headers={"Retry-After": str(max(1, round(retry_after)))})


class StoreUnavailable(ServiceError):
    status, kind = 503, "store-unavailable"

    def __init__(self, detail: str):
        super().__init__(detail, headers={"Retry-After": "2"})


def problem(
    status: int,
    kind: str,
    detail: str,
    errors: Sequence[tuple[str, str]] = (),
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """A problem document; `errors` lists each wrong field."""
    body: dict[str, Any] = {
        "type": f"urn:darkroom:problem:{kind}",
        "title": kind.replace("-", " ").capitalize(),
        "status": status,
        "detail": detail,
    }
    if errors:
        body["errors"] = [{"field": field, "detail": what} for field, what in errors]
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def show_error(_: Request, error: Exception) -> JSONResponse:
    """Answer a client: the one place where an exception becomes a response."""
    match error:
        case ServiceError():
            return problem(error.status, error.kind, error.detail, error.errors, error.headers)
        case RequestValidationError():
            return show_validation(error)
        case redis.exceptions.RedisError():
            log.warning("redis_unavailable", error=str(error))
            return show_error(_, StoreUnavailable("the queue does not answer; nothing was accepted"))
        case BlobStoreError():
            log.warning("blob_store_unavailable", error=str(error))
            return show_error(_, StoreUnavailable("the image store does not answer"))
        case HTTPException():
            kind = http.HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
            return problem(error.status_code, kind, str(error.detail), headers=dict(error.headers or {}))
        case _:
            log.error("unhandled_error", exc_info=error)
            return problem(500, "internal-error", "an error of ours; it has been logged")


def show_validation(error: RequestValidationError) -> JSONResponse:
    """FastAPI's list of errors, with the field's name as the client wrote it."""
    found = error.errors()
    if any(entry["type"] == "json_invalid" for entry in found):
        return show_error_of(MalformedBody(f"the body is not JSON: {found[0]['ctx']['error']}"))
    fields = [
        (".".join(str(part) for part in entry["loc"][1:]) or str(entry["loc"][0]), entry["msg"]) for entry in found
    ]
    return show_error_of(InvalidRequest(fields))


def show_error_of(error: ServiceError) -> JSONResponse:
    return problem(error.status, error.kind, error.detail, error.errors, error.headers)


def install(app: FastAPI) -> None:
    """Let every error of this app end in `show_error`."""
    for kind in (ServiceError, RequestValidationError, HTTPException, redis.exceptions.RedisError, BlobStoreError):
        app.add_exception_handler(kind, show_error)
    app.add_exception_handler(Exception, show_error)
