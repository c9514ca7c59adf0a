"""Class-conditional diffusion with classifier guidance (Dhariwal & Nichol 2021).

The prompt is the name of a class. A denoiser of the card's parts is told its number; without one, the pipeline's is
told what its text encoder makes of the name. The classifier is the noise-aware CLIP over the captions of all classes:
its gradient says where a half-denoised picture becomes more like its class, and less like the others.
"""

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from app.schemas import Parameters
from models import guidance
from models.catalog import ModelCard
from models.program import Call, Net
from models.sampling import Steering
from models.stable_diffusion import StableDiffusion


class ClassConditional(StableDiffusion):
    def __init__(self, card: ModelCard, pipeline: Any, parts: Mapping[str, Any]):
        if "denoiser" in parts:
            pipeline.register_modules(unet=parts["denoiser"])
        super().__init__(card, pipeline, parts)
        with torch.no_grad():
            ids = self.tokens(["", *card.classes])
            self.captions = self.encode_caption(input_ids=ids[1:])
            numbers = torch.arange(len(ids), device=self.device)
            # of no class at all, then of each
            self.contexts = numbers if "denoiser" in parts else self.encode_text(input_ids=ids)
        self.classifying = Net("classify", self.classify, buckets=self.buckets, width=16, journaled=True)

    def classify(self, *, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """[rows, C, h, w]: where the classifier becomes surer of each sample's class, see `guidance.classifier`."""
        return guidance.gradient(
            lambda x: guidance.classifier(self.foreseen(x, timestep), self.captions, label), sample
        )

    def predicted(self, seen: Tensor, timestep: Tensor, context: Tensor, **told: Tensor) -> Tensor:
        if "denoiser" not in self.parts:
            return super().predicted(seen, timestep, context, **told)
        return self.pipeline.unet(seen, timestep, None, class_labels=context, return_dict=False)[0]

    def conditioning(self, r: Parameters) -> Generator[Call, Any, Tensor]:
        yield from ()  # the classes' own contexts are at hand
        place = 1 + self.card.classes.index(r.prompt)
        return self.contexts[[0, place] if r.guidance_scale > 1 else [place]]

    def steered_by(self, r: Parameters) -> Generator[Call, Any, Steering | None]:
        if not r.guidance.classifier:
            return (yield from super().steered_by(r))
        label = torch.tensor([self.card.classes.index(r.prompt)], device=self.device)
        return Steering(self.classifying, {"label": label}, r.guidance.classifier)
