"""The AUTOMATIC1111 web UI's API, for its unmodified clients: https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/API.

What clients send and we cannot honour is listed under `unheeded` in the answer's `info`. A web UI draws one thing at a
time; here `progress` and `interrupt` mean the caller's newest generation that came through this front.
"""

import base64
import io
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict

from app.errors import InvalidRequest, ServiceError
from app.fronts.a1111_catalog import card_titled
from app.fronts.a1111_request import MARK, NAMES, Drawing, translate
from app.fronts.desk import Desk, DeskDep, asked_for, renamed, unsuccessful
from app.images import SAMPLERS, parameters_text, png_bytes, read_image, read_text
from app.routes.generations import json_only
from app.schemas import Generation
from app.storage import preview_folder
from models.catalog import ModelCard

router = APIRouter(prefix="/sdapi/v1", include_in_schema=False)  # the document of this API is the web UI's


def error_response(error: ServiceError) -> JSONResponse:
    """As the web UI tells of errors."""
    errors = "; ".join(f"{field}: {what}" for field, what in error.errors)
    content = {"error": error.kind, "detail": error.detail, "body": "", "errors": errors}
    return JSONResponse(content, error.status, error.headers)


# -- drawing


@router.post("/txt2img", dependencies=[Depends(json_only)])
async def txt2img(body: Drawing, desk: DeskDep) -> dict[str, Any]:
    """Pictures from a prompt."""
    return await drawn(desk, body, {})


@router.post("/img2img", dependencies=[Depends(json_only)])
async def img2img(body: Drawing, desk: DeskDep) -> dict[str, Any]:
    """Pictures from a picture, or of what `mask` is white in."""
    if not body.init_images:
        raise InvalidRequest([("init_images", "needs a picture")])
    if len(body.init_images) > 1:
        raise InvalidRequest([("init_images", f"one picture can be worked on, not {len(body.init_images)}")])
    pictures = {"image": body.init_images[0]}
    if body.mask is not None:
        inverted = bool(body.inpainting_mask_invert)
        limit = desk.settings.max_image_pixels
        pictures["mask"] = await run_in_threadpool(fitting_mask, body.mask, body.init_images[0], inverted, limit)
    return await drawn(desk, body, pictures)


def fitting_mask(mask: str, image: str, inverted: bool, max_pixels: int) -> str:
    """The mask at the picture's size, which the web UI does not ask for."""
    size = read_image("init_images.0", image, max_pixels).size
    grey = read_image("mask", mask, max_pixels).convert("L").resize(size, Image.Resampling.LANCZOS)
    return base64.b64encode(png_bytes(ImageOps.invert(grey) if inverted else grey)).decode()


async def drawn(desk: Desk, body: Drawing, pictures: Mapping[str, str]) -> dict[str, Any]:
    asked, unheeded = await run_in_threadpool(translate, desk, body, pictures)
    try:
        generation = await desk.submit(asked)
    except InvalidRequest as error:
        raise renamed(error, NAMES) from None
    generation = await desk.ended_at_last(generation)
    if generation.status == "canceled":  # interrupted: the web UI gives what there is of it
        files = [shown] if (shown := await run_in_threadpool(newest_preview, desk, generation)) else []
    elif generation.status == "succeeded":
        files = [await desk.picture(generation, i) for i in range(len(generation.images))]
    else:
        raise ServiceError(unsuccessful(generation))
    return {
        "images": [] if body.send_images is False else [base64.b64encode(file).decode() for file in files],
        "parameters": body.model_dump(),
        "info": json.dumps(info(desk.jobs.catalog[generation.model], generation, unheeded)),
    }


def info(card: ModelCard, generation: Generation, unheeded: list[str]) -> dict[str, Any]:
    r = generation.parameters
    seeds = [r.seed + i for i in range(r.n)]
    return {
        "prompt": r.prompt,
        "all_prompts": [r.prompt] * r.n,
        "negative_prompt": r.negative_prompt,
        "all_negative_prompts": [r.negative_prompt] * r.n,
        "seed": r.seed,
        "all_seeds": seeds,
        "subseed": -1,
        "subseed_strength": 0,
        "width": r.width,
        "height": r.height,
        "sampler_name": SAMPLERS.get(r.scheduler, r.scheduler),
        "cfg_scale": r.guidance_scale,
        "steps": r.num_inference_steps,
        "batch_size": r.n,
        "denoising_strength": r.strength,
        "sd_model_name": card.name,
        "sd_model_hash": card.digest[:10],
        "infotexts": [parameters_text(r, seed) for seed in seeds],
        "job_timestamp": f"{generation.created_at:%Y%m%d%H%M%S}",
        "job_id": generation.id,
        "unheeded": unheeded,
        "warnings": generation.warnings,
    }


