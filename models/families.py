"""Which code draws which family of models."""

from typing import Any, Protocol

from app.schemas import Parameters
from models.catalog import ModelCard
from models.preview import LatentColours
from models.program import Net, Program
from models.stable_diffusion import Inputs, StableDiffusion
from models.stock import StockPipelines


class Resident(Protocol):
    """A loaded model: weights, nets, and how to draw with them. Read-only to requests."""

    card: ModelCard
    pipeline: Any
    denoiser: Net
    decoder: Net
    colours: LatentColours  # for previews

    def draw(self, r: Parameters, seed: int, inputs: Inputs) -> Program: ...
    def warnings(self, r: Parameters) -> list[str]: ...


FAMILIES = {"stable-diffusion": StableDiffusion, "diffusers": StockPipelines}
