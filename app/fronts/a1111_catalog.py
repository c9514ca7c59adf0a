"""What there is, as clients of the web UI are told: models, the one that their caller has set, samplers."""

from typing import Any

from fastapi import APIRouter, Depends

from app.errors import InvalidRequest
from app.fronts.desk import Desk, DeskDep
from app.images import SAMPLERS
from app.routes.generations import json_only
from models.catalog import ModelCard

router = APIRouter(prefix="/sdapi/v1", include_in_schema=False)  # the document of this API is the web UI's


def title_of(card: ModelCard) -> str:
    return f"{card.name} [{card.digest[:10]}]"


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
