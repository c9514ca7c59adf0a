"""Stable Diffusion (Rombach et al. 2022): text-to-image, image-to-image and inpainting as one straight-line program.

Guidance and the sampler's update happen inside the net call, for all rows at once; the rest is plain code between
calls. The results are those of diffusers' StableDiffusion*Pipeline, draw for draw from the same generator.
"""

from collections.abc import Generator, Mapping
from functools import cached_property
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from app.schemas import Parameters
from models import guidance, samplers
from models.adapters import PLAIN, Wardrobe
from models.catalog import ModelCard
from models.guided import Guided, hole_of, modules_of, skipped_steps
from models.preview import LatentColours
from models.program import Call, Inputs, Net, Program, generator
from models.sampling import Span, denoised, moved

NO_PARTS: Mapping[str, Any] = {}


class StableDiffusion(Guided):
    """One resident model: weights, and the nets that its programs call. Read-only to requests."""

    def __init__(self, card: ModelCard, pipeline: Any, parts: Mapping[str, Any] = NO_PARTS):
        super().__init__(card, pipeline.tokenizer, pipeline.unet, parts)
        self.pipeline = pipeline
        self.wardrobe = Wardrobe(pipeline, card.loras)
        self.text_encoder.run = self.wardrobe.wearing(PLAIN, self.encode_text)
        self.modules = modules_of([*pipeline.components.values(), *parts.values()])
        self.scheduler_config = samplers.frozen_config(pipeline.scheduler)
        self.scaling = pipeline.vae.config.scaling_factor
        self.channels = pipeline.vae.config.latent_channels
        self.strength_width = pipeline.unet.config.get("time_cond_proj_dim")  # of a denoiser that guides itself
        self.inpaints_by_blending = pipeline.unet.config.in_channels == self.channels
        self.denoiser = Net(
            "denoise",
            self.wardrobe.wearing(PLAIN, self.denoise),
            buckets=self.buckets,
            reproducible_rows=card.reproducible_rows,
            recordable=True,
            journaled=True,
        )
        self.image_encoder = Net("encode_image", self.encode_image, width=1)
        self.decoder = Net("decode", self.decode, buckets=(1, 2, 4, 8), width=8, recordable=True)
        self.colours = LatentColours.fit(lambda pixels: self.encode_image(pixels=pixels)[0] * self.scaling, self.device)

    # -- the nets: rows in, rows out

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
        extra: Tensor | None = None,
        rescale: Tensor | None = None,
        push: Tensor | None = None,
        strength: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One guided sampler step for each row.

        Args:
            sample, noise: [rows, C, h, w]; memory: [rows, 4, C, h, w], see `samplers.MEMORY`.
            timestep, scale, guidance_scale, unconditional, conditional: [rows]; context: [rows, tokens, width].
            coefficients: [rows, 7] of the update; extra: [rows, 1 + C, h, w] mask and masked latents for 9 channels.
            rescale: [rows] see `guidance.rescale`; push: [rows, C, h, w] what CLIP or a classifier adds to the output.
            strength: [rows, width] of guidance, for a denoiser that guides itself.
        Returns:
            the next sample and the guided output, both [rows, C, h, w] float32.
        """
        seen = sample * guidance.over(scale, sample)
        if extra is not None:
            seen = torch.cat([seen, extra], 1)
        told = {} if strength is None else {"timestep_cond": strength.to(self.dtype)}
        e = self.predicted(seen.to(self.dtype), timestep, context, **told).float()
        guided = guidance.classifier_free(e, guidance_scale, unconditional, conditional)
        e = guided if rescale is None else guidance.rescale(guided, e, conditional, rescale)
        e = e if push is None else e + push
        return moved(sample, e, noise, memory, coefficients), e

    def predicted(self, seen: Tensor, timestep: Tensor, context: Tensor, **told: Tensor) -> Tensor:
        """The denoiser's own word, [rows, C, h, w]."""
        return self.pipeline.unet(seen, timestep, encoder_hidden_states=context, return_dict=False, **told)[0]

    def encode_text(self, *, input_ids: Tensor) -> Tensor:
        """[rows, tokens] to [rows, tokens, width]"""
        return self.pipeline.text_encoder(input_ids.to(self.device))[0]

    def encode_image(self, *, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, 3, H, W] in [-1, 1] to the posterior's mean and standard deviation, [rows, C, h, w]."""
        posterior = self.pipeline.vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        return posterior.mean, posterior.std

    def decode(self, *, latents: Tensor) -> Tensor:
        """[rows, C, h, w] to [rows, 3, H, W] in [0, 1], float32."""
        vae = self.parts.get("decoder", self.pipeline.vae)
        pixels = vae.decode((latents / vae.config.scaling_factor).to(self.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    # -- the program

    def draw(self, r: Parameters, seed: int, inputs: Inputs) -> Program:
        """One picture."""
        rng = generator(seed)
        context = yield from self.conditioned(r, inputs, seed)
        steering = yield from self.steered_by(r)

        left_out = skipped_steps(r)
        sampler = samplers.sampler(r.scheduler, self.scheduler_config, r.num_inference_steps, left_out)
        calls, steps, before = len(sampler.timesteps), r.num_inference_steps - left_out, self.steps_before(r)
        shape = (1, self.channels, r.height // self.factor, r.width // self.factor)
        image = inputs.image if r.strength is not None else None
        blending = inputs.mask is not None and self.inpaints_by_blending

        x0 = None
        if image is not None and (inputs.mask is None or blending or r.strength != 1):
            x0 = yield from self.latents(self.pixels(image), rng)
        noise = self.noise(shape, rng)
        if x0 is None or (inputs.mask is not None and r.strength == 1):
            x = noise * sampler.init_noise_sigma
        else:
            x = sampler.add_noise(0, x0, noise)

        repaint = extra = None
        if image is not None and inputs.mask is not None:
            hole, mask = self.masks(inputs.mask, shape)
            if blending:
                repaint = mask
                self.noise(shape, rng)  # the stock pipeline draws here too, for masked latents that it does not use
            else:
                kept = yield from self.latents(self.pixels(image) * (hole < 0.5), rng)
                extra = torch.cat([mask, kept], 1)

        def settled(i: int, x: Tensor) -> Tensor:
            if repaint is None or x0 is None:
                return x
            around = sampler.add_noise(i + 1, x0, noise) if i + 1 < calls else x0
            return (1 - repaint) * around + repaint * x

        rows = {} if extra is None else {"extra": extra}
        if self.strength_width:
            rows["strength"] = guidance.strength_embedding(r.guidance_scale, self.strength_width).to(self.device)
        told, reused = self.told(r, calls, context, **rows), self.reused(r, calls, context)
        span = Span(before, steps, before + steps)
        net = self.dressed(self.denoiser, r)
        x = yield from denoised(net, sampler, x, rng, told, span, steering, settled, reused)
        picture = yield Call(self.decoder, {"latents": x}, 1, (before + steps, before + steps))
        return picture[0]

    def conditioned(self, r: Parameters, inputs: Inputs, seed: int) -> Generator[Call, Any, Tensor]:
        """What the denoiser is told, as of `conditioning`; a family may have more to go by than prompts."""
        return (yield from self.conditioning(r))

    def guides(self, r: Parameters) -> bool:
        return super().guides(r) and not self.strength_width

    def dressed(self, net: Net, r: Parameters) -> Net:
        return self.wardrobe.asked(r, net)

    def steps_before(self, r: Parameters) -> int:
        """Steps of the stages before this one."""
        return 0

    # -- what the program starts from

    @cached_property
    def factor(self) -> int:
        """Pixels a latent, in each direction."""
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    def pixels(self, image: Image.Image) -> Tensor:
        """[1, 3, H, W] in [-1, 1]"""
        return self.pipeline.image_processor.preprocess(image)

    def latents(self, pixels: Tensor, rng: torch.Generator) -> Generator[Call, Any, Tensor]:
        """A draw from the posterior of the picture's latents, [1, C, h, w]."""
        mean, std = yield Call(self.image_encoder, {"pixels": pixels}, 1)
        drawn = randn_tensor(mean.shape, generator=rng, device=self.device, dtype=self.dtype)
        return ((mean + std * drawn) * self.scaling).float()

    def masks(self, mask: Image.Image, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """1 where to repaint: [1, 1, H, W] for pixels on the CPU, [1, 1, h, w] for latents on the device."""
        hole = hole_of(mask)
        return hole, torch.nn.functional.interpolate(hole, shape[-2:]).to(self.device)
