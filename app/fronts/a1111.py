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
from pydantic import BaseModel, ConfigDict, Field

from app.errors import InvalidRequest, ServiceError
from app.fronts.desk import LARGEST, Desk, DeskDep, asked_for, nearest_size, renamed, unsuccessful
from app.images import SAMPLERS, parameters_text, png_bytes, read_image, read_text
from app.routes.generations import json_only
from app.schemas import Generation, GenerationRequest
from app.storage import preview_folder
from models.catalog import ModelCard

router = APIRouter(prefix="/sdapi/v1", include_in_schema=False)  # the document of this API is the web UI's

MARK = {"front": "a1111"}  # in a generation's metadata: what came through here
PREVIEWS = 8  # of a picture on its way
LORA = re.compile(r"<lora:([^:>]+)(?::(-?\d+(?:\.\d+)?))?>")
WEIGHT = re.compile(r"(?<!\\)[()\[\]]|(?<=\S):[\d.]+(?=[)\]])")  # brackets, and the numbers in them
EDITING = re.compile(r"(?<!\\)\[(?:[^\[\]():|]|\([^()\[\]]*\))*[:|][^\[\]]*\]")  # [from:to:when], [one|another]
NAMES = {  # what ours are made of
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "n": "batch_size",
    "scheduler": "sampler_name",
    "strength": "denoising_strength",
    "image": "init_images",
    "model": "override_settings.sd_model_checkpoint",
}
HANDLED = {
    *("prompt", "negative_prompt", "seed", "batch_size", "n_iter", "steps", "cfg_scale", "width", "height"),
    *("sampler_name", "sampler_index", "override_settings", "alwayson_scripts", "send_images", "force_task_id"),
    *("init_images", "mask", "denoising_strength", "inpainting_mask_invert", "include_init_images"),
    *(
        "override_settings_restore_afterwards",
        "do_not_save_samples",
        "do_not_save_grid",
        "save_images",
    ),  # nothing is kept
}
AS_USUAL: dict[str, Any] = {  # what clients send when they mean nothing by it
    "scheduler": "automatic",
    "eta": 1,
    "hr_scale": 2,
    "hr_upscaler": "Latent",
    "s_noise": 1,
    "s_tmin": 0,
    "s_tmax": 0,
    "mask_blur": 4,
    "mask_blur_x": 4,
    "mask_blur_y": 4,
    "inpainting_fill": 1,
    "inpaint_full_res": True,
    "resize_mode": 0,
    "initial_noise_multiplier": 1,
    "subseed": -1,
    "seed_resize_from_h": -1,
    "seed_resize_from_w": -1,
}
NOTHING = (None, False, 0, "", [], {})


