"""Generations: submitted, watched, fetched, canceled."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent

from app import events
from app.auth import Owner
from app.errors import InvalidRequest, NotFound, UnsupportedMediaType
from app.files import file_response
from app.images import MEDIA_TYPES
from app.jobs import Jobs
from app.schemas import Generation, GenerationList, GenerationRequest, Status
from app.settings import Settings
from app.storage import preview_key

PROBLEM = {"content": {"application/problem+json": {}}}
PROBLEMS = {
    400: {"description": "Not JSON", **PROBLEM},
    401: {"description": "No or an unknown API key", **PROBLEM},
    413: {"description": "The body is too large", **PROBLEM},
    415: {"description": "Not `application/json`", **PROBLEM},
    422: {"description": "A field is wrong: `errors` names it", **PROBLEM},
    503: {"description": "The queue is full or does not answer: `Retry-After`", **PROBLEM},
}
MISSING = {401: PROBLEMS[401], 404: {"description": "There is none, or it is not yours", **PROBLEM}, 503: PROBLEMS[503]}

router = APIRouter(prefix="/v1/generations", tags=["generations"])


def jobs(request: Request) -> Jobs:
    return request.app.state.jobs


def settings(request: Request) -> Settings:
    return request.app.state.settings


def json_only(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType(f"send application/json, not {kind or 'a body of no declared type'}")


def seconds_to_wait(
    settings: Annotated[Settings, Depends(settings)],
    prefer: Annotated[str | None, Header(description="`wait=10`: answer when it is done, or after 10 seconds")] = None,
) -> int:
    """RFC 7240: what a client prefers, it does not demand; what we do not understand, we leave."""
    wanted = re.search(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})", prefer or "")
    return min(int(wanted.group(1)), int(settings.max_wait.total_seconds())) if wanted else 0


JobsDep = Annotated[Jobs, Depends(jobs)]


@router.post("", status_code=202, dependencies=[Depends(json_only)], responses={200: {"model": Generation}, **PROBLEMS})
async def create(
    body: GenerationRequest,
    request: Request,
    response: Response,
    jobs: JobsDep,
    owner: Owner,
    wait: Annotated[int, Depends(seconds_to_wait)],
    idempotency_key: Annotated[str | None, Header(description="Same key, same body: the first answer again")] = None,
) -> Generation:
    """Queue a generation."""
    generation, replayed = await run_in_threadpool(jobs.submit, body, owner, idempotency_key)
    if wait:
        generation = await until_ended(request, jobs, generation.id, owner, wait)
        response.headers["Preference-Applied"] = f"wait={wait}"
    if generation.status in events.ENDED:
        response.status_code = 200
    else:
        response.headers["Retry-After"] = str(max(1, round(generation.eta or 1)))
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    response.headers["Location"] = f"/v1/generations/{generation.id}"
    return generation


@router.get("", responses={401: PROBLEMS[401], 422: PROBLEMS[422], 503: PROBLEMS[503]})
def index(
    response: Response,
    jobs: JobsDep,
    owner: Owner,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    status: Status | None = None,
    model: str | None = None,
) -> GenerationList:
    """Your generations, newest first."""
    page = jobs.list(owner, cursor=cursor, limit=limit, status=status, model=model)
    if page.next_cursor:
        filters = "".join(f"&{name}={value}" for name, value in (("status", status), ("model", model)) if value)
        link = f"/v1/generations?cursor={page.next_cursor}&limit={limit}{filters}"
        response.headers["Link"] = f'<{link}>; rel="next"'
    return page


@router.get("/{id}", responses=MISSING)
def show(id: str, response: Response, jobs: JobsDep, owner: Owner) -> Generation:
    """A generation as it stands."""
    response.headers["Cache-Control"] = "no-store"
    return jobs.fetch(id, owner)


@router.delete("/{id}", responses={**MISSING, 409: {"description": "It has ended already", **PROBLEM}})
def cancel(id: str, jobs: JobsDep, owner: Owner) -> Generation:
    """Cancel a generation, queued or running."""
    return jobs.cancel(id, owner)


async def known(id: str, jobs: JobsDep, owner: Owner) -> None:
    """Raises what is to be raised before a stream has begun and can no longer say so."""
    await run_in_threadpool(jobs.record, id, owner)


def resume_after(
    last_event_id: Annotated[str | None, Header(description="Where a broken stream is to go on")] = None,
) -> str:
    if last_event_id is not None and not re.fullmatch(r"\d{1,20}-\d{1,20}", last_event_id):
        raise InvalidRequest([("Last-Event-ID", "not one of ours")])
    return last_event_id or "0-0"


@router.get(
    "/{id}/events",
    response_class=EventSourceResponse,
    dependencies=[Depends(known)],
    responses={**MISSING, 422: PROBLEMS[422]},
)
async def watch(
    id: str, request: Request, jobs: JobsDep, owner: Owner, after: Annotated[str, Depends(resume_after)]
) -> AsyncIterator[ServerSentEvent]:
    """Progress and previews as server-sent events; the last one holds the generation."""
    async for event in events.follow(request.app.state.listening, id, after):
        if event is not None and event.name not in events.ENDED:
            yield ServerSentEvent(data=event.data, event=event.name, id=event.id)
            continue
        generation = await run_in_threadpool(jobs.fetch, id, owner)
        if event is not None or generation.status in events.ENDED:
            yield ServerSentEvent(data=generation, event=generation.status, id=event.id if event else None)
            return


@router.get("/{id}/images/{number}", response_class=Response, responses={200: {"content": {"image/*": {}}}, **MISSING})
def image(id: str, number: int, request: Request, jobs: JobsDep, owner: Owner) -> Response:
    """A picture's bytes: Range, ETag, and immutable."""
    pictures = jobs.record(id, owner).meta.get("images", [])
    if not 0 <= number < len(pictures):
        raise NotFound(f"generation {id} has {len(pictures)} pictures, and none is number {number}")
    picture = pictures[number]
    name = f"{id}-{number}.{picture['format']}"
    return file_response(
        request, lambda: jobs.blobs.open(picture["key"]), MEDIA_TYPES[picture["format"]], picture["etag"], name
    )


@router.get("/{id}/previews/{number}/{step}", response_class=Response, responses=MISSING)
def preview(id: str, number: int, step: int, request: Request, jobs: JobsDep, owner: Owner) -> Response:
    """What a picture looked like after a step."""
    jobs.record(id, owner)
    return file_response(
        request,
        lambda: jobs.blobs.open(preview_key(id, number, step)),
        "image/webp",
        f"{id}-{number}-{step}",
        f"{step}.webp",
    )


async def until_ended(request: Request, jobs: Jobs, id: str, owner: str, seconds: int) -> Generation:
    """The generation when it has ended, or as it stands when the time is up or the client has gone."""

    async def listen() -> None:
        async for event in events.follow(request.app.state.listening, id):
            ended = event is None and (await run_in_threadpool(jobs.record, id, owner)).status in events.ENDED
            if ended or await request.is_disconnected():
                return

    try:
        await asyncio.wait_for(listen(), seconds)
    except TimeoutError:
        pass
    return await run_in_threadpool(jobs.fetch, id, owner)