# -- on its way


def current(desk: Desk) -> Generation | None:
    """The caller's newest generation through this front that has not ended."""
    newest = desk.jobs.list(desk.owner, limit=20).data
    mine = (one for one in newest if one.parameters.metadata.items() >= MARK.items())
    return next((one for one in mine if one.status in ("running", "queued")), None)


def newest_preview(desk: Desk, generation: Generation) -> bytes | None:
    """Of its first picture, as a PNG."""
    keys = list(desk.jobs.blobs.list(f"{preview_folder(generation.id)}/0"))
    if not keys:
        return None
    newest = max(keys, key=lambda key: int(key.rpartition("/")[2]))
    return png_bytes(Image.open(io.BytesIO(desk.jobs.blobs.open(newest))))


@router.get("/progress")
def progress(desk: DeskDep, skip_current_image: bool = False) -> dict[str, Any]:
    """How far it is."""
    generation = current(desk)
    step, steps = 0, 0
    if generation and generation.progress:
        step, steps = generation.progress.step, generation.progress.steps
    image = newest_preview(desk, generation) if generation and not skip_current_image else None
    return {
        "progress": step / steps if steps else 0.0,
        "eta_relative": (generation.eta if generation else None) or 0.0,
        "state": {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": generation.id if generation else "",
            "job_count": 1 if generation else 0,
            "job_timestamp": f"{generation.created_at:%Y%m%d%H%M%S}" if generation else "0",
            "job_no": 0,
            "sampling_step": step,
            "sampling_steps": steps,
        },
        "current_image": base64.b64encode(image).decode() if image else None,
        "textinfo": generation.status if generation else None,
    }


@router.post("/interrupt")
@router.post("/skip")
def interrupt(desk: DeskDep) -> None:
    """Cancel it; whoever waits for it is given the newest preview."""
    if generation := current(desk):
        desk.jobs.cancel(generation.id, desk.owner)


# -- pictures


class Enlarging(BaseModel):
    model_config = ConfigDict(extra="allow")

    image: str
    upscaler_1: str | None = None
    upscaling_resize: float | None = None


@router.post("/extra-single-image", dependencies=[Depends(json_only)])
async def extra_single_image(body: Enlarging, desk: DeskDep) -> dict[str, Any]:
    """Enlarge a picture, by a model that does."""
    named = body.upscaler_1 if body.upscaler_1 not in (None, "", "None") else None
    card = card_titled(desk, "upscaler_1", named) if named else desk.card_for("upscale")
    asked = {"model": card.name, "task": "upscale", "image": body.image, "metadata": MARK}
    try:
        generation = await desk.ended_at_last(await desk.submit(asked_for(asked)))
    except InvalidRequest as error:
        raise renamed(error, {"task": "upscaler_1"}) from None
    if generation.status != "succeeded":
        raise ServiceError(unsuccessful(generation))
    image = generation.images[0]
    html = f"<p>{card.name}: {image.width}×{image.height}</p>"
    return {"image": base64.b64encode(await desk.picture(generation, 0)).decode(), "html_info": html}


class Described(BaseModel):
    model_config = ConfigDict(extra="allow")

    image: str


@router.post("/png-info", dependencies=[Depends(json_only)])
def png_info(body: Described, desk: DeskDep) -> dict[str, Any]:
    """How a picture was made, as its file says."""
    text = read_text("image", body.image, desk.settings.max_image_pixels)
    return {"info": text, "items": {"parameters": text} if text else {}, "parameters": facts(text)}


def facts(text: str) -> dict[str, str]:
    """The last line of an infotext: `name: value, …`, where a value may be quoted as JSON."""
    last = text.rpartition("\n")[2]
    found = re.findall(r'\s*([\w ]+):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)', last)
    return {name: unquoted(value) for name, value in found}


def unquoted(value: str) -> str:
    """What was quoted as JSON; as it stands, if it only looks like that."""
    with suppress(ValueError):
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    return value