class Drawing(BaseModel):
    """`txt2img` and `img2img`: clients send some fifty fields, most of them null."""

    model_config = ConfigDict(extra="allow")

    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    batch_size: int | None = None
    n_iter: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = Field(None, ge=1, le=LARGEST)
    height: int | None = Field(None, ge=1, le=LARGEST)
    sampler_name: str | None = None
    sampler_index: str | None = None
    override_settings: dict[str, Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None
    denoising_strength: float | None = None
    init_images: list[str] | None = None
    mask: str | None = None
    inpainting_mask_invert: bool | None = None
    send_images: bool | None = None


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


def translate(desk: Desk, body: Drawing, pictures: Mapping[str, str]) -> tuple[GenerationRequest, list[str]]:
    """Their request as one of ours, and what of it is not heeded.

    Raises:
        InvalidRequest: a field is wrong, or names what there is not.
    """
    unheeded = unheeded_of(body)
    card = checkpoint(desk, body)
    prompt, loras = without_loras(body.prompt or "")
    negative_prompt, _ = without_loras(body.negative_prompt or "")
    prompts = prompted(card, prompt, negative_prompt, unheeded)
    steps = min(body.steps, card.limits.num_inference_steps) if body.steps else None
    width, height = nearest_size(card, body.width or card.size.width, body.height or card.size.height)
    asked: dict[str, Any] = {
        "model": card.name,
        **prompts,
        "loras": loras,
        "seed": body.seed if body.seed is not None and body.seed >= 0 else None,
        "n": (body.batch_size or 1) * (body.n_iter or 1),
        "num_inference_steps": None if card.sampling else steps,
        "guidance_scale": body.cfg_scale,
        "width": width,
        "height": height,
        "scheduler": sampler(card, body.sampler_name or body.sampler_index),
        "preview_every": max(1, (steps or card.defaults.num_inference_steps) // PREVIEWS),
        "metadata": MARK,
        **pictures,
        **followed(card, body, unheeded),
    }
    if pictures:
        asked["strength"] = None if body.denoising_strength is None else max(0.01, body.denoising_strength)
    return asked_for(asked, NAMES), unheeded


def unheeded_of(body: Drawing) -> list[str]:
    """What a client sent and meant, and we have not."""
    fields = body.model_dump(exclude_unset=True)
    meant = {
        name: value
        for name, value in fields.items()
        if name not in HANDLED and value not in NOTHING and not is_usual(name, value)
    }
    if not fields.get("enable_hr"):  # what belongs to it means nothing then
        meant = {name: value for name, value in meant.items() if not name.startswith(("hr_", "firstphase_"))}
    others = {name for name in body.override_settings or {} if name != "sd_model_checkpoint"}
    scripts = {name for name, script in (body.alwayson_scripts or {}).items() if name != "ControlNet" and is_on(script)}
    return (
        sorted(meant)
        + sorted(f"override_settings.{name}" for name in others)
        + sorted(f"alwayson_scripts.{name}" for name in scripts)
    )


def is_usual(name: str, value: Any) -> bool:
    usual = AS_USUAL.get(name)
    return value == usual or str(value).lower() == str(usual).lower()


def is_on(script: Any) -> bool:
    arguments = script.get("args", []) if isinstance(script, dict) else script
    return any(argument not in NOTHING for argument in arguments) if isinstance(arguments, list) else bool(arguments)


def checkpoint(desk: Desk, body: Drawing) -> ModelCard:
    """The model that this request names, else the one that the caller has set, else the default."""
    named = (body.override_settings or {}).get("sd_model_checkpoint")
    if named is not None:
        return card_titled(desk, "override_settings.sd_model_checkpoint", str(named))
    return set_checkpoint(desk)


def set_checkpoint(desk: Desk) -> ModelCard:
    name = desk.jobs.connection.get(option_key(desk))
    known = name.decode() if isinstance(name, bytes) else ""
    return next((card for card in desk.jobs.catalog if card.name == known), desk.jobs.catalog.default)


def card_titled(desk: Desk, field: str, title: str) -> ModelCard:
    """By our name, or by a title as `sd-models` lists it: `name [hash]`, `name.safetensors`."""
    name = title.partition(" [")[0].removesuffix(".safetensors")
    if name not in desk.jobs.catalog:
        raise InvalidRequest([(field, f"there is no {title[:64]!r}; there are {', '.join(desk.jobs.catalog.names)}")])
    return desk.jobs.catalog[name]


def option_key(desk: Desk) -> str:
    return f"darkroom:a1111:{desk.owner}:checkpoint"


def sampler(card: ModelCard, name: str | None) -> str | None:
    """Ours for theirs; where theirs names a noise schedule as well, that part is for the model to decide."""
    if not name or name.lower() == "automatic":
        return None
    wanted = name.lower().removesuffix(" karras").removesuffix(" exponential")
    found = next((ours for ours, theirs in SAMPLERS.items() if wanted in (ours, theirs.lower())), None)
    if found is None or found not in card.schedulers:
        some = ", ".join(SAMPLERS.get(one, one) for one in card.schedulers)
        if len(card.schedulers) == 1 and found is not None:
            return None  # a model with one way to sample: clients that know others mean no harm
        raise InvalidRequest([("sampler_name", f"{card.name} has no {name!r}; it has {some}")])
    return found


def without_loras(prompt: str) -> tuple[str, list[dict[str, Any]]]:
    """The prompt, and the adapters that `<lora:name:scale>` asks for."""
    loras = [{"name": name, "scale": float(scale or 1.0)} for name, scale in LORA.findall(prompt)]
    return re.sub(r"\s+", " ", LORA.sub("", prompt)).strip(), loras


def prompted(card: ModelCard, prompt: str, negative_prompt: str, unheeded: list[str]) -> dict[str, Any]:
    """The prompts, with their weights where the model has such."""
    given = {"prompt": prompt, "negative_prompt": negative_prompt}
    if not card.prompt_weights:
        plain = {name: WEIGHT.sub("", text) for name, text in given.items()}
        unheeded += ["weights in the prompt"] if plain != given else []
        return {name: text.replace("\\", "") for name, text in plain.items()}
    unedited = {name: EDITING.sub(lambda found: WEIGHT.sub("", found[0]), text) for name, text in given.items()}
    unheeded += ["prompt editing"] if unedited != given else []
    weighs = any(mark in text for text in unedited.values() for mark in "()[]\\")
    return unedited | {"prompt_weights": weighs}


def followed(card: ModelCard, body: Drawing, unheeded: list[str]) -> dict[str, Any]:
    """The first unit of their ControlNet, where the model has one."""
    script = (body.alwayson_scripts or {}).get("ControlNet")
    given = script.get("args") if isinstance(script, dict) else None
    units = (
        [one for one in given if isinstance(one, dict) and one.get("enabled", True)] if isinstance(given, list) else []
    )
    images = [(image_of(unit), unit) for unit in units]
    if not images or images[0][0] is None:
        return {}
    if "control_image" not in card.needs:
        unheeded.append("alwayson_scripts.ControlNet")
        return {}
    if len(images) > 1:
        unheeded.append("alwayson_scripts.ControlNet.args.1")
    image, unit = images[0]
    return {"control_image": image, "control_scale": unit.get("weight")}


def image_of(unit: Mapping[str, Any]) -> str | None:
    given = unit.get("image") or unit.get("input_image")
    return given.get("image") if isinstance(given, dict) else given


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


# -- what there is


def title_of(card: ModelCard) -> str:
    return f"{card.name} [{card.digest[:10]}]"


@router.get("/options")
def options(desk: DeskDep) -> dict[str, Any]:
    """The one that counts here."""
    card = set_checkpoint(desk)
    return {"sd_model_checkpoint": title_of(card), "sd_checkpoint_hash": card.digest, "samples_format": "png"}


@router.post("/options", dependencies=[Depends(json_only)])
def set_options(body: dict[str, Any], desk: DeskDep) -> None:
    """Of this caller's: the model that its next requests are for, until it says otherwise."""
    others = [(name, "is no option here") for name in body if name != "sd_model_checkpoint"]
    if others:
        raise InvalidRequest(others)
    if "sd_model_checkpoint" in body:
        card = card_titled(desk, "sd_model_checkpoint", str(body["sd_model_checkpoint"]))
        desk.jobs.connection.set(option_key(desk), card.name)


@router.get("/sd-models")
def sd_models(desk: DeskDep) -> list[dict[str, Any]]:
    """Those that draw from a prompt."""
    return [
        {
            "title": title_of(card),
            "model_name": card.name,
            "hash": card.digest[:10],
            "sha256": card.digest,
            "filename": f"{card.name}.safetensors",
            "config": None,
        }
        for card in desk.jobs.catalog
        if "text-to-image" in card.tasks
    ]


@router.get("/samplers")
def samplers(desk: DeskDep) -> list[dict[str, Any]]:
    """Of any of the models."""
    served = {name for card in desk.jobs.catalog for name in card.schedulers}
    return [{"name": theirs, "aliases": [ours], "options": {}} for ours, theirs in SAMPLERS.items() if ours in served]


@router.get("/schedulers")
def schedulers() -> list[dict[str, Any]]:
    """A model's own."""
    return [{"name": "automatic", "label": "Automatic", "aliases": None, "default_rho": -1, "need_inner_model": False}]


@router.get("/upscalers")
def upscalers(desk: DeskDep) -> list[dict[str, Any]]:
    """Models that enlarge."""
    able = [card.name for card in desk.jobs.catalog if "upscale" in card.tasks]
    common = {"model_name": None, "model_path": None, "model_url": None}
    return [{"name": name, **common, "scale": None if name == "None" else 2} for name in ("None", *able)]


@router.get("/loras")
def loras(desk: DeskDep) -> list[dict[str, Any]]:
    """Of any of the models."""
    names = dict.fromkeys(name for card in desk.jobs.catalog for name in card.loras)
    return [{"name": name, "alias": name, "path": f"{name}.safetensors", "metadata": {}} for name in names]


@router.get("/scripts")
def scripts() -> dict[str, list[str]]:
    """None."""
    return {"txt2img": [], "img2img": []}


@router.get("/embeddings")
def embeddings() -> dict[str, dict[str, Any]]:
    """None."""
    return {"loaded": {}, "skipped": {}}


@router.get("/script-info")
@router.get("/hypernetworks")
@router.get("/face-restorers")
@router.get("/realesrgan-models")
@router.get("/prompt-styles")
@router.get("/sd-vae")
@router.get("/latent-upscale-modes")
def none() -> list[Any]:
    """There are none."""
    return []


@router.get("/cmd-flags")
@router.get("/memory")
def nothing() -> dict[str, Any]:
    """Nothing that would be anybody's business."""
    return {}


@router.post("/refresh-checkpoints")
@router.post("/refresh-loras")
def refresh() -> None:
    """What is served is decided at the start."""


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
