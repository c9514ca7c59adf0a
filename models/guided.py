"""What programs of guided diffusion have in common: prompts as tokens, guidance's rows, and steering by CLIP."""

from collections.abc import Generator, Iterable, Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

from app.schemas import Parameters
from models import guidance
from models.catalog import ModelCard
from models.program import BUCKETS, Call, Net
from models.sampling import Steering, Told
from models.weighting import fragments, words

UNCONDITIONAL_THEN_CONDITIONAL = (torch.tensor([0, -1]), torch.tensor([1, 0]))  # where each row finds its pair
ALONE = (torch.tensor([0]), torch.tensor([0]))


class Guided:
    """The part of a resident model that guides. Read-only to requests."""

    def __init__(self, card: ModelCard, tokenizer: Any, denoiser: Any, parts: Mapping[str, Any]):
        self.card, self.tokenizer, self.parts = card, tokenizer, parts
        self.length = tokenizer.model_max_length
        self.device, self.dtype = denoiser.device, denoiser.dtype
        self.buckets = tuple(bucket for bucket in BUCKETS if bucket <= card.max_rows)
        self.text_encoder = Net("encode_text", self.encode_text, width=32)
        if "clip" in parts:
            self.caption_encoder = Net("encode_caption", self.encode_caption, width=32)
            self.picture_encoder = Net("encode_picture", self.encode_picture, width=8)
        if "noised_clip" in parts:
            self.steering = Net("steer", self.steer, buckets=self.buckets, width=16, journaled=True)

    # -- the nets: rows in, rows out

    def encode_text(self, *, input_ids: Tensor) -> Tensor:
        """[rows, tokens] to what the denoiser is told, [rows, tokens, width]."""
        raise NotImplementedError

    def encode_caption(self, *, input_ids: Tensor) -> Tensor:
        """[rows, tokens] to embeddings of length one, [rows, width], as CLIP has them."""
        features = self.parts["clip"].get_text_features(input_ids=input_ids.to(self.device)).pooler_output
        return torch.nn.functional.normalize(features.float(), dim=-1)

    def encode_picture(self, *, pixels: Tensor) -> Tensor:
        """[rows, 3, H, W] in [-1, 1] to embeddings of length one, [rows, width], as CLIP has them."""
        size = self.parts["clip"].config.vision_config.image_size
        seen = torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        features = self.parts["clip"].get_image_features(pixel_values=seen.to(self.device, self.dtype)).pooler_output
        return torch.nn.functional.normalize(features.float(), dim=-1)

    def steer(self, *, sample: Tensor, timestep: Tensor, caption: Tensor) -> Tensor:
        """[rows, C, h, w]: where each sample agrees better with its caption, see `guidance.clip`."""
        return guidance.gradient(lambda x: guidance.clip(self.foreseen(x, timestep), caption), sample)

    def foreseen(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """[rows, width] float32: what the noise-aware CLIP says of half-denoised samples."""
        return self.parts["noised_clip"](sample.to(self.dtype), timestep).float()

    # -- what programs do with them

    def told(self, r: Parameters, calls: int, context: Tensor, **rows: Tensor) -> Told:
        """What the denoiser is told at each of so many calls: guidance's two rows, or one.

        Args:
            context: [rows, tokens, width], the unconditional row first if there is one; rows: [1, …], told to each.
        """

        def arguments(context: Tensor) -> tuple[int, dict[str, Tensor]]:
            count = len(context)
            unconditional, conditional = UNCONDITIONAL_THEN_CONDITIONAL if count == 2 else ALONE
            scale = torch.tensor(r.guidance_scale if count == 2 else 1.0, device=self.device)
            if count == 2 and reused:  # the second row says what it would be without
                scale = torch.stack([scale, torch.ones_like(scale)])
            found = {
                "context": context,
                "guidance_scale": scale,
                "unconditional": unconditional.to(self.device),
                "conditional": conditional.to(self.device),
            }
            found |= {name: row.expand(count, *[-1] * (row.ndim - 1)) for name, row in rows.items()}
            if r.guidance.rescale:
                found["rescale"] = torch.tensor(r.guidance.rescale, device=self.device)
            return count, found

        reused = self.reused(r, calls, context)
        guided, alone = arguments(context), arguments(context[-1:])
        return lambda i: guided if guidance.in_interval(r.guidance.interval, i, calls) and i not in reused else alone

    def reused(self, r: Parameters, calls: int, context: Tensor) -> frozenset[int]:
        """The calls that do with what guidance added before."""
        return guidance.reused(r.guidance.interval, r.guidance.every, calls) if len(context) == 2 else frozenset()

    def steered_by(self, r: Parameters) -> Generator[Call, Any, Steering | None]:
        if not r.guidance.clip:
            return None
        caption = yield Call(self.caption_encoder, {"input_ids": self.tokens([plainly(r).prompt])}, 1)
        return Steering(self.steering, {"caption": caption}, r.guidance.clip)

    def conditioning(self, r: Parameters) -> Generator[Call, Any, Tensor]:
        """What the denoiser is told: [rows, tokens, width], the unconditional row first if there is one."""
        texts = [r.negative_prompt, r.prompt] if self.guides(r) else [r.prompt]
        ids, weights = self.weighed(texts) if r.prompt_weights else (self.tokens(texts), None)
        states = yield Call(self.dressed(self.text_encoder, r), {"input_ids": ids}, len(texts))
        return states if weights is None else guidance.weighted(states, weights.to(self.device))

    def guides(self, r: Parameters) -> bool:
        """Whether a sample has a second row, to be guided away from."""
        return r.guidance_scale > 1

    def dressed(self, net: Net, r: Parameters) -> Net:
        """The net with the adapters that the request asks for; a family without them has no other."""
        return net

    # -- what programs start from

    def tokens(self, texts: list[str]) -> Tensor:
        """[texts, tokens]"""
        return self.tokenizer(
            texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids

    def weighed(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """[prompts, tokens], and what each of these weighs: see `models.weighting`."""
        taken_apart = [fragments(prompt) for prompt in prompts]
        found = self.tokenizer(
            [[fragment.text for fragment in some] for some in taken_apart],
            is_split_into_words=True,
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        )
        weights = [
            [1.0 if i is None else some[i].weight for i in found.word_ids(row)] for row, some in enumerate(taken_apart)
        ]
        return found.input_ids, torch.tensor(weights)

    def warnings(self, r: Parameters) -> list[str]:
        """What of the prompts the text encoder will not see."""
        return unseen(plainly(r), self.tokenizer, self.length)

    def noise(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Drawn in the model's dtype, as the stock pipelines do, then float32."""
        return randn_tensor(shape, generator=rng, device=self.device, dtype=self.dtype).float()


def plainly(r: Parameters) -> Parameters:
    """The request, with nothing but words in its prompts."""
    if not r.prompt_weights:
        return r
    return r.model_copy(update={"prompt": words(r.prompt), "negative_prompt": words(r.negative_prompt)})


def skipped_steps(r: Parameters) -> int:
    """How many steps image-to-image leaves out: the stock pipelines' `get_timesteps`, but at least one is taken."""
    if r.strength is None:
        return 0
    return r.num_inference_steps - max(int(r.num_inference_steps * r.strength), 1)


def hole_of(mask: Image.Image) -> Tensor:
    """[1, 1, H, W] on the CPU: one where to repaint"""
    hole = torch.frombuffer(bytearray(mask.convert("L").tobytes()), dtype=torch.uint8)
    return (hole.view(1, 1, mask.height, mask.width) >= 128).float()


def unseen(r: Parameters, tokenizer: Any, length: int) -> list[str]:
    """A warning for each prompt that has no room in `length` tokens, of which some mark the start and the end."""
    room, warnings = length - tokenizer.num_special_tokens_to_add(), list[str]()
    for field in ("prompt", "negative_prompt"):
        ids = tokenizer(getattr(r, field), add_special_tokens=False, verbose=False).input_ids
        if len(ids) > room:
            lost = tokenizer.decode(ids[room:]).strip()
            warnings.append(f"{field} is cut after {room} tokens: {lost!r} is not seen")
    return warnings


def modules_of(components: Iterable[Any]) -> list[nn.Module]:
    return [component for component in components if isinstance(component, nn.Module)]
