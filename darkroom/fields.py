"""What may be asked for, as Python has it, and as JSON has it."""

import base64
import io
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import IO, Any, Protocol, TypedDict

from pydantic_core import to_jsonable_python

from app.schemas import PICTURES, Guidance, Lora, OutputFormat, Priority, Task, Webhook


class PillowImage(Protocol):
    """`PIL.Image.Image`, whether Pillow is installed or not."""

    def save(self, fp: IO[bytes], format: str | None = None) -> None: ...


Picture = PathLike[str] | bytes | str | PillowImage
"""A file's path, its bytes, base64 or a `data:` URL, or an image of Pillow's."""


class Fields(TypedDict, total=False):
    """Of `POST /v1/generations`, beside the prompt: None is as if it were not given."""

    model: str | None
    task: Task | None
    negative_prompt: str | None
    prompt_weights: bool | None
    n: int | None
    best_of: int | None
    width: int | None
    height: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance: Guidance | Mapping[str, Any] | None
    scheduler: str | None
    seed: int | None
    image: Picture | None
    mask: Picture | None
    strength: float | None
    end_prompt: str | None
    end_image: Picture | None
    control_image: Picture | None
    control_scale: float | None
    ip_adapter_image: Picture | None
    ip_adapter_scale: float | None
    mix: float | None
    num_frames: int | None
    fps: int | None
    loras: Sequence[Lora | Mapping[str, Any]] | None
    output_format: OutputFormat | None
    preview_every: int | None
    reproducible: bool | None
    expires_in: int | None
    priority: Priority | None
    webhook: Webhook | Mapping[str, Any] | None
    metadata: Mapping[str, str] | None


def as_json(prompt: str | None, fields: Fields) -> dict[str, Any]:
    """The body of a request."""
    given = {"prompt": prompt, **fields}
    given = {name: value for name, value in given.items() if value is not None}
    encoded = {name: as_text(given.pop(name)) for name in PICTURES if name in given}
    return to_jsonable_python(given, exclude_none=True) | encoded


def as_text(picture: Any) -> str:
    if isinstance(picture, str):
        return picture
    return base64.b64encode(file_of(picture)).decode()


def file_of(picture: PathLike[str] | bytes | PillowImage) -> bytes:
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, PathLike):
        return Path(picture).read_bytes()
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def numbered(path: Path, count: int) -> list[Path]:
    """picture.png, or picture-1.png, picture-2.png, …"""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i + 1}") for i in range(count)]
