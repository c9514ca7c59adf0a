"""Replicate's API, for its unmodified client: https://replicate.com/docs/reference/http.

A prediction is a generation, under the same id. Models are called `owner/name`, of which the name is ours; a version is
the card's digest.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict

from app import events
from app.errors import InvalidRequest, NotFound
from app.files import file_response
from app.fronts.desk import Counter, Desk, DeskDep, asked_for, nearest_size, renamed, unsuccessful
from app.jobs import is_id, new_id
from app.routes.generations import json_only, place, seconds_to_wait
from app.schemas import PICTURES, Generation, GenerationRequest, Status
from app.storage import upload_key
from app.webhooks import secret_for
from models.catalog import ModelCard

router = APIRouter(prefix="/v1", include_in_schema=False)  # the document of this API is Replicate's

OWNER = "darkroom"
STATUS: dict[Status, str] = {  # there is no other word that their client bears
    "queued": "starting",
    "running": "processing",
    "succeeded": "succeeded",
    "failed": "failed",
    "canceled": "canceled",
    "expired": "failed",
}
OURS = {  # their names for fields of ours, beside our own
    "num_outputs": "n",
    "num_steps": "num_inference_steps",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "cfg": "guidance_scale",
    "prompt_strength": "strength",
    "init_image": "image",
}
UNHEEDED = (
    "output_quality",
    "disable_safety_checker",
    "go_fast",
    "megapixels",
    "apply_watermark",
    "refine",
    "lora_scale",
)
EVENTS: dict[str, tuple[Status, ...]] = {  # of their webhooks; pictures are there when all is
    "start": ("running",),
    "output": ("succeeded",),
    "logs": (),
    "completed": ("succeeded", "failed", "canceled", "expired"),
}
PAGE = 100
SINCE = datetime(2026, 1, 1, tzinfo=UTC)  # when a model was made is not known


class PredictionRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    input: dict[str, Any]
    version: str | None = None
    model: str | None = None
    stream: bool | None = None  # every prediction can be watched
    webhook: str | None = None
    webhook_events_filter: list[str] | None = None


# -- predictions


Wait = Annotated[int, Depends(seconds_to_wait)]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=256)]


@router.post("/predictions", status_code=201, dependencies=[Depends(json_only)])
async def create(
    body: PredictionRequest, response: Response, desk: DeskDep, wait: Wait, key: IdempotencyKey = None
) -> dict[str, Any]:
    """A prediction of a version: a digest, `owner/name`, or `owner/name:digest`."""
    named = body.version or body.model
    if named is None:
        raise InvalidRequest([("version", "is missing")])
    return await predicted(desk, body, card_of(desk, "version", named), response, wait, key)


@router.post("/models/{owner}/{name}/predictions", status_code=201, dependencies=[Depends(json_only)])
async def create_of_model(
    owner: str,
    name: str,
    body: PredictionRequest,
    response: Response,
    desk: DeskDep,
    wait: Wait,
    key: IdempotencyKey = None,
) -> dict[str, Any]:
    """A prediction of a model."""
    return await predicted(desk, body, model_named(desk, owner, name), response, wait, key)


@router.get("/predictions")
def index(desk: DeskDep, cursor: str | None = None) -> dict[str, Any]:
    """Yours, newest first."""
    page = desk.jobs.list(desk.owner, cursor=cursor, limit=PAGE)
    following = desk.absolute(f"/v1/predictions?cursor={page.next_cursor}") if page.next_cursor else None
    return {"previous": None, "next": following, "results": [shown(desk, one) for one in page.data]}


@router.get("/predictions/{id}")
def show(id: str, desk: DeskDep) -> dict[str, Any]:
    """A prediction as it stands."""
    return shown(desk, desk.jobs.fetch(id, desk.owner))


@router.post("/predictions/{id}/cancel")
def cancel(id: str, desk: DeskDep) -> dict[str, Any]:
    """Cancel a prediction; one that has ended stays as it is."""
    generation = desk.jobs.fetch(id, desk.owner)
    if generation.status in events.ENDED:
        return shown(desk, generation)
    return shown(desk, desk.jobs.cancel(id, desk.owner))


@router.get("/predictions/{id}/stream", dependencies=[Depends(place)], response_class=StreamingResponse)
async def stream(id: str, desk: DeskDep) -> StreamingResponse:
    """Server-sent events: `logs`, `output` for each picture, `done`."""
    generation = await desk.fetch(id)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(streamed(desk, generation), 200, headers, "text/event-stream")


async def streamed(desk: Desk, generation: Generation) -> AsyncIterator[str]:
    def sent(id: str, name: str, data: str) -> str:
        return f"event: {name}\nid: {id}\n" + "".join(f"data: {line}\n" for line in data.split("\n")) + "\n"

    if generation.status not in events.ENDED:
        async for event in desk.listeners.follow(generation.id):
            if event is None:
                yield ": ping\n\n"
            elif event.name == "progress":
                yield sent(event.id, "logs", progress_line(event.data["step"], event.data["steps"]))
    done = await desk.fetch(generation.id)
    for i, image in enumerate(done.images):
        yield sent(f"{done.id}-{i}", "output", desk.url(image.url))
    if done.status == "failed":
        yield sent(f"{done.id}-error", "error", json.dumps({"detail": unsuccessful(done)}))
    reason = {"canceled": {"reason": "canceled"}, "failed": {"reason": "error"}}.get(STATUS[done.status], {})
    yield sent(f"{done.id}-done", "done", json.dumps(reason))


async def predicted(
    desk: Desk, body: PredictionRequest, card: ModelCard, response: Response, wait: int, key: str | None
) -> dict[str, Any]:
    asked, unheeded = await translate(desk, card, body.input)
    unheeded = [f"input.{name}" for name in unheeded]
    if "logs" in (body.webhook_events_filter or ()):
        unheeded.append("webhook_events_filter: logs")
    if events_told := told(body):
        if asked.webhook is not None:
            raise InvalidRequest([("webhook", "is in `input` already")])
        asked = asked.model_copy(update={"webhook": desk.webhook("webhook", body.webhook or "", events_told)})
    try:
        generation = await desk.submit(asked, key, "replicate" if events_told else "darkroom")
    except InvalidRequest as error:
        raise in_input(renamed(error, names_in(body.input))) from None
    if re.search(r"(?:^|[,;\s])wait\s*(?:$|[,;])", desk.request.headers.get("prefer", "")):  # as their `run` sends it
        wait = int(desk.settings.max_wait.total_seconds())
    prediction = shown(desk, await desk.ended(generation, wait) if wait else generation)
    if wait:
        response.headers["Preference-Applied"] = f"wait={wait}"
    if prediction["status"] == "processing":
        prediction["status"] = "starting"  # or their `run` takes it for done
    response.headers["Location"] = prediction["urls"]["get"]
    prediction["logs"] = "".join(f"{name} is not heeded\n" for name in unheeded) + prediction["logs"]
    return prediction


def told(body: PredictionRequest) -> list[Status]:
    """Of what their webhook is told.

    Raises:
        InvalidRequest: there is no such event, or no webhook.
    """
    wanted = body.webhook_events_filter
    if body.webhook is None:
        if wanted is not None:
            raise InvalidRequest([("webhook_events_filter", "needs a `webhook`")])
        return []
    if wanted and (strange := [name for name in wanted if name not in EVENTS]):
        raise InvalidRequest(
            [("webhook_events_filter", f"there is no {strange[0][:64]!r}; there are {', '.join(EVENTS)}")]
        )
    return list(dict.fromkeys(event for name in wanted or ["output", "completed"] for event in EVENTS[name]))


async def translate(desk: Desk, card: ModelCard, given: Mapping[str, Any]) -> tuple[GenerationRequest, list[str]]:
    """Their input as a request of ours, and which of its fields are not heeded.

    Raises:
        InvalidRequest: a field is wrong or unknown: `input.name`.
    """
    fields = {OURS.get(name, name): value for name, value in given.items() if name not in UNHEEDED}
    fields["model"] = card.name
    if shape := fields.pop("aspect_ratio", None):
        fields |= of_shape(card, str(shape))
    if fields.get("output_format") == "jpg":
        fields["output_format"] = "jpeg"
    for name in PICTURES:
        if isinstance(fields.get(name), str):
            fields[name] = await fetched(desk, name, fields[name])
    try:
        return asked_for(fields, names_in(given)), [name for name in UNHEEDED if name in given]
    except InvalidRequest as error:
        raise in_input(error) from None


def names_in(given: Mapping[str, Any]) -> dict[str, str]:
    """What the client calls our fields."""
    return {ours: theirs for theirs, ours in OURS.items() if theirs in given}


def in_input(error: InvalidRequest) -> InvalidRequest:
    return InvalidRequest([(f"input.{field}", what) for field, what in error.errors])


def of_shape(card: ModelCard, shape: str) -> dict[str, int]:
    match = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", shape)
    if match is None:
        raise InvalidRequest([("input.aspect_ratio", "is two numbers, such as 16:9")])
    wide, tall = int(match[1]), int(match[2])
    scale = math.sqrt(card.size.width * card.size.height / (wide * tall))
    width, height = nearest_size(card, max(1, round(wide * scale)), max(1, round(tall * scale)))
    return {"width": width, "height": height}


async def fetched(desk: Desk, field: str, value: str) -> str:
    """A picture as we take it: what is a URL must be that of a file which was uploaded here."""
    if not value.startswith(("http://", "https://")):
        return value
    head, _, id = value.partition("?")[0].rpartition("/")
    if not head.endswith("/v1/files") or not is_id(id):
        raise InvalidRequest([(f"input.{field}", "send a data: URL, or the URL of a file that was uploaded here")])
    try:
        data = await run_in_threadpool(desk.jobs.blobs.open, upload_key(desk.owner, id))
    except FileNotFoundError:
        raise InvalidRequest([(f"input.{field}", "there is no such file, or no longer")]) from None
    return base64.b64encode(data).decode()


def shown(desk: Counter, generation: Generation) -> dict[str, Any]:
    """A generation, as a prediction."""
    r, id = generation.parameters, generation.id
    done = generation.status in events.ENDED
    timings = generation.timings
    began = generation.created_at.timestamp() + timings["queued"] if "queued" in timings else None
    given = r.model_dump(exclude_defaults=True, exclude={"model", "task", "metadata", "priority", "webhook"})
    return {
        "id": id,
        "model": f"{OWNER}/{generation.model}",
        "version": desk.jobs.catalog[generation.model].digest if generation.model in desk.jobs.catalog else "gone",
        "status": STATUS[generation.status],
        "input": given,
        "output": [desk.url(image.url) for image in generation.images] or None,
        "logs": progress_line(generation.progress.step, generation.progress.steps) if generation.progress else "",
        "error": unsuccessful(generation) if generation.status in ("failed", "expired") else None,
        "metrics": {"predict_time": timings["running"]} if "running" in timings else {},
        "created_at": written(generation.created_at.timestamp()),
        "started_at": written(began),
        "completed_at": written(began + timings.get("running", 0)) if done and began else None,
        "data_removed": False,
        "urls": {
            "get": desk.absolute(f"/v1/predictions/{id}"),
            "cancel": desk.absolute(f"/v1/predictions/{id}/cancel"),
            "stream": desk.absolute(f"/v1/predictions/{id}/stream"),
        },
    }


def progress_line(step: int, steps: int) -> str:
    """As tqdm would print it: their client reads progress from the logs."""
    part = step / steps if steps else 0.0
    return f"{part:4.0%}|{'█' * round(10 * part):10}| {step}/{steps} [00:00<00:00,  0.00it/s]\n"


def written(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


@router.get("/webhooks/default/secret")
def secret(desk: DeskDep) -> dict[str, str]:
    """What webhooks are signed with."""
    return {"key": secret_for(desk.jobs.connection, desk.settings, desk.owner)}


# -- models and their versions


def model_named(desk: Desk, owner: str, name: str) -> ModelCard:
    if name not in desk.jobs.catalog:
        raise NotFound(f"there is no model {owner[:64]}/{name[:64]}; there are {', '.join(desk.jobs.catalog.names)}")
    return desk.jobs.catalog[name]


def card_of(desk: Desk, field: str, reference: str) -> ModelCard:
    """By a version's digest, `owner/name`, our own name, or a name with a digest behind it."""
    path, _, digest = reference.rpartition(":")
    for card in desk.jobs.catalog:
        if card.digest == (digest or reference) or card.name == reference.rpartition("/")[2]:
            return card
    names = ", ".join(f"{OWNER}/{name}" for name in desk.jobs.catalog.names)
    raise InvalidRequest([(field, f"there is no {path or reference!r}; there are {names}")])


