"""Systems that diffusers has as one pipeline after another, or as one with several denoisers; each unmodified.

DeepFloyd IF (Imagen's heir), Kandinsky 2.2 and Karlo (unCLIP's), DiT, which draws classes, aMUSEd, which draws tokens,
and Stable Diffusion's upscaler. They sample as their authors set them up: a request decides the steps, the guidance and
the seed.
"""

import itertools
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from app.schemas import Parameters
from models.catalog import ModelCard, Stage
from models.guided import modules_of, unseen
from models.preview import LatentColours
from models.program import Call, Inputs, Program, generator
from models.stock import nets, stock
from models.unclip import slerp

Marks = Callable[[Call], None]


class Stages:
    """One resident model of several pipelines, or of one with several denoisers.

    Args:
        pipelines: by name. What they share is loaded once.
        stages: the denoisers (`pipeline.component`) whose calls are a request's steps, in order: names of its progress.
        decoder: what makes the large picture.
    """

    def __init__(self, card: ModelCard, pipelines: Mapping[str, Any], stages: Mapping[str, str], decoder: str):
        self.card, self.pipelines = card, pipelines
        self.modules = list(dict.fromkeys(modules_of(c for p in pipelines.values() for c in p.components.values())))
        self.nets = {name: nets(pipeline, card) for name, pipeline in pipelines.items()}
        found = {f"{name}.{component}": net for name, own in self.nets.items() for component, net in own.items()}
        if len(pipelines) > 1:
            for name, net in found.items():
                net.name = name  # two may have a unet each
        self.stages = {found[name]: stage for name, stage in stages.items()}
        self.denoiser = next(net for net, stage in self.stages.items() if stage == "base")
        self.decoder = found[decoder]
        self.device = next(iter(pipelines.values())).device
        self.colours = LatentColours(torch.cat([torch.eye(3), torch.zeros(1, 3)]))  # pixels are their own colours

    def run(self, name: str, mark: Marks, **arguments: Any) -> Generator[Call, Any, Any]:
        return (yield from stock(self.pipelines[name], self.nets[name], mark=mark, **arguments))

    def counting(self, total: int) -> Marks:
        """Marks the calls of denoisers as steps, of so many."""
        done = itertools.count()

        def mark(call: Call) -> None:
            if stage := self.stages.get(call.net):
                call.at, call.stage = (next(done), total), stage

        return mark

    def stage(self, name: str) -> Stage:
        return self.card.stages[name]

    def warnings(self, r: Parameters) -> list[str]:
        tokenizers = (t for p in self.pipelines.values() if (t := p.components.get("tokenizer")) is not None)
        if (tokenizer := next(tokenizers, None)) is None:
            return []
        return unseen(r, tokenizer, min(tokenizer.model_max_length, self.card.limits.prompt_tokens))


