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
from torch import Tensor, nn

from app.schemas import Parameters
from models import guidance, samplers
from models.catalog import ModelCard
from models.preview import LatentColours
from models.program import BUCKETS, Call, Inputs, Net, Program, generator

UNCONDITIONAL_THEN_CONDITIONAL = (torch.tensor([0, -1]), torch.tensor([1, 0]))  # where each row finds its pair
ALONE = (torch.tensor([0]), torch.tensor([0]))
NO_PARTS: Mapping[str, nn.Module] = {}


class StableDiffusion:
    """One resident model: weights, and the nets that its programs call. Read-only to requests."""

    def __init__(self, card: ModelCard, pipeline: Any, parts: Mapping[str, nn.Module] = NO_PARTS):
        self.card, self.pipeline, self.parts = card, pipeline, parts
        self.device, self.dtype = pipeline.unet.device, pipeline.unet.dtype
        self.scheduler_config = samplers.frozen_config(pipeline.scheduler)
        self.scaling = pipeline.vae.config.scaling_factor
        self.channels = pipeline.vae.config.latent_channels
        self.inpaints_by_blending = pipeline.unet.config.in_channels == self.channels
        buckets = tuple(bucket for bucket in BUCKETS if bucket <= card.max_rows)
        self.denoiser = Net(
            "denoise", self.denoise, buckets=buckets, reproducible_rows=card.reproducible_rows, journaled=True
        )
        self.text_encoder = Net("encode_text", self.encode_text, width=32)
        self.image_encoder = Net("encode_image", self.encode_image, width=1)
        self.decoder = Net("decode", self.decode, buckets=(1, 2, 4, 8), width=8)
        if "noised_clip" in parts:
            self.caption_encoder = Net("encode_caption", self.encode_caption, width=32)
            self.steering = Net("steer", self.steer, buckets=buckets, width=16, journaled=True)
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
    ) -> tuple[Tensor, Tensor]:
        """One guided sampler step for each row.

        Args:
            sample, noise: [rows, C, h, w]; memory: [rows, 4, C, h, w], see `samplers.MEMORY`.
            timestep, scale, guidance_scale, unconditional, conditional: [rows]; context: [rows, tokens, width].
            coefficients: [rows, 7] of the update; extra: [rows, 1 + C, h, w] mask and masked latents for 9 channels.
            rescale: [rows] see `guidance.rescale`; push: [rows, C, h, w] what CLIP or a classifier adds to the output.
        Returns:
            the next sample and the guided output, both [rows, C, h, w] float32.
        """
        seen = sample * guidance.over(scale, sample)
        if extra is not None:
            seen = torch.cat([seen, extra], 1)
        e = self.pipeline.unet(seen.to(self.dtype), timestep, encoder_hidden_states=context, return_dict=False)[0]
        e = e.float()
        guided = guidance.classifier_free(e, guidance_scale, unconditional, conditional)
        e = guided if rescale is None else guidance.rescale(guided, e, conditional, rescale)
        e = e if push is None else e + push
        terms = torch.cat([torch.stack([sample, e, noise], 1), memory], 1)
        return torch.einsum("rk,rkchw->rchw", coefficients, terms), e

    def encode_text(self, *, input_ids: Tensor) -> Tensor:
        """[rows, tokens] to [rows, tokens, width]"""
        return self.pipeline.text_encoder(input_ids.to(self.device))[0]

    def encode_image(self, *, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, 3, H, W] in [-1, 1] to the posterior's mean and standard deviation, [rows, C, h, w]."""
        posterior = self.pipeline.vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        return posterior.mean, posterior.std

    def decode(self, *, latents: Tensor) -> Tensor:
        """[rows, C, h, w] to [rows, 3, H, W] in [0, 1], float32."""
        pixels = self.pipeline.vae.decode((latents / self.scaling).to(self.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def encode_caption(self, *, input_ids: Tensor) -> Tensor:
        """[rows, tokens] to embeddings of length one, [rows, width], as CLIP has them."""
        clip: Any = self.parts["clip"]
        features = clip.get_text_features(input_ids=input_ids.to(self.device)).pooler_output
        return torch.nn.functional.normalize(features.float(), dim=-1)

    def steer(self, *, sample: Tensor, timestep: Tensor, caption: Tensor) -> Tensor:
        """[rows, C, h, w]: where each sample agrees better with its caption, see `guidance.clip`."""
        return guidance.gradient(lambda x: guidance.clip(self.foreseen(x, timestep), caption), sample)

    def foreseen(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """[rows, width] float32: what the noise-aware CLIP says of half-denoised samples."""
        return self.parts["noised_clip"](sample.to(self.dtype), timestep).float()

    # -- the program

    def draw(self, r: Parameters, seed: int, inputs: Inputs) -> Program:
        """One picture."""
        rng = generator(seed)
        guided = r.guidance_scale > 1
        context = yield from self.conditioning(r, guided, inputs, seed)
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

        timesteps, scales = sampler.timesteps.float().to(self.device), sampler.scales.to(self.device)
        coefficients, pushes = sampler.coefficients.to(self.device), sampler.pushes.to(self.device)
        with_guidance, without = self.conditions(r, context, extra)
        e1 = x1 = e2 = x2 = torch.zeros_like(x)
        estimate = None
        for i in range(calls):
            done = samplers.steps_done(i, calls, steps)
            at = before + done[0], before + steps
            conditions = with_guidance if guidance.in_interval(r.guidance.interval, i, calls) else without
            rows = len(conditions["context"])
            fresh = sampler.noise(i, x, rng)
            args = conditions | {
                "sample": x.expand(rows, -1, -1, -1),
                "noise": fresh.expand(rows, -1, -1, -1),
                "memory": torch.stack([e1, x1, e2, x2], 1).expand(rows, -1, -1, -1, -1),
                "timestep": timesteps[i],
                "scale": scales[i],
                "coefficients": coefficients[i].expand(rows, -1),
            }
            if steering is not None:
                seen = {"sample": x * scales[i], "timestep": timesteps[i]}
                net, told = steering
                uphill = yield Call(net, seen | told, 1, at, estimate)
                args["push"] = (self.strength_of_steering(r) * pushes[i] * uphill).expand(rows, -1, -1, -1)
            updated, e = yield Call(self.denoiser, args, rows, at, estimate)
            updated, e = updated[:1], e[:1]
            estimate = sampler.estimate(i, x, e)
            e2, x2, e1, x1 = e1, x1, e, x
            x = sampler.settle(i, x, e, updated, rng)
            if repaint is not None and x0 is not None:
                around = sampler.add_noise(i + 1, x0, noise) if i + 1 < calls else x0
                x = (1 - repaint) * around + repaint * x

        picture = yield Call(self.decoder, {"latents": x}, 1, (before + steps, before + steps))
        return picture[0].cpu()

    def conditioning(self, r: Parameters, guided: bool, inputs: Inputs, seed: int) -> Generator[Call, Any, Tensor]:
        """What the denoiser is told: [rows, tokens, width], the unconditional row first if there is one."""
        texts = [r.negative_prompt, r.prompt] if guided else [r.prompt]
        return (yield Call(self.text_encoder, {"input_ids": self.tokens(texts)}, len(texts)))

    def steps_before(self, r: Parameters) -> int:
        """Steps of the stages before this one."""
        return 0

    def steered_by(self, r: Parameters) -> Generator[Call, Any, tuple[Net, dict[str, Tensor]] | None]:
        """The net whose gradient steers, and what it is told beside the sample; none if nothing steers."""
        if not r.guidance.clip:
            return None
        caption = yield Call(self.caption_encoder, {"input_ids": self.tokens([r.prompt])}, 1)
        return self.steering, {"caption": caption}

    def strength_of_steering(self, r: Parameters) -> float:
        return r.guidance.clip or 0.0

    def conditions(
        self, r: Parameters, context: Tensor, extra: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The arguments of `denoise` that stay the same: with classifier-free guidance and, of one row, without."""

        def arguments(context: Tensor) -> dict[str, Tensor]:
            rows = len(context)
            unconditional, conditional = UNCONDITIONAL_THEN_CONDITIONAL if rows == 2 else ALONE
            found = {
                "context": context,
                "guidance_scale": torch.tensor(r.guidance_scale if rows == 2 else 1.0, device=self.device),
                "unconditional": unconditional.to(self.device),
                "conditional": conditional.to(self.device),
            }
            if extra is not None:
                found["extra"] = extra.expand(rows, -1, -1, -1)
            if r.guidance.rescale:
                found["rescale"] = torch.tensor(r.guidance.rescale, device=self.device)
            return found

        return arguments(context), arguments(context[-1:])

    # -- what the program starts from

    @cached_property
    def factor(self) -> int:
        """Pixels a latent, in each direction."""
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    def tokens(self, texts: list[str]) -> Tensor:
        """[texts, tokens]"""
        tokenizer = self.pipeline.tokenizer
        length = tokenizer.model_max_length
        return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids

    def warnings(self, r: Parameters) -> list[str]:
        """What of the prompts the text encoder will not see."""
        return unseen(r, self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length)

    def noise(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Drawn in the model's dtype, as the stock pipeline does, then float32."""
        return randn_tensor(shape, generator=rng, device=self.device, dtype=self.dtype).float()

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
        hole = torch.frombuffer(bytearray(mask.convert("L").tobytes()), dtype=torch.uint8)
        hole = (hole.view(1, 1, mask.height, mask.width) >= 128).float()
        return hole, torch.nn.functional.interpolate(hole, shape[-2:]).to(self.device)


def skipped_steps(r: Parameters) -> int:
    """How many steps image-to-image leaves out: the stock pipelines' `get_timesteps`, but at least one is taken."""
    if r.strength is None:
        return 0
    return r.num_inference_steps - max(int(r.num_inference_steps * r.strength), 1)


def unseen(r: Parameters, tokenizer: Any, length: int) -> list[str]:
    """A warning for each prompt that has no room in `length` tokens, of which some mark the start and the end."""
    room, warnings = length - tokenizer.num_special_tokens_to_add(), list[str]()
    for field in ("prompt", "negative_prompt"):
        ids = tokenizer(getattr(r, field), add_special_tokens=False, verbose=False).input_ids
        if len(ids) > room:
            lost = tokenizer.decode(ids[room:]).strip()
            warnings.append(f"{field} is cut after {room} tokens: {lost!r} is not seen")
    return warnings
