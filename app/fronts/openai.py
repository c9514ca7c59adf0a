"""OpenAI's Images API, for its unmodified clients: https://platform.openai.com/docs/api-reference/images.

A generation made here is one like any other: `data[i].job_id` is its id. Fields of ours go through `extra_body`.
"""

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal, NamedTuple

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile

from app import events
from app.errors import InvalidRequest, NotFound, ServiceError, TooManyListeners
from app.fronts.desk import Desk, DeskDep, asked_for, dotted, nearest_size, renamed, unsuccessful
from app.images import alpha_as_mask
from app.routes.generations import json_only
from app.schemas import Generation, GenerationRequest, Task
from app.storage import preview_key
from models.catalog import ModelCard

router = APIRouter(prefix="/v1/images", include_in_schema=False)  # the document of this API is OpenAI's

THEIR_MODELS = re.compile(r"(dall-e|gpt-image|chatgpt-image)[\w.-]*")  # stand for whatever does the task here
# Of a model's usual steps.
QUALITIES = {"low": 0.5, "medium": 1.0, "standard": 1.0, "auto": 1.0, "high": 2.0, "hd": 2.0}
NAMES = {"width": "size", "height": "size", "num_inference_steps": "quality"}  # what ours are made of
OURS = set(GenerationRequest.model_fields) - {"image", "mask", "width", "height", "preview_every", "task"}
REMEMBERED = 900  # seconds in which a client's second try finds what its first one began; they come within seconds


class ImageRequest(BaseModel):
    """What the three endpoints have in common; whatever else comes must be a field of ours."""

    model_config = ConfigDict(extra="allow")

    prompt: str | None = None
    model: str | None = None
    n: int | None = None
    size: str | None = None
    quality: Literal["low", "medium", "high", "standard", "hd", "auto"] | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    background: Literal["transparent", "opaque", "auto"] | None = None
    user: str | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)
    style: str | None = None
    moderation: str | None = None
    output_compression: int | None = None
    input_fidelity: str | None = None


UNHEEDED = ("style", "moderation", "output_compression", "input_fidelity")


class NotDone(ServiceError):
    """Clients try again on their own, and are then given the same generation."""

    status, kind = 408, "still-running"

    def __init__(self, id: str):
        super().__init__(f"generation {id} is not done yet: ask again", headers={"Retry-After": "1"})


class NotDrawn(ServiceError):
    status, kind = 500, "generation-failed"

    def __init__(self, generation: Generation):
        super().__init__(unsuccessful(generation), headers={"x-should-retry": "false"})


def error_response(error: ServiceError) -> JSONResponse:
    """As OpenAI's clients read it: `param` is the first wrong field."""
    wrong = isinstance(error, InvalidRequest) or error.status == 422
    codes = {401: "invalid_api_key"} | ({error.status: "invalid_value"} if wrong else {})
    content = {
        "message": error.detail,
        "type": "invalid_request_error" if error.status < 500 else "server_error",
        "param": error.errors[0][0] if error.errors else None,
        "code": codes.get(error.status, error.kind.replace("-", "_")),
    }
    return JSONResponse({"error": content}, 400 if wrong else error.status, error.headers)


# -- the three endpoints


@router.post("/generations", dependencies=[Depends(json_only)], response_model=None)
async def generations(body: dict[str, Any], desk: DeskDep) -> JSONResponse | StreamingResponse:
    """Pictures from a prompt."""
    return await answered(desk, "text-to-image", body, {})


@router.post("/edits", response_model=None)
async def edits(request: Request, desk: DeskDep) -> JSONResponse | StreamingResponse:
    """A picture, repainted: where `mask` (or, without one, the picture itself) is transparent, or as a whole."""
    fields, pictures = await uploaded(request)
    if "image" not in pictures:
        raise InvalidRequest([("image", "is missing")])
    limit = desk.settings.max_image_pixels
    source = "mask" if "mask" in pictures else "image"
    if mask := await run_in_threadpool(alpha_as_mask, source, pictures[source], limit):
        pictures["mask"] = mask
    return await answered(desk, "inpaint" if "mask" in pictures else "image-to-image", fields, pictures)


@router.post("/variations", response_model=None)
async def variations(request: Request, desk: DeskDep) -> JSONResponse | StreamingResponse:
    """Others like a picture."""
    fields, pictures = await uploaded(request)
    if "image" not in pictures:
        raise InvalidRequest([("image", "is missing")])
    return await answered(desk, "variation", fields, {"image": pictures["image"]})


