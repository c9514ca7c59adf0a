"""What clients of the web UI ask for, as a request of ours, and what of it is not heeded."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from app.errors import InvalidRequest
from app.fronts.a1111_catalog import card_titled, set_checkpoint
from app.fronts.desk import LARGEST, Desk, asked_for, nearest_size
from app.images import SAMPLERS
from app.schemas import GenerationRequest
from models.catalog import ModelCard

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
