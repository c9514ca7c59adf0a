"""Generations: submitted, watched, fetched, canceled."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import Annotated, Any
from urllib.parse import urlencode

import anyio.to_thread
import redis.exceptions
import structlog
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.routing import APIRoute
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.types import ASGIApp, Receive, Scope, Send

from app import events
from app.auth import Owner
from app.errors import InvalidRequest, NotFound, TooManyListeners, UnsupportedMediaType
from app.files import file_response
from app.images import MEDIA_TYPES
from app.jobs import Jobs, Record
from app.polls import Polls
from app.schemas import PICTURES, Generation, GenerationFilter, GenerationList, GenerationRequest
from app.storage import preview_key
from app.webhooks import Shape

log = structlog.get_logger()

Responses = dict[int | str, dict[str, Any]]


def always(*headers: str) -> dict[str, Any]:
    """Headers that an answer of the documentation never lacks."""
    return {name: {"required": True, "schema": {"type": "string"}} for name in headers}


def problem(description: str, *headers: str) -> dict[str, Any]:
    """An answer of the documentation."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {"description": description, "content": content, "headers": always(*headers)}


def file(media_type: str, description: str, *headers: str) -> dict[str, Any]:
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    return {"description": description, "content": content, "headers": always("ETag", *headers)}


def file_answers(media_type: str) -> Responses:
    return {
        200: file(media_type, "The file"),
        206: file(media_type, "A part of it: `Range`", "Content-Range"),
        304: {"description": "You have it: `If-None-Match`", "headers": always("ETag")},
        416: problem("It has no such bytes", "Content-Range"),
    }


PROBLEMS: Responses = {
    401: problem("No or an unknown API key", "WWW-Authenticate"),
    422: problem("A field is wrong: `errors` names it"),
    503: problem("The queue does not answer", "Retry-After"),
}
SUBMITTED: Responses = {
    200: {
        "model": Generation,
        "description": "It has ended: `Prefer: wait`, or the same `Idempotency-Key` again",
        "headers": always("Location"),
    },
    202: {"headers": always("Location", "Retry-After")},
    400: problem("The body is not a JSON object"),
    408: problem("The body stopped coming"),
    413: problem("The body is too large"),
    415: problem("The body is not `application/json`"),
    503: problem("The queue is full or does not answer", "Retry-After"),
}
MISSING: Responses = {404: problem("There is none, or it is not yours")}
CONDITIONS = {  # read by `file_response`
    "parameters": [
        {"name": name, "in": "header", "schema": {"type": "string"}, "description": description}
        for name, description in (
            ("Range", "`bytes=0-999`: only those"),
            ("If-Range", "The ETag of what you have a part of; if it is another file by now, all of it comes"),
            ("If-None-Match", "The ETag of what you have: 304 if it is still that"),
        )
    ]
}

router = APIRouter(prefix="/v1/generations", tags=["generations"], responses=PROBLEMS)


# Dependencies are `async`, however short: for others FastAPI takes a thread each, half of what a submission cost. And
# few: to find out what one needs is a fiftieth of it.


async def jobs(request: Request) -> Jobs:
    return request.app.state.jobs


def polls(request: Request) -> Polls:
    return request.app.state.polls


async def listeners(request: Request) -> events.Listeners:
    return request.app.state.listeners


async def json_only(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType(f"send application/json, not {kind or 'a body of no declared type'}")


async def each_once(request: Request) -> None:
    """Of a name that comes twice in a query, FastAPI would take the last."""
    names = [name for name, _ in request.query_params.multi_items()]
    if twice := {name: "is there more than once" for name in names if names.count(name) > 1}:
        raise InvalidRequest([*twice.items()])


async def seconds_to_wait(
    request: Request,
    prefer: Annotated[str | None, Header(description="`wait=10`: answer when it has ended, or in 10 seconds")] = None,
) -> int:
    return preferred_wait(prefer, int(request.app.state.settings.max_wait.total_seconds()))


def preferred_wait(prefer: str | None, most: int) -> int:
    """RFC 7240: what a client prefers, it does not demand; what we do not understand, we leave."""
    wanted = re.search(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})", prefer or "")
    return min(int(wanted.group(1)), most) if wanted else 0


