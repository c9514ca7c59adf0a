"""Which code draws which family of models."""

from typing import Protocol

from torch import nn

from app.schemas import Parameters
from models.autoregressive import Autoregressive
from models.cascade import Cascade
from models.catalog import ModelCard
from models.class_conditional import ClassConditional
from models.janus import Janus
from models.preview import LatentColours
from models.program import Inputs, Net, Program
from models.stable_diffusion import StableDiffusion
from models.stock import StockPipelines
from models.stock_stages import Amused, DeepFloyd, DiT, Kandinsky, Karlo, Upscaler
from models.unclip import UnCLIP
from models.video import Video


class Resident(Protocol):
    """A loaded model: weights, nets, and how to draw with them. Read-only to requests."""

    card: ModelCard
    modules: list[nn.Module]
    denoiser: Net
    decoder: Net
    colours: LatentColours  # for previews

    def draw(self, r: Parameters, seed: int, inputs: Inputs) -> Program: ...
    def warnings(self, r: Parameters) -> list[str]: ...


FAMILIES = {
    "autoregressive": Autoregressive,
    "stable-diffusion": StableDiffusion,
    "class-conditional": ClassConditional,
    "unclip": UnCLIP,
    "glide": Cascade,
    "imagen": Cascade,
    "diffusers": StockPipelines,
    "amused": Amused,
    "deepfloyd": DeepFloyd,
    "dit": DiT,
    "janus": Janus,
    "kandinsky": Kandinsky,
    "karlo": Karlo,
    "upscaler": Upscaler,
    "video": Video,
}