@router.get("/models/{owner}/{name}")
def model(owner: str, name: str, desk: DeskDep) -> dict[str, Any]:
    """A model, as Replicate describes its own."""
    card = model_named(desk, owner, name)
    return {
        "url": desk.absolute(f"/v1/models/{name}"),
        "owner": OWNER,
        "name": card.name,
        "description": card.description,
        "visibility": "public",
        "github_url": None,
        "paper_url": None,
        "license_url": card.licence_url,
        "run_count": 0,
        "cover_image_url": None,
        "default_example": None,
        "latest_version": version(card),
    }


@router.get("/models/{owner}/{name}/versions")
def versions(owner: str, name: str, desk: DeskDep) -> dict[str, Any]:
    """Its only version."""
    return {"previous": None, "next": None, "results": [version(model_named(desk, owner, name))]}


@router.get("/models/{owner}/{name}/versions/{id}")
def show_version(owner: str, name: str, id: str, desk: DeskDep) -> dict[str, Any]:
    """A version."""
    card = model_named(desk, owner, name)
    if id != card.digest:
        raise NotFound(f"{card.name} has no version {id[:64]}; it has {card.digest}")
    return version(card)


def version(card: ModelCard) -> dict[str, Any]:
    fields = GenerationRequest.model_json_schema()["properties"]
    schemas = {
        "Input": {"type": "object", "properties": fields},
        "Output": {"type": "array", "items": {"type": "string", "format": "uri"}},
    }
    return {
        "id": card.digest,
        "created_at": SINCE.isoformat().replace("+00:00", "Z"),
        "cog_version": "0",
        "openapi_schema": {"components": {"schemas": schemas}},
    }


