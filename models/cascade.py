"""Diffusion in pixels: a model of small pictures, and one that enlarges them.

GLIDE (Nichol et al. 2021) is told the words of a text encoder of its own, and what is known of the picture: it also
inpaints. Imagen (Saharia et al. 2022) is told those of a language model that never saw a picture. Both networks see a
picture in patches, as channels (Hoogeboom et al. 2023, "simple diffusion", section 3.2), and say what it is without the
noise (Li & He 2025, "Back to basics").
"""

from collections.abc import Generator, Mapping
from math import isqrt
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, pixel_shuffle, pixel_unshuffle

from app.schemas import Parameters
from models import guidance, samplers
from models.catalog import ModelCard
from models.guided import Guided, hole_of, modules_of, skipped_steps
from models.preview import LatentColours
from models.program import Call, Inputs, Net, Program, generator
from models.samplers import Sampler
from models.sampling import Span, Told, denoised, moved

ENLARGES_WITH = "ddim"
AUGMENTATION = 60  # timestep of the noise on the small picture: Ho et al. 2021, "Cascaded Diffusion Models", section 4


class Cascade(Guided):
    """One resident model of two networks; its `decoder`, to those who measure, is the one that enlarges."""

    def __init__(self, card: ModelCard, pipeline: Any, parts: Mapping[str, Any]):
        self.base, self.enlarger = parts["base"], parts["upsampler"]
        self.enlarger.class_embedding.register_forward_pre_hook(in_its_precision)
        super().__init__(card, parts["tokenizer"], self.base, parts)
        self.length = min(self.length, card.limits.prompt_tokens)  # a language model would read on
        self.modules = modules_of(parts.values())
        self.scheduler_config = samplers.frozen_config(parts["scheduler"])
        self.alphas_cumprod = parts["scheduler"].alphas_cumprod
        self.patch = isqrt(self.base.config.out_channels // 3)
        self.small, self.large = (net.config.sample_size * self.patch for net in (self.base, self.enlarger))
        self.sees_the_known = self.base.config.in_channels > self.base.config.out_channels
        self.denoiser = Net(
            "denoise",
            self.denoise,
            buckets=self.buckets,
            reproducible_rows=card.reproducible_rows,
            recordable=True,
            journaled=True,
        )
        self.decoder = Net("upsample", self.upsample, buckets=(1, 2, 4, 8), width=8, recordable=True, journaled=True)
        self.colours = LatentColours(torch.cat([torch.eye(3), torch.zeros(1, 3)]))  # pixels are their own colours

    # -- the nets

    def encode_text(self, *, input_ids: Tensor) -> Tensor:
        """[rows, tokens] to what the base is told, [rows, tokens, width]; zeros where a language model has no word."""
        encoder, ids = self.parts["text_encoder"], input_ids.to(self.device)
        if encoder.config.model_type == "clip_text_model":
            return encoder(ids)[0]
        words = (ids != self.tokenizer.pad_token_id).long()
        states = encoder(ids, attention_mask=words).last_hidden_state * words[..., None]
        return self.parts["ear"](states) if "ear" in self.parts else states

    def denoise(
        self,
        *,
        sample: Tensor,
        noise: Tensor,
        memory: Tensor,
        timestep: Tensor,
        context: Tensor,
        scale: Tensor,
        guidance_scale: Tensor,
        unconditional: Tensor,
        conditional: Tensor,
        coefficients: Tensor,
        estimates: Tensor,
        known: Tensor | None = None,
        rescale: Tensor | None = None,
        threshold: Tensor | None = None,
        push: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One guided sampler step of the small pictures, as `StableDiffusion.denoise` of latents.

        Args:
            sample, noise, push: [rows, 3, h, w]; memory: [rows, 4, 3, h, w]; context: [rows, tokens, width].
            coefficients: [rows, 7] of the update; estimates: [rows, 2] of x0, see `samplers.Sampler`.
            known: [rows, 4, h, w] what is known of the picture, and where it is not; threshold: [rows].
        Returns:
            the next sample and the output for the guided picture, both [rows, 3, h, w] float32.
        """
        seen = self.patches(sample * guidance.over(scale, sample))
        if known is not None:
            seen = torch.cat([seen, self.patches(known[:, :3]), self.patches(known[:, 3:])], 1)
        x0 = self.base(seen, timestep, encoder_hidden_states=context, return_dict=False)[0]
        x0 = pixel_shuffle(x0.float(), self.patch)
        guided = guidance.classifier_free(x0, guidance_scale, unconditional, conditional)
        x0 = guided if rescale is None else guidance.rescale(guided, x0, conditional, rescale)
        x0 = x0 if push is None else x0 + guidance.over(estimates[:, 1], push) * push
        e = output_for(within(x0, known, threshold), sample, estimates)
        return moved(sample, e, noise, memory, coefficients), e

    def upsample(
        self,
        *,
        sample: Tensor,
        noise: Tensor,
        memory: Tensor,
        timestep: Tensor,
        scale: Tensor,
        coefficients: Tensor,
        estimates: Tensor,
        low: Tensor,
        known: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One sampler step of the large pictures; low: [rows, 3, H, W] the small ones, enlarged and noised."""
        seen = torch.cat([self.patches(sample * guidance.over(scale, sample)), self.patches(low)], 1)
        level = torch.full_like(timestep, AUGMENTATION)
        x0 = self.enlarger(seen, timestep, class_labels=level, return_dict=False)[0]
        x0 = within(pixel_shuffle(x0.float(), self.patch), known)
        e = output_for(x0, sample, estimates)
        return moved(sample, e, noise, memory, coefficients), e

    def patches(self, pixels: Tensor) -> Tensor:
        return pixel_unshuffle(pixels, self.patch).to(self.dtype)

    # -- the program

    def draw(self, r: Parameters, seed: int, inputs: Inputs) -> Program:
        """One picture: its small one, and what that looks like enlarged."""
        rng = generator(seed)
        steps = 0 if r.kind == "upscale" else r.num_inference_steps - skipped_steps(r)
        total = steps + self.card.stages["upsampler"].num_inference_steps
        image = None if inputs.image is None else pixels_of(inputs.image)
        hole = None if inputs.mask is None else hole_of(inputs.mask)
        if image is not None and r.kind == "upscale":
            small = shrunk(image, self.small)
        else:
            small = yield from self.drawn(r, rng, image, hole, Span(0, steps, total, "base"))
        x = yield from self.enlarged(small, rng, image, hole, Span(steps, total - steps, total, "upsampler"))
        if image is not None and hole is not None:
            x = kept(image, hole).to(self.device) + hole.to(self.device) * x
        return (x[0] / 2 + 0.5).clamp(0, 1)

    def drawn(
        self, r: Parameters, rng: torch.Generator, image: Tensor | None, hole: Tensor | None, span: Span
    ) -> Generator[Call, Any, Tensor]:
        """The small picture, [1, 3, h, w] in [-1, 1]."""
        context = yield from self.conditioning(r)
        steering = yield from self.steered_by(r)
        sampler = samplers.sampler(r.scheduler, self.scheduler_config, r.num_inference_steps, skipped_steps(r))
        x = noise = self.noise((1, 3, self.small, self.small), rng)
        if image is None or r.strength == 1:
            x = noise * sampler.init_noise_sigma
        else:
            x = sampler.add_noise(0, shrunk(image, self.small).to(self.device), noise)
        rows: dict[str, Tensor] = {}
        if self.sees_the_known:
            rows["known"] = self.known(image, hole)
        if r.guidance.dynamic_threshold:
            rows["threshold"] = torch.tensor([r.guidance.dynamic_threshold], device=self.device)
        told = self.told(r, len(sampler.timesteps), context, **rows)
        told = estimating(sampler, told, self.device)
        return (yield from denoised(self.denoiser, sampler, x, rng, told, span, steering))

    def enlarged(
        self, small: Tensor, rng: torch.Generator, image: Tensor | None, hole: Tensor | None, span: Span
    ) -> Generator[Call, Any, Tensor]:
        """[1, 3, h, w] to [1, 3, H, W], both in [-1, 1]."""
        sampler = samplers.sampler(ENLARGES_WITH, self.scheduler_config, span.steps)
        low = interpolate(small, (self.large, self.large), mode="bicubic").to(self.device)
        alpha_bar = self.alphas_cumprod[AUGMENTATION].to(self.device)
        low = alpha_bar.sqrt() * low + (1 - alpha_bar).sqrt() * self.noise(low.shape, rng)
        rows = {"low": low}
        if image is not None and hole is not None:
            rows["known"] = torch.cat([kept(image, hole), hole], 1).to(self.device)
        x = self.noise(low.shape, rng) * sampler.init_noise_sigma
        told = estimating(sampler, lambda i: (1, rows), self.device)
        return (yield from denoised(self.decoder, sampler, x, rng, told, span))

    def known(self, image: Tensor | None, hole: Tensor | None) -> Tensor:
        """[1, 4, h, w] for the base: the pixels that are known, zeros elsewhere; and one where they are not."""
        if image is None or hole is None:
            nothing = torch.zeros(1, 4, self.small, self.small, device=self.device)
            nothing[:, 3:] = 1
            return nothing
        hole = max_pool2d(hole, self.large // self.small)
        return torch.cat([kept(shrunk(image, self.small), hole), hole], 1).to(self.device)


def in_its_precision(embedding: Any, given: tuple[Tensor]) -> tuple[Tensor]:
    """What `UNet2DModel` makes of a timestep that is its class is float32, whatever its weights are."""
    return (given[0].to(embedding.linear_1.weight.dtype),)


def within(x0: Tensor, known: Tensor | None = None, threshold: Tensor | None = None) -> Tensor:
    """An estimate of the picture without what it cannot be: brighter than white, or other than what is known.

    Args:
        x0: [rows, 3, h, w]; known: [rows, 4, h, w] pixels, zeros where the fourth is one; threshold: [rows] see
            `guidance.thresholded`.
    """
    x0 = guidance.thresholded(x0, threshold)
    return x0 if known is None else known[:, :3] + known[:, 3:] * x0


def output_for(x0: Tensor, sample: Tensor, estimates: Tensor) -> Tensor:
    """The output from which a sampler would conclude x0, [rows, 3, h, w]; estimates: [rows, 2], see `samplers`."""
    of_x, of_e = guidance.over(estimates[:, 0], sample), guidance.over(estimates[:, 1], sample)
    return (x0 - of_x * sample) / torch.where(of_e == 0, 1, of_e)  # zero in rows that are nobody's


def estimating(sampler: Sampler, told: Told, device: torch.device) -> Told:
    """What is told, and how the picture is judged from each step."""
    estimates = sampler.estimates.to(device)

    def also(i: int) -> tuple[int, dict[str, Tensor]]:
        rows, arguments = told(i)
        return rows, arguments | {"estimates": estimates[i].expand(rows, -1)}

    return also


def pixels_of(image: Image.Image) -> Tensor:
    """[1, 3, H, W] in [-1, 1]"""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1


def shrunk(pixels: Tensor, size: int) -> Tensor:
    return avg_pool2d(pixels, pixels.shape[-1] // size)


def kept(pixels: Tensor, hole: Tensor) -> Tensor:
    """What is known of a picture: zeros in the hole."""
    return pixels * (1 - hole)
