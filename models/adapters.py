"""Adapters per request, over one copy of the weights: LoRAs (Hu et al. 2021), and an IP-Adapter (Ye et al. 2023).

A pass wears one set of them, so it is part of what a call asks of: requests with the same adapters and scales share
passes, others take turns.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, wraps
from typing import Any, NamedTuple

from transformers import CLIPImageProcessor

from app.schemas import Parameters
from models.program import Net


class Worn(NamedTuple):
    loras: tuple[tuple[str, float], ...] = ()  # names and scales
    picture: float = 1.0  # how much the IP-Adapter tells the denoiser of the picture it looks at


PLAIN = Worn()
REMEMBERED = 256  # nets, of that many sets of adapters; who comes back after that shares no pass with those before


class Wardrobe:
    """The adapters that a pipeline has been given, and which of them it wears."""

    def __init__(self, pipeline: Any, loras: Mapping[str, str], looks: bool = False):
        self.pipeline, self.loras, self.looks = pipeline, loras, looks
        self.worn: Worn | None = None
        self.dressed = lru_cache(REMEMBERED)(self._dressed)

    def _dressed(self, net: Net, worn: Worn) -> Net:
        """The net with these adapters on; the same one for the same set, and the net itself for none."""
        return net if worn == PLAIN else replace(net, run=self.wearing(worn, inspect.unwrap(net.run)))

    def asked(self, r: Parameters, net: Net) -> Net:
        """The net with what the request wants to wear."""
        picture = 1.0 if r.ip_adapter_scale is None else r.ip_adapter_scale
        return self.dressed(net, Worn(tuple((lora.name, lora.scale) for lora in r.loras), picture))

    def wearing(self, worn: Worn, run: Callable[..., Any]) -> Callable[..., Any]:
        """What runs with these on. Nets that adapters change begin with `wearing(PLAIN, …)`."""
        if not self.loras and not self.looks:
            return run

        @wraps(run, updated=())
        def dressed(**arguments: Any) -> Any:
            self.wear(worn)
            return run(**arguments)

        return dressed

    def wear(self, worn: Worn) -> None:
        if worn == self.worn:
            return
        self.worn = None  # until it is done: half dressed is nobody's set
        if worn.loras:
            self.pipeline.enable_lora()
            self.pipeline.set_adapters([name for name, _ in worn.loras], [scale for _, scale in worn.loras])
        elif self.loras:
            self.pipeline.disable_lora()
        if self.looks:
            self.pipeline.set_ip_adapter_scale(worn.picture)
        self.worn = worn


def give_ip_adapter(pipeline: Any, weights: Mapping[str, Any], image_encoder: Any) -> None:
    """Let a pipeline look at pictures.

    Args:
        weights: the adapter's two halves, `image_proj` and `ip_adapter`.
        image_encoder: the CLIP that it was trained with.
    """
    side = image_encoder.config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    pipeline.register_modules(image_encoder=image_encoder, feature_extractor=processor)
    pipeline.load_ip_adapter(weights, subfolder="", weight_name="")
    pipeline.unet.eval().requires_grad_(False)
