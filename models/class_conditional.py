"""Class-conditional diffusion with classifier guidance (Dhariwal & Nichol 2021).

The prompt is the name of a class. The classifier is the noise-aware CLIP over the captions of all classes: its gradient
says where a half-denoised picture becomes more like its class, and less like the others.
"""

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from app.schemas import Parameters
from models import guidance
from models.catalog import ModelCard
from models.program import BUCKETS, Call, Inputs, Net
from models.stable_diffusion import StableDiffusion


class ClassConditional(StableDiffusion):
    def __init__(self, card: ModelCard, pipeline: Any, parts: Mapping[str, nn.Module]):
        super().__init__(card, pipeline, parts)
        with torch.no_grad():
            ids = self.tokens(["", *card.classes])
            self.contexts = self.encode_text(input_ids=ids)  # of no class at all, then of each
            self.captions = self.encode_caption(input_ids=ids[1:])
        buckets = tuple(bucket for bucket in BUCKETS if bucket <= card.max_rows)
        self.classifying = Net("classify", self.classify, buckets=buckets, width=16, journaled=True)

    def classify(self, *, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """[rows, C, h, w]: where the classifier becomes surer of each sample's class, see `guidance.classifier`."""
        return guidance.gradient(
            lambda x: guidance.classifier(self.foreseen(x, timestep), self.captions, label), sample
        )

    def conditioning(self, r: Parameters, guided: bool, inputs: Inputs, seed: int) -> Generator[Call, Any, Tensor]:
        yield from ()  # the classes' own contexts are at hand
        place = 1 + self.card.classes.index(r.prompt)
        return self.contexts[[0, place] if guided else [place]]

    def steered_by(self, r: Parameters) -> Generator[Call, Any, tuple[Net, dict[str, Tensor]] | None]:
        if not r.guidance.classifier:
            return (yield from super().steered_by(r))
        return self.classifying, {"label": torch.tensor([self.card.classes.index(r.prompt)], device=self.device)}

    def strength_of_steering(self, r: Parameters) -> float:
        return r.guidance.classifier or super().strength_of_steering(r)
