"""Pictures as a language: a transformer writes codes one after another, an autoencoder shows what they mean.

DALL·E (Ramesh et al. 2021) reads the words itself, and CLIP chooses among several candidates; Parti (Yu et al. 2022)
leaves the reading to a text encoder, and guides the codes' logits. What was written before is kept as keys and values,
in the program as everything else: its rows come and go between any two codes, and a picture taken over goes on there.
"""

from collections.abc import Generator, Mapping
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from app.schemas import Parameters
from models import guidance
from models.catalog import ModelCard
from models.guided import ALONE, UNCONDITIONAL_THEN_CONDITIONAL, Guided, modules_of
from models.preview import LatentColours
from models.program import Call, Inputs, Net, Program, generator


class Autoregressive(Guided):
    def __init__(self, card: ModelCard, pipeline: Any, parts: Mapping[str, Any]):
        self.writer, self.vq = parts["writer"], parts["vq"]
        super().__init__(card, parts["tokenizer"], self.writer, parts)
        assert card.sampling is not None, "a card of this family says how codes are chosen"
        self.sampling = card.sampling
        self.modules = modules_of(parts.values())
        self.codebook = self.vq.quantize.embedding.weight.float()
        self.places: int = self.writer.cache_shape[3]  # for codes, in a picture
        self.denoiser = Net(
            "write",
            self.write,
            buckets=self.buckets,
            width=max(self.buckets),
            reproducible_rows=card.reproducible_rows,
            recordable=True,
            journaled=True,
        )
        self.decoder = Net("decode", self.decode, buckets=(1, 2, 4, 8), width=8, recordable=True)
        self.colours = self.fit_colours()

    # -- the nets

    def encode_text(self, *, input_ids: Tensor) -> Tensor:
        """[rows, tokens] to what the writer is told, see `TokenTransformer.hear`."""
        ids = input_ids.to(self.device)
        return self.writer.hear(self.parts["text_encoder"](ids)[0] if "text_encoder" in self.parts else ids)

    def write(
        self,
        *,
        code: Tensor,
        place: Tensor,
        words: Tensor,
        cache: Tensor,
        noise: Tensor,
        temperature: Tensor,
        top_p: Tensor,
        guidance_scale: Tensor,
        unconditional: Tensor,
        conditional: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The next code of each row, and its keys and values.

        Args:
            code, place: [rows] the code before, and where the next one goes; words, cache: see `TokenTransformer`.
            noise: [rows, codes] Gumbel's; temperature, top_p, guidance_scale, unconditional, conditional: [rows].
        Returns:
            codes [rows], the same for all rows of a picture; [rows, layers, 2, heads, 1, head width].
        """
        logits, fresh = self.writer(code[:, None], place[:, None], words, cache)
        guided = guidance.classifier_free(logits[:, 0].float(), guidance_scale, unconditional, conditional)
        return chosen(guided, noise, temperature, top_p), fresh

    def decode(self, *, codes: Tensor) -> Tensor:
        """[rows, length] to pictures [rows, 3, H, W] float32 in [0, 1]."""
        latents = self.latents(codes).to(self.dtype)
        return (self.vq.decode(latents, force_not_quantize=True).sample.float() / 2 + 0.5).clamp(0, 1)

    def latents(self, codes: Tensor) -> Tensor:
        """[rows, length] to [rows, C, h, w] float32"""
        return self.codebook[codes].unflatten(1, (isqrt(self.places), -1)).permute(0, 3, 1, 2)

    def fit_colours(self) -> LatentColours:
        return LatentColours.fit(lambda x: self.vq.encode(x.to(self.dtype)).latents, self.device)

    # -- the program

    def draw(self, r: Parameters, seed: int, inputs: Inputs) -> Program:
        words = yield from self.conditioning(r)
        unconditional, conditional = UNCONDITIONAL_THEN_CONDITIONAL if len(words) == 2 else ALONE
        rows, each = r.best_of * len(words), len(words)
        told = {
            "words": words.repeat(r.best_of, *[1] * (words.ndim - 1)),
            "temperature": torch.tensor(self.sampling.temperature, device=self.device),
            "top_p": torch.tensor(self.sampling.top_p, device=self.device),
            "guidance_scale": torch.tensor(r.guidance_scale if each == 2 else 1.0, device=self.device),
            "unconditional": unconditional.repeat(r.best_of).to(self.device),
            "conditional": conditional.repeat(r.best_of).to(self.device),
        }
        rng, size = generator(seed), len(self.codebook)
        cache = torch.zeros(rows, *self.writer.cache_shape, dtype=self.dtype, device=self.device)
        codes = torch.zeros(r.best_of, self.places, dtype=torch.long, device=self.device)
        code, estimate = torch.full((rows,), size, device=self.device), None
        for i in range(r.num_inference_steps):
            noise = gumbel((r.best_of, size), rng).to(self.device).repeat_interleave(each, 0)
            place = torch.full((rows,), i, device=self.device)
            args = told | {"code": code, "place": place, "cache": cache, "noise": noise}
            code, fresh = yield Call(self.denoiser, args, rows, (i, r.num_inference_steps), estimate)
            cache[:, :, :, :, i], codes[:, i] = fresh[:, :, :, :, 0], code[::each]
            estimate = partial(self.latents, codes[:1].clone())
        pictures = yield Call(self.decoder, {"codes": codes}, r.best_of)
        if r.best_of > 1:
            pictures = pictures[(yield from self.likeness(r, pictures)).argmax()][None]
        return pictures[0]

    def likeness(self, r: Parameters, pictures: Tensor) -> Generator[Call, Any, Tensor]:
        """[candidates] how well each agrees with the prompt, by CLIP: Ramesh et al. 2021, section 2.6."""
        caption = yield Call(self.caption_encoder, {"input_ids": self.tokens([r.prompt])}, 1)
        seen = yield Call(self.picture_encoder, {"pixels": pictures * 2 - 1}, len(pictures))
        return guidance.clip(seen, caption)


def gumbel(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Noise whose addition to logits makes their largest a sample of them."""
    return -(-torch.rand(shape, generator=rng).clamp(1e-20, 1 - 1e-7).log()).log()


def chosen(logits: Tensor, noise: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """[rows] sampled from the likeliest codes that make up `top_p` of each row: Holtzman et al. 2020.

    Args:
        logits, noise: [rows, codes]; temperature, top_p: [rows].
    """
    logits = logits / guidance.over(temperature, logits)
    likely, order = logits.softmax(-1).sort(-1, descending=True)
    within = likely.cumsum(-1) - likely < guidance.over(top_p, likely)
    kept = torch.zeros_like(within).scatter(-1, order, within)
    return (logits + noise).masked_fill(~kept, -torch.inf).argmax(-1)
