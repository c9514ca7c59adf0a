"""unCLIP (Ramesh et al. 2022, DALL·E 2): a prior draws the CLIP embedding of a picture, a decoder draws the picture.

What lies between the two is a point in a space of pictures, so there is more than text-to-image: variations of a
picture, interpolation between pictures or captions, and moving a picture as one caption differs from another.
"""

import math
from collections.abc import Generator, Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

from app.schemas import Parameters
from models import guidance, samplers
from models.catalog import ModelCard, Stage
from models.guided import ALONE, UNCONDITIONAL_THEN_CONDITIONAL
from models.program import Call, Inputs, Net, generator
from models.stable_diffusion import StableDiffusion

PRIOR_SCHEDULER: dict[str, Any] = {  # the prior predicts the embedding itself
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 1000,
    "prediction_type": "sample",
    "timestep_spacing": "trailing",
}


class ImageProjection(ModelMixin, ConfigMixin):
    """A CLIP image embedding as tokens for the decoder's cross-attention (Ramesh et al. 2022, section 2.1).

    An embedding of zeros stands for no embedding at all: what classifier-free guidance contrasts with.
    """

    @register_to_config
    def __init__(self, embedding_dim: int = 256, width: int = 768, tokens: int = 32, token_dim: int = 256):
        super().__init__()
        self.shape = tokens, token_dim
        self.layers = nn.Sequential(
            nn.Linear(embedding_dim, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, tokens * token_dim)
        )
        self.nothing = nn.Parameter(torch.zeros(tokens, token_dim))

    def forward(self, embedding: Tensor) -> Tensor:
        """[rows, embedding_dim] of variance one to [rows, tokens, token_dim]"""
        tokens = self.layers(embedding).view(-1, *self.shape)
        given = (embedding != 0).any(-1)[:, None, None]
        return torch.where(given, tokens, self.nothing)