# -- files


@router.post("/files", status_code=201)
async def upload(content: UploadFile, desk: DeskDep) -> dict[str, Any]:
    """Keep a picture, to be named by its URL in a prediction's input; as long as results are kept."""
    data = await content.read()
    id = new_id()
    await run_in_threadpool(desk.jobs.blobs.save, upload_key(desk.owner, id), data)
    kept_until = datetime.now(UTC) + desk.settings.result_ttl
    return {
        "id": id,
        "name": content.filename or id,
        "content_type": content.content_type or "application/octet-stream",
        "size": len(data),
        "etag": hashlib.md5(data, usedforsecurity=False).hexdigest(),
        "checksums": {"sha256": hashlib.sha256(data).hexdigest()},
        "metadata": {},
        "created_at": written(datetime.now(UTC).timestamp()),
        "expires_at": written(kept_until.timestamp()),
        "urls": {"get": desk.absolute(f"/v1/files/{id}")},
    }


@router.get("/files/{id}", response_class=Response)
def download(id: str, request: Request, desk: DeskDep) -> Response:
    """A file that was uploaded."""
    if not is_id(id):
        raise NotFound(f"there is no file {id[:64]!r}")
    return file_response(
        request, lambda: desk.jobs.blobs.open(upload_key(desk.owner, id)), "application/octet-stream", id, id
    )
