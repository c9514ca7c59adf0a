"""What can go wrong for a client, each with its status, answered as RFC 9457 problem documents.

ServiceError
 ├─ InvalidRequest 422         a field is wrong; `errors` names it
 ├─ MalformedBody 400          not JSON at all
 ├─ UnsupportedMediaType 415   not `application/json`
 ├─ BodyTooLarge 413
 ├─ BodyTooSlow 408            it stopped coming
 ├─ Unauthorized 401
 ├─ NotFound 404               no such thing, or not yours
 ├─ MethodNotAllowed 405       `Allow` says which are
 ├─ NotCancelable 409          it has ended already
 ├─ NotRequeueable 409         for operators: it has not failed
 ├─ Unfinished 400             there is no result yet
 ├─ Leaving 503                this process ends while a client waits; the generation goes on
 ├─ IdempotencyConflict 422    the key was used with another body
 ├─ RangeNotSatisfiable 416    the picture has no such bytes
 ├─ QueueFull 503              with Retry-After
 ├─ TooManyListeners 503       this process has no room for another stream
 └─ StoreUnavailable 503       Redis or the blob store does not answer
"""

import http
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis.exceptions
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from obstore.exceptions import BaseError as BlobStoreError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app.schemas import FieldError, Problem

log = structlog.get_logger()

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
MOST_ERRORS = 20  # a body of a million wrong fields is not answered with a million errors
LONGEST_NAME = 64  # of a field that a client made up


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


class BodyTooSlow(ServiceError):
    status, kind = 408, "body-too-slow"

    def __init__(self, detail: str):
        super().__init__(detail, headers={"Connection": "close"})  # RFC 9110, 15.5.9


class Unauthorized(ServiceError):
    status, kind = 401, "unauthorized"

    def __init__(self, detail: str):
        super().__init__(detail, headers={"WWW-Authenticate": "Bearer"})


class NotFound(ServiceError):
    status, kind = 404, "not-found"


class MethodNotAllowed(ServiceError):
    status, kind = 405, "method-not-allowed"


class NotCancelable(ServiceError):
    status, kind = 409, "not-cancelable"


class NotRequeueable(ServiceError):
    status, kind = 409, "not-requeueable"


class Unfinished(ServiceError):
    status, kind = 400, "unfinished"


class Leaving(ServiceError):
    status, kind = 503, "leaving"

    def __init__(self, detail: str):
        super().__init__(detail, headers={"Retry-After": "1"})


class IdempotencyConflict(ServiceError):
    status, kind = 422, "idempotency-key-reused"


class RangeNotSatisfiable(ServiceError):
    status, kind = 416, "range-not-satisfiable"


class QueueFull(ServiceError):
    status, kind = 503, "queue-full"

    def __init__(self, detail: str, retry_after: float):
        super().__init__(detail, headers={"Retry-After": str(max(1, round(retry_after)))})


class TooManyListeners(ServiceError):
    status, kind = 503, "too-many-listeners"

    def __init__(self, detail: str):
        super().__init__(detail, headers={"Retry-After": "5"})


class StoreUnavailable(ServiceError):
    status, kind = 503, "store-unavailable"

    def __init__(self, detail: str):
        super().__init__(detail, headers={"Retry-After": "2"})


def problem(error: ServiceError) -> JSONResponse:
    """A problem document; `errors` lists each wrong field."""
    document = Problem(
        type=f"urn:darkroom:problem:{error.kind}",
        title=error.kind.replace("-", " ").capitalize(),
        status=error.status,
        detail=error.detail,
        errors=[FieldError(field=field, detail=what) for field, what in error.errors] or None,
    )
    content = document.model_dump(exclude_none=True)
    return JSONResponse(content, error.status, error.headers, media_type="application/problem+json")


@dataclass(frozen=True)
class Shapes:
    """How errors are told: by problem documents, but for the paths of other services' clients."""

    by_path: Mapping[str, Callable[[ServiceError], JSONResponse]]  # by what a path begins with

    def answer(self, path: str, error: ServiceError) -> JSONResponse:
        return next((shape for prefix, shape in self.by_path.items() if path.startswith(prefix)), problem)(error)


def show_error(request: Request, error: Exception) -> JSONResponse:
    """Answer a client: the one place where an exception becomes a response."""
    return request.app.state.shapes.answer(request.url.path, as_service_error(request, error))


def as_service_error(request: Request, error: Exception) -> ServiceError:
    match error:
        case ServiceError():
            return error
        case RequestValidationError():
            return wrong_fields(error)
        case redis.exceptions.RedisError():
            log.warning("redis_unavailable", error=str(error))
            return StoreUnavailable("the queue does not answer; with an Idempotency-Key it is safe to ask again")
        case BlobStoreError():
            log.warning("blob_store_unavailable", error=str(error))
            return StoreUnavailable("the image store does not answer")
        case HTTPException():
            return of_the_framework(request, error)
        case _:
            log.error("unhandled_error", method=request.method, path=request.url.path, exc_info=error)
            return ServiceError("an error of ours; it has been logged")


def wrong_fields(error: RequestValidationError) -> ServiceError:
    """FastAPI's list of errors, with each field's name as the client wrote it."""
    found: Sequence[Mapping[str, Any]] = error.errors()
    if found[0]["type"] == "json_invalid":
        return MalformedBody(f"the body is not JSON: {found[0]['ctx']['error']}")
    if found[0]["loc"] == ("body",):
        return MalformedBody("the body must be a JSON object")
    return InvalidRequest([(field_name(entry["loc"]), entry["msg"]) for entry in found[:MOST_ERRORS]])


def field_name(location: Sequence[int | str]) -> str:
    """`metadata.colour` for ("body", "metadata", "colour", "[key]")."""
    return ".".join(str(part)[:LONGEST_NAME] for part in location[1:] if part != "[key]")


def of_the_framework(request: Request, error: HTTPException) -> ServiceError:
    """What Starlette and FastAPI raise: unknown paths and methods, and whatever stopped the reading of a body."""
    match error.status_code:
        case 400 if isinstance(error.__cause__, ServiceError):
            return error.__cause__
        case 400:
            return MalformedBody(f"the body is not JSON: {error.__cause__ or error.detail}")
        case 404:
            return NotFound(f"there is nothing at {request.url.path[:200]}; /docs lists what there is")
        case 405:
            allowed = ", ".join(allowed_methods(request))
            return MethodNotAllowed(f"{request.method} is not possible here, but {allowed}", headers={"Allow": allowed})
        case status:
            other = ServiceError(error.detail, headers=dict(error.headers or {}))
            other.status, other.kind = status, http.HTTPStatus(status).phrase.lower().replace(" ", "-")
            return other


def allowed_methods(request: Request) -> list[str]:
    """Of all routes of this path: Starlette names those of the first one only."""
    return [
        method
        for method in METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


def install(app: FastAPI) -> None:
    """Let every error of this app end in `show_error`."""
    for kind in (ServiceError, RequestValidationError, HTTPException, redis.exceptions.RedisError, BlobStoreError):
        app.add_exception_handler(kind, show_error)
    app.add_exception_handler(Exception, show_error)