class DeepFloyd(Stages):
    """IF: 64 pixels, then four times as many; a T5 encoder reads the prompt, once for both."""

    def __init__(self, card: ModelCard, pipeline: Any, parts: Mapping[str, Any]):
        upsampler = parts["upsampler"]
        upsampler.register_modules(text_encoder=None, tokenizer=pipeline.tokenizer)  # it is told what the base was
        stages = {"base.unet": "base", "upsampler.unet": "upsampler"}
        super().__init__(card, {"base": pipeline, "upsampler": upsampler}, stages, "upsampler.unet")

    def draw(self, r: Parameters, seed: int, inputs: Inputs) -> Program:
        rng, second = generator(seed), self.stage("upsampler")
        mark = self.counting(r.num_inference_steps + second.num_inference_steps)
        told = yield from self.told(r)
        common = told | {"generator": rng, "output_type": "pt"}
        scale = self.pipelines["upsampler"].unet.config.sample_size // self.pipelines["base"].unet.config.sample_size
        size = {"width": r.width // scale, "height": r.height // scale}
        given = {"num_inference_steps": r.num_inference_steps, "guidance_scale": r.guidance_scale}
        small = yield from self.run("base", mark, **given, **size, **common)
        enlarging = {"num_inference_steps": second.num_inference_steps, "guidance_scale": second.guidance_scale}
        size = {"width": r.width, "height": r.height}
        common["output_type"] = "np"
        large = yield from self.run("upsampler", mark, image=small.images, **enlarging, **size, **common)
        return picture(large.images)

    def told(self, r: Parameters) -> Generator[Call, Any, dict[str, Tensor]]:
        """What T5 says of the prompts; [1, tokens, width] both."""
        base, length = self.pipelines["base"], self.card.limits.prompt_tokens
        told = base.tokenizer(
            [r.prompt, r.negative_prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        args = {"input_ids": told.input_ids, "attention_mask": told.attention_mask}
        words = (yield Call(self.nets["base"]["text_encoder"], args, 2))[0].to(base.unet.dtype)
        return {"prompt_embeds": words[:1], "negative_prompt_embeds": words[1:]}


class Kandinsky(Stages):
    """Kandinsky 2.2: a prior draws a CLIP image embedding, the decoder draws it; so pictures have variations."""

    def __init__(self, card: ModelCard, pipeline: Any, parts: Mapping[str, Any]):
        stages = {"prior.prior": "prior", "decoder.unet": "base"}
        super().__init__(card, {"prior": parts["prior"], "decoder": pipeline}, stages, "decoder.movq.decode")
        with torch.no_grad():
            self.nothing = parts["prior"].get_zero_embed()
        movq = pipeline.movq
        self.colours = LatentColours.fit(lambda x: movq.encode(x.to(movq.dtype)).latents, self.device)

    def draw(self, r: Parameters, seed: int, inputs: Inputs) -> Program:
        rng = generator(seed)
        away = r.negative_prompt if r.guidance_scale > 1 else ""
        ends = self.ends(r, inputs)
        imagined = sum(isinstance(one, str) for one in (*ends, *filter(None, [away])))
        mark = self.counting(imagined * self.stage("prior").num_inference_steps + r.num_inference_steps)
        embedding = yield from self.embedded(ends[0], rng, mark)
        if len(ends) > 1:
            embedding = slerp(
                embedding, (yield from self.embedded(ends[1], rng, mark)), 0.5 if r.mix is None else r.mix
            )
        output = yield from self.run(
            "decoder",
            mark,
            image_embeds=embedding,
            negative_image_embeds=(yield from self.embedded(away, rng, mark)) if away else self.nothing,
            num_inference_steps=r.num_inference_steps,
            guidance_scale=r.guidance_scale,
            width=r.width,
            height=r.height,
            generator=rng,
            output_type="np",
        )
        return picture(output.images)

    def warnings(self, r: Parameters) -> list[str]:
        unheard = (
            [f"{r.model} varies a picture without regard to prompts"] if r.kind == "variation" and r.prompt else []
        )
        return super().warnings(r) + unheard

    @staticmethod
    def ends(r: Parameters, inputs: Inputs) -> list[str | Image.Image]:
        """What is to be drawn, or the two things between which it is: pictures, or captions of some."""
        first = r.prompt if inputs.image is None else inputs.image
        if r.kind != "interpolate":
            return [first]
        return [first, r.end_prompt or "" if inputs.end_image is None else inputs.end_image]

    def embedded(self, end: str | Image.Image, rng: torch.Generator, mark: Marks) -> Generator[Call, Any, Tensor]:
        """[1, width]"""
        return (yield from (self.imagined(end, rng, mark) if isinstance(end, str) else self.seen(end)))

    def imagined(self, prompt: str, rng: torch.Generator, mark: Marks) -> Generator[Call, Any, Tensor]:
        prior = self.stage("prior")
        steps = {"num_inference_steps": prior.num_inference_steps, "guidance_scale": prior.guidance_scale}
        output = yield from self.run("prior", mark, prompt=prompt, generator=rng, **steps)
        return output.image_embeds

    def seen(self, image: Image.Image) -> Generator[Call, Any, Tensor]:
        prior = self.pipelines["prior"]
        pixels = prior.image_processor(image, return_tensors="pt").pixel_values
        args = {"pixel_values": pixels.to(self.device, prior.image_encoder.dtype)}
        return (yield Call(self.nets["prior"]["image_encoder"], args, 1)).image_embeds


class Karlo(Stages):
    """Karlo, an unCLIP: prior, decoder at 64 pixels, and a super-resolution model whose last step is another's."""

    def __init__(self, card: ModelCard, pipeline: Any, parts: Mapping[str, Any]):
        stages = {
            "whole.prior": "prior",
            "whole.decoder": "base",
            "whole.super_res_first": "upsampler",
            "whole.super_res_last": "upsampler",
        }
        super().__init__(card, {"whole": pipeline}, stages, "whole.super_res_first")

    def warnings(self, r: Parameters) -> list[str]:
        unheard = [f"{r.model} has no negative prompt: it is not seen"] if r.negative_prompt else []
        return super().warnings(r) + unheard

    def draw(self, r: Parameters, seed: int, inputs: Inputs) -> Program:
        prior, upsampler = self.stage("prior"), self.stage("upsampler")
        steps = prior.num_inference_steps + r.num_inference_steps + upsampler.num_inference_steps
        output = yield from self.run(
            "whole",
            self.counting(steps),
            prompt=r.prompt,
            prior_num_inference_steps=prior.num_inference_steps,
            prior_guidance_scale=prior.guidance_scale,
            decoder_num_inference_steps=r.num_inference_steps,
            decoder_guidance_scale=r.guidance_scale,
            super_res_num_inference_steps=upsampler.num_inference_steps,
            generator=generator(seed),
            output_type="np",
        )
        return picture(output.images)


class DiT(Stages):
    """A transformer that draws classes (Peebles & Xie 2022): the prompt is one of its labels."""

    def __init__(self, card: ModelCard, pipeline: Any, parts: Mapping[str, Any]):
        super().__init__(card, {"whole": pipeline}, {"whole.transformer": "base"}, "whole.vae.decode")
        vae = pipeline.vae
        self.colours = LatentColours.fit(
            lambda x: vae.encode(x.to(vae.dtype)).latent_dist.mean * vae.config.scaling_factor, self.device
        )

    def draw(self, r: Parameters, seed: int, inputs: Inputs) -> Program:
        pipeline = self.pipelines["whole"]
        output = yield from self.run(
            "whole",
            self.counting(r.num_inference_steps),
            class_labels=pipeline.get_label_ids([r.prompt]),
            num_inference_steps=r.num_inference_steps,
            guidance_scale=r.guidance_scale,
            generator=generator(seed),
            output_type="np",
        )
        return picture(output.images)


class Upscaler(Stages):
    """Stable Diffusion x4: a latent upscaler that is told what it looks at, and how much noise was put on it."""

    NOISE_LEVEL = 20

    def __init__(self, card: ModelCard, pipeline: Any, parts: Mapping[str, Any]):
        super().__init__(card, {"whole": pipeline}, {"whole.unet": "base"}, "whole.vae.decode")
        vae = pipeline.vae
        self.colours = LatentColours.fit(
            lambda x: vae.encode(x.to(vae.dtype)).latent_dist.mean * vae.config.scaling_factor, self.device
        )

    def draw(self, r: Parameters, seed: int, inputs: Inputs) -> Program:
        assert inputs.image is not None, "upscaling takes a picture"
        small = inputs.image.convert("RGB").resize((r.width // 4, r.height // 4), Image.Resampling.BOX)
        output = yield from self.run(
            "whole",
            self.counting(r.num_inference_steps),
            prompt=r.prompt,
            negative_prompt=r.negative_prompt or None,
            image=small,
            noise_level=self.NOISE_LEVEL,
            num_inference_steps=r.num_inference_steps,
            guidance_scale=r.guidance_scale,
            generator=generator(seed),
            output_type="np",
        )
        return picture(output.images)


class Amused(Stages):
    """aMUSEd, after MUSE: tokens of a picture, all masked, of which each step settles the surest."""

    def __init__(self, card: ModelCard, pipeline: Any, parts: Mapping[str, Any]):
        super().__init__(card, {"whole": pipeline}, {"whole.transformer": "base"}, "whole.vqvae.decode")

    def draw(self, r: Parameters, seed: int, inputs: Inputs) -> Program:
        output = yield from self.run(
            "whole",
            self.counting(r.num_inference_steps),
            prompt=r.prompt,
            negative_prompt=r.negative_prompt or None,
            num_inference_steps=r.num_inference_steps,
            guidance_scale=r.guidance_scale,
            width=r.width,
            height=r.height,
            generator=generator(seed),
            output_type="np",
        )
        return picture(output.images)


def picture(images: np.ndarray) -> Tensor:
    """The first of [n, height, width, 3], as what a program returns."""
    return torch.from_numpy(images[0]).permute(2, 0, 1).float().contiguous()