JobsDep = Annotated[Jobs, Depends(jobs)]
ListenersDep = Annotated[events.Listeners, Depends(listeners)]
IdempotencyKey = Annotated[
    str | None,
    Header(alias="Idempotency-Key", min_length=1, max_length=256, description="Same key, same body: the same answer"),
]
LastEventId = Annotated[
    str,
    Header(alias="Last-Event-ID", pattern="^[0-9]{1,19}-[0-9]{1,19}$", description="Where a broken stream is to go on"),
]
Id = Annotated[str, Path(description="Of a generation")]
Number = Annotated[int, Path(ge=0, le=9999, description="Of a picture, the first is 0")]
Step = Annotated[int, Path(ge=0, le=9999, description="After which it looked so: an event `preview` names it")]


@router.post(
    "",
    operation_id="create_generation",
    status_code=202,
    dependencies=[Depends(json_only)],
    responses=SUBMITTED,
)
async def create(
    body: GenerationRequest,
    request: Request,
    response: Response,
    owner: Owner,
    wait: Annotated[int, Depends(seconds_to_wait)],
    idempotency_key: IdempotencyKey = None,
) -> Generation:
    """Queue a generation."""
    generation, replayed = await submitted(request, body, owner, idempotency_key)
    if wait:
        with request.app.state.listeners.place() as free:
            if free:
                generation = await until_ended(request, generation, owner, wait)
                response.headers["Preference-Applied"] = f"wait={wait}"
    if generation.status in events.ENDED:
        response.status_code = 200
    else:
        response.headers["Retry-After"] = str(max(1, round(generation.eta or 1)))
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    response.headers["Location"] = f"/v1/generations/{generation.id}"
    return generation


async def submitted(
    request: Request,
    body: GenerationRequest,
    owner: str,
    idempotency_key: str | None,
    shape: Shape = "darkroom",
    base: str = "",
) -> tuple[Generation, bool]:
    """`Jobs.submit`, in the event loop; who brings a picture waits for one of the threads that decode."""
    if all(getattr(body, field) is None for field in PICTURES):
        return await polls(request).submit(body, owner, idempotency_key, shape, base)
    submit = partial(request.app.state.jobs.submit, body, owner, idempotency_key, shape, base)
    return await anyio.to_thread.run_sync(submit, limiter=request.app.state.decoders)


@router.get("", operation_id="list_generations", dependencies=[Depends(each_once)])
def index(
    response: Response, jobs: JobsDep, owner: Owner, wanted: Annotated[GenerationFilter, Query()]
) -> GenerationList:
    """Your generations, newest first."""
    page = jobs.list(owner, **wanted.model_dump())
    if page.next_cursor:
        query = urlencode(wanted.model_dump(exclude_none=True) | {"cursor": page.next_cursor})
        response.headers["Link"] = f'</v1/generations?{query}>; rel="next"'
    return page


