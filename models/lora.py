"""LoRA adapters (Hu et al. 2021) per request, over one copy of the weights.

A pass wears one set of adapters, so it is part of what a call asks of: requests with the same adapters and scales share
passes, others take turns.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, wraps
from typing import Any

from app.schemas import Parameters
from models.program import Net

Worn = tuple[tuple[str, float], ...]
"""Names and scales."""

REMEMBERED = 256  # nets, of that many sets of adapters; who comes back after that shares no pass with those before


class Wardrobe:
    """The adapters that a pipeline has been given, and which of them it wears."""

    def __init__(self, pipeline: Any, adapters: Mapping[str, str]):
        self.pipeline, self.empty = pipeline, not adapters
        self.worn: Worn | None = None
        self.dressed = lru_cache(REMEMBERED)(self._dressed)

    def _dressed(self, net: Net, worn: Worn) -> Net:
        """The net with these adapters on; the same one for the same set, and the net itself for none."""
        return replace(net, run=self.wearing(worn, inspect.unwrap(net.run))) if worn else net

    def asked(self, r: Parameters, net: Net) -> Net:
        """The net with what the request wants to wear."""
        return self.dressed(net, tuple((lora.name, lora.scale) for lora in r.loras))

    def wearing(self, worn: Worn, run: Callable[..., Any]) -> Callable[..., Any]:
        """What runs with these on. Nets that adapters change begin with `wearing((), …)`."""
        if self.empty:
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
        if worn:
            self.pipeline.enable_lora()
            self.pipeline.set_adapters([name for name, _ in worn], [scale for _, scale in worn])
        else:
            self.pipeline.disable_lora()
        self.worn = worn