async def uploaded(request: Request) -> tuple[dict[str, Any], dict[str, str]]:
    """A form's fields, and its pictures as base64.

    Raises:
        InvalidRequest: it has several pictures to start from, or the body is no form.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise InvalidRequest([("body", "send multipart/form-data")])
    async with request.form(max_files=8) as form:
        images = [*form.getlist("image"), *form.getlist("image[]")]
        if len(images) > 1:
            raise InvalidRequest([("image", f"one picture can be worked on, not {len(images)}")])
        fields = {name: value for name, value in text_fields(form).items() if name not in ("image", "image[]", "mask")}
        found = {"image": images[0] if images else None, "mask": form.get("mask")}
        pictures = {name: base64.b64encode(await read(file)).decode() for name, file in found.items() if file}
    return fields, pictures


def text_fields(form: FormData) -> dict[str, Any]:
    return {name: value for name, value in form.multi_items() if isinstance(value, str)}


async def read(file: UploadFile | str) -> bytes:
    return file.encode() if isinstance(file, str) else await file.read()


# -- translated


class Translated(NamedTuple):
    theirs: ImageRequest
    ours: GenerationRequest
    warnings: list[str]


def translate(desk: Desk, task: Task, fields: Mapping[str, Any], pictures: Mapping[str, str]) -> Translated:
    """Their request as one of ours, and what of it is not heeded.

    Raises:
        InvalidRequest: a field is wrong, unknown, or asks for what we have not.
    """
    try:
        body = ImageRequest.model_validate(fields)
    except ValidationError as error:
        raise InvalidRequest(
            [(dotted(entry["loc"] or ("body",), {}), entry["msg"]) for entry in error.errors()]
        ) from None
    extra = {name: value for name, value in (body.model_extra or {}).items() if value is not None}
    if unknown := sorted(extra.keys() - OURS):
        raise InvalidRequest([(name, "is no field of this API, nor of Darkroom's") for name in unknown])
    if body.background == "transparent":
        raise InvalidRequest([("background", "no model here draws transparency")])
    card = chosen(desk, task, body.model)
    warnings = [f"{name} is not heeded" for name in UNHEEDED if getattr(body, name) is not None]
    asked: dict[str, Any] = {
        "task": task,
        "model": card.name,
        "prompt": body.prompt or None,
        "n": body.n,
        "output_format": body.output_format,
        **sized(card, body.size),
        **stepped(card, body.quality),
        **pictures,
        **extra,
    }
    ours = asked_for(asked, NAMES)
    decided: dict[str, Any] = {}
    if body.user:
        decided["metadata"] = {"user": body.user[:512]} | ours.metadata
    if body.stream and body.partial_images:
        steps = ours.num_inference_steps or card.defaults.num_inference_steps
        decided["preview_every"] = math.ceil(steps / (body.partial_images + 1))
    return Translated(body, ours.model_copy(update=decided), warnings)


def chosen(desk: Desk, task: Task, model: str | None) -> ModelCard:
    if model is None or (THEIR_MODELS.fullmatch(model) and model not in desk.jobs.catalog):
        return desk.card_for(task)
    if model not in desk.jobs.catalog:
        names = ", ".join(desk.jobs.catalog.names)
        raise InvalidRequest([("model", f"there is no {model!r}; there are {names}")])
    return desk.jobs.catalog[model]


def sized(card: ModelCard, size: str | None) -> dict[str, int]:
    if size in (None, "auto"):
        return {}
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size or "")
    if match is None or "0" in match.groups():
        raise InvalidRequest([("size", "is WIDTHxHEIGHT, such as 1024x1024, or auto")])
    width, height = nearest_size(card, int(match[1]), int(match[2]))
    return {"width": width, "height": height}


def stepped(card: ModelCard, quality: str | None) -> dict[str, int]:
    if quality is None or QUALITIES[quality] == 1.0 or card.sampling:
        return {}
    usual = card.defaults.num_inference_steps
    return {"num_inference_steps": max(1, min(card.limits.num_inference_steps, round(usual * QUALITIES[quality])))}


# -- answered


async def answered(
    desk: Desk, task: Task, fields: Mapping[str, Any], pictures: Mapping[str, str]
) -> JSONResponse | StreamingResponse:
    translated = translate(desk, task, fields, pictures)
    try:
        generation = await begun(desk, translated.ours, json.dumps([task, fields, pictures], sort_keys=True))
    except InvalidRequest as error:
        raise renamed(error, NAMES) from None
    if translated.theirs.stream:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(streamed(desk, task, translated, generation), 200, headers, "text/event-stream")
    generation = await desk.ended(generation)
    if generation.status in ("queued", "running"):
        raise NotDone(generation.id)
    if generation.status != "succeeded":
        raise NotDrawn(generation)
    return JSONResponse(await shown(desk, translated, generation))


async def begun(desk: Desk, asked: GenerationRequest, body: str) -> Generation:
    """A new generation or, at a client's second try, the one that its first try began: none is drawn twice.

    OpenAI's clients try again on their own, and say so in a header; they send no idempotency key.
    """
    if key := desk.request.headers.get("idempotency-key"):
        return await desk.submit(asked, key)
    tries = desk.request.headers.get("x-stainless-retry-count", "")
    digest = hashlib.sha256(body.encode()).hexdigest()
    known = f"darkroom:tried:{desk.owner}:{digest}"
    if tries.isdecimal() and int(tries) > 0:
        first = await run_in_threadpool(desk.jobs.connection.get, known)
        if isinstance(first, bytes):
            try:
                return await desk.fetch(first.decode())
            except NotFound:
                pass  # forgotten meanwhile
    generation = await desk.submit(asked)
    if tries:
        await run_in_threadpool(desk.jobs.connection.set, known, generation.id, ex=REMEMBERED)
    return generation


async def shown(desk: Desk, translated: Translated, generation: Generation) -> dict[str, Any]:
    theirs, r = translated.theirs, generation.parameters
    form = theirs.response_format or ("url" if (theirs.model or "").startswith("dall-e") else "b64_json")
    data = list[dict[str, Any]]()
    for i, image in enumerate(generation.images):
        of_ours = {"seed": image.seed, "job_id": generation.id}
        if form == "url":
            data.append({"url": desk.url(image.url), **of_ours})
        else:
            data.append({"b64_json": base64.b64encode(await desk.picture(generation, i)).decode(), **of_ours})
    return {
        "created": int(generation.created_at.timestamp()),
        "data": data,
        **facts(r.width, r.height, translated, r.output_format),
        "model": generation.model,
        "warnings": translated.warnings + generation.warnings,
    }


def facts(width: int, height: int, translated: Translated, output_format: str) -> dict[str, Any]:
    """What was done, in their words."""
    quality = translated.theirs.quality or "auto"
    return {
        "size": f"{width}x{height}",
        "quality": {"standard": "medium", "hd": "high"}.get(quality, quality),
        "background": "opaque",
        "output_format": output_format,
    }


async def streamed(desk: Desk, task: Task, translated: Translated, generation: Generation) -> AsyncIterator[str]:
    """Estimates on the way, then the pictures."""
    kind = "image_generation" if task == "text-to-image" else "image_edit"
    r, wanted = generation.parameters, translated.theirs.partial_images or 0
    common = {"created_at": int(generation.created_at.timestamp())}
    common |= facts(r.width, r.height, translated, r.output_format)
    partial = 0
    try:
        with desk.listeners.place() as free:
            if not free:
                raise TooManyListeners("this server has as many streams open as it may")
            async for event in desk.listeners.follow(generation.id):
                if event is None:
                    yield ": ping\n\n"
                elif event.name == "preview" and partial < wanted:
                    data = await run_in_threadpool(preview, desk, generation, event.data, r.output_format)
                    if data:
                        yield sent(
                            f"{kind}.partial_image", {"b64_json": data, "partial_image_index": partial, **common}
                        )
                        partial += 1
        done = await desk.fetch(generation.id)
        if done.status != "succeeded":
            raise NotDrawn(done) if done.status in events.ENDED else NotDone(done.id)
        for i, image in enumerate(done.images):
            data = base64.b64encode(await desk.picture(done, i)).decode()
            tokens = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}  # none are counted here
            usage = tokens | {"input_tokens_details": {"text_tokens": 0, "image_tokens": 0}}
            of_ours = {"seed": image.seed, "job_id": done.id}
            yield sent(f"{kind}.completed", {"b64_json": data, **common, "usage": usage, **of_ours})
    except ServiceError as error:
        yield f"data: {bytes(error_response(error).body).decode()}\n\n"


def sent(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"


def preview(desk: Desk, generation: Generation, data: Mapping[str, Any], output_format: str) -> str | None:
    """A preview in the format that was asked for, as base64; None if it is not there (any more)."""
    try:
        stored = desk.jobs.blobs.open(preview_key(generation.id, data["index"], data["step"]))
    except FileNotFoundError:
        return None
    out = io.BytesIO()
    Image.open(io.BytesIO(stored)).convert("RGB").save(out, output_format)
    return base64.b64encode(out.getvalue()).decode()