class UnCLIP(StableDiffusion):
    """The decoder is a latent diffusion model which is told an embedding instead of a prompt."""

    def __init__(self, card: ModelCard, pipeline: Any, parts: Mapping[str, Any]):
        super().__init__(card, pipeline, parts)
        self.width = parts["clip"].config.projection_dim
        self.prior = Net("prior", self.guess, buckets=(2, 4, 8, 16, 32), width=32, recordable=True)
        self.projector = Net("project", self.project, width=32)

    # -- the nets

    def guess(
        self,
        *,
        sample: Tensor,
        timestep: Tensor,
        caption: Tensor,
        guidance_scale: Tensor,
        unconditional: Tensor,
        conditional: Tensor,
        coefficients: Tensor,
    ) -> Tensor:
        """One guided step of the prior for each row.

        Args:
            sample, caption: [rows, width]; timestep, guidance_scale, unconditional, conditional: [rows].
            coefficients: [rows, 7] of the update, of which DDIM needs two.
        Returns:
            the next sample, [rows, width].
        """
        prior = self.parts["prior"]
        e = prior(sample.to(self.dtype), timestep, proj_embedding=caption.to(self.dtype)).predicted_image_embedding
        e = guidance.classifier_free(e.float(), guidance_scale, unconditional, conditional)
        return coefficients[:, :1] * sample + coefficients[:, 1:2] * e

    def project(self, *, embedding: Tensor) -> Tensor:
        """[rows, width] to [rows, tokens, token width]"""
        return self.parts["image_projection"](embedding.to(self.dtype))

    # -- the programs' first stage

    def conditioned(self, r: Parameters, inputs: Inputs, seed: int) -> Generator[Call, Any, Tensor]:
        guided = r.guidance_scale > 1
        imagined: dict[str, Tensor] = {}
        if prompts := self.prompts(r):
            imagined = yield from self.imagined(prompts, r, seed)
        embedding = yield from self.embedding(r, inputs, imagined)
        away = imagined[r.negative_prompt] if r.negative_prompt and guided else torch.zeros_like(embedding)
        rows = [away, embedding] if guided else [embedding]
        return (yield Call(self.projector, {"embedding": torch.cat(rows)}, len(rows)))

    def embedding(self, r: Parameters, inputs: Inputs, imagined: dict[str, Tensor]) -> Generator[Call, Any, Tensor]:
        """[1, width] of variance one: the embedding of the picture that is to be drawn."""
        mix = 0.5 if r.mix is None else r.mix
        if r.kind == "interpolate":
            begin = imagined[r.prompt] if inputs.image is None else (yield from self.seen(inputs.image))
            end = imagined[r.end_prompt or ""] if inputs.end_image is None else (yield from self.seen(inputs.end_image))
            return slerp(begin, end, mix)
        if r.kind != "variation" or inputs.image is None:
            return imagined[r.prompt]
        picture = yield from self.seen(inputs.image)
        if r.end_prompt is None:
            return picture
        captions = yield Call(self.caption_encoder, {"input_ids": self.tokens([r.prompt, r.end_prompt])}, 2)
        return slerp(picture, of_variance_one(captions[1:] - captions[:1]), mix)

    def seen(self, image: Image.Image) -> Generator[Call, Any, Tensor]:
        return of_variance_one((yield Call(self.picture_encoder, {"pixels": self.pixels(image)}, 1)))

    def prompts(self, r: Parameters) -> list[str]:
        """What the prior has to imagine: each end that is no picture, and what to steer away from."""
        ends = list[str]()
        if r.kind == "interpolate":
            ends += [r.prompt] if r.image is None else []
            ends += [r.end_prompt or ""] if r.end_image is None else []
        elif r.kind != "variation":
            ends.append(r.prompt)
        if r.negative_prompt and r.guidance_scale > 1:
            ends.append(r.negative_prompt)
        return list(dict.fromkeys(ends))

    def imagined(self, prompts: list[str], r: Parameters, seed: int) -> Generator[Call, Any, dict[str, Tensor]]:
        """The prior's stage: for each caption the embedding of a picture, all of them drawn from the same noise."""
        stage, count = self.stage, len(prompts)
        captions = yield Call(self.caption_encoder, {"input_ids": self.tokens(prompts)}, count)
        captions = of_variance_one(captions)
        guided = stage.guidance_scale > 1
        rows = count * (2 if guided else 1)
        unconditional, conditional = UNCONDITIONAL_THEN_CONDITIONAL if guided else ALONE
        told = {
            "caption": torch.stack([torch.zeros_like(captions), captions], 1).flatten(0, 1) if guided else captions,
            "guidance_scale": torch.tensor(stage.guidance_scale if guided else 1.0, device=self.device),
            "unconditional": unconditional.repeat(count).to(self.device),
            "conditional": conditional.repeat(count).to(self.device),
        }
        sampler = samplers.sampler("ddim", PRIOR_SCHEDULER, stage.num_inference_steps)
        noise = randn_tensor((1, self.width), generator=generator(seed), device=self.device)
        x = noise.expand(rows, -1)
        steps = self.steps_before(r) + r.num_inference_steps
        for i, t in enumerate(sampler.timesteps):
            args = told | {
                "sample": x,
                "timestep": t.float().to(self.device),
                "coefficients": sampler.coefficients[i].to(self.device).expand(rows, -1),
            }
            x = yield Call(self.prior, args, rows, (i, steps), stage="prior")
        drawn = of_variance_one(x[:: rows // count])
        return {prompt: drawn[i : i + 1] for i, prompt in enumerate(prompts)}

    def steps_before(self, r: Parameters) -> int:
        return self.stage.num_inference_steps if self.prompts(r) else 0

    @property
    def stage(self) -> Stage:
        return self.card.stages["prior"]


def of_variance_one(embedding: Tensor) -> Tensor:
    """Of the length that noise has: √width. What the prior draws and the decoder is told."""
    return nn.functional.normalize(embedding, dim=-1) * math.sqrt(embedding.shape[-1])


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The point t of the way from a to b along the great circle, both [rows, width] of one length: Shoemake 1985."""
    angle = torch.acos(nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1, 1))[:, None]
    if float(angle.max()) < 1e-3:
        return torch.lerp(a, b, t)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