class Plain(APIRoute):
    """FastAPI documents it, and has no part in answering: that would be a third of what a poll costs."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in self.methods:
            request = Request(scope, receive)
            answer: ASGIApp = await self.endpoint(request.path_params["id"], request, request.state.owner)
        else:
            answer = super().handle
        await answer(scope, receive, send)


async def show(id: Id, request: Request, owner: Owner) -> Response:
    """A generation as it stands."""
    generation = await polls(request).fetch(id, owner)
    return Response(generation.model_dump_json(), media_type="application/json", headers={"Cache-Control": "no-store"})


router.add_api_route(
    "/{id}",
    show,
    operation_id="get_generation",
    response_model=Generation,
    responses=MISSING,
    methods=["GET"],
    route_class_override=Plain,
)


@router.delete("/{id}", operation_id="cancel_generation", responses={**MISSING, 409: problem("It has ended already")})
def cancel(id: Id, jobs: JobsDep, owner: Owner) -> Generation:
    """Cancel a generation, queued or running."""
    return jobs.cancel(id, owner)


async def record(id: Id, request: Request, owner: Owner) -> Record:
    """Raises what is to be raised before a stream has begun and can no longer say so."""
    return await polls(request).record(id, owner)


async def place(listeners: ListenersDep) -> AsyncIterator[None]:
    with listeners.place() as free:
        if not free:
            raise TooManyListeners("this server has as many streams open as it may; ask again, or poll")
        yield


@router.get(
    "/{id}/events",
    operation_id="watch_generation",
    dependencies=[Depends(place)],
    response_class=EventSourceResponse,
    responses=MISSING,
)
async def watch(
    id: Id,
    request: Request,
    listeners: ListenersDep,
    owner: Owner,
    record: Annotated[Record, Depends(record)],
    after: LastEventId = "0-0",
) -> AsyncIterator[ServerSentEvent]:
    """Progress and previews as server-sent events; the last one holds the generation."""
    if record.status in events.ENDED and (record.last is None or not newer(record.last.id, after)):
        yield await ending(id, request, owner)
        return
    try:
        async for event in listeners.follow(id, after):
            if event is not None and event.name not in events.ENDED:
                yield ServerSentEvent(data=event.data, event=event.name, id=event.id)
            elif event is not None or (await polls(request).record(id, owner)).status in events.ENDED:
                yield await ending(id, request, owner, event)
                return
    except redis.exceptions.RedisError as error:  # no final event: the client comes back, and goes on where it was
        log.warning("stream_cut", generation=id, error=str(error))


def newer(event: str, than: str) -> bool:
    return [int(part) for part in event.split("-")] > [int(part) for part in than.split("-")]


async def ending(id: str, request: Request, owner: str, event: events.Event | None = None) -> ServerSentEvent:
    generation = await polls(request).fetch(id, owner)
    return ServerSentEvent(data=generation, event=generation.status, id=event.id if event else None)


@router.get(
    "/{id}/images/{number}",
    operation_id="get_image",
    response_class=Response,
    responses={**file_answers("image/*"), **MISSING},
    openapi_extra=CONDITIONS,
)
def image(id: Id, number: Number, request: Request, jobs: JobsDep, owner: Owner) -> Response:
    """A picture's bytes: Range, ETag, and immutable."""
    pictures = jobs.record(id, owner).meta.get("images", [])
    if number >= len(pictures):
        raise NotFound(f"generation {id} has {len(pictures)} pictures, and none is number {number}")
    picture = pictures[number]
    name = f"{id}-{number}.{picture['format']}"
    return file_response(
        request, lambda: jobs.blobs.open(picture["key"]), MEDIA_TYPES[picture["format"]], picture["etag"], name
    )


@router.get(
    "/{id}/previews/{number}/{step}",
    operation_id="get_preview",
    response_class=Response,
    responses={**file_answers("image/webp"), **MISSING},
    openapi_extra=CONDITIONS,
)
def preview(id: Id, number: Number, step: Step, request: Request, jobs: JobsDep, owner: Owner) -> Response:
    """What a picture looked like after a step."""
    jobs.record(id, owner)
    return file_response(
        request,
        lambda: jobs.blobs.open(preview_key(id, number, step)),
        "image/webp",
        f"{id}-{number}-{step}",
        f"{step}.webp",
    )


async def until_ended(request: Request, generation: Generation, owner: str, seconds: int) -> Generation:
    """The generation when it has ended, or as it stands when the time is up, the client has gone or we have to go."""
    id = generation.id

    async def listen() -> None:
        async for event in request.app.state.listeners.follow(id):
            ended = event is None and (await polls(request).record(id, owner)).status in events.ENDED
            if ended or await request.is_disconnected():
                return

    try:
        with suppress(TimeoutError):
            await asyncio.wait_for(listen(), seconds)
        return await polls(request).fetch(id, owner)
    except redis.exceptions.RedisError as error:  # it was accepted, and stays so
        log.warning("wait_cut", generation=id, error=str(error))
        return generation
