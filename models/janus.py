"""Janus (Chen et al. 2025): a language model that writes pictures as well, in the codes of its own autoencoder.

The networks are those of transformers; the sequence is Janus's own. Here a prompt of any length shares passes with
others, so that what is no word is told from what is: by zeros among the keys.
"""

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from app.schemas import Parameters
from models.autoregressive import Autoregressive
from models.catalog import ModelCard
from models.guided import unseen
from models.preview import LatentColours
from models.program import Call
from models.token_transformer import causal

ASKED, ANSWERED = "<|User|>: {}", "\n\n<|Assistant|>:"
NO_WORD = -1


class JanusWriter:
    """What `TokenTransformer` is to our own models."""

    def __init__(self, whole: Any):
        self.model, self.language = whole.model, whole.model.language_model
        self.embed = whole.prepare_embeddings_for_image_generation
        self.device, self.dtype = whole.device, whole.dtype
        self.begin: int = whole.generation_config.generation_kwargs["boi_token_id"]
        config = self.language.config
        length = self.model.vision_model.config.num_image_tokens
        self.cache_shape = (config.num_hidden_layers, 2, config.num_key_value_heads, length, config.head_dim)

    def hear(self, told: Tensor) -> Tensor:
        """[rows, words] with `NO_WORD` at the end to keys and values [rows, layers, 2, heads, words, head width]."""
        there, words = told != NO_WORD, told.shape[1]
        places = torch.arange(words, device=self.device).expand(len(told), -1)
        seen = causal(words, self.device) & there[:, None, None]
        hidden = self.language.get_input_embeddings()(told.clamp(min=0))
        return self.run(hidden, places, seen, None)[1] * there[:, None, None, None, :, None]

    def __call__(self, codes: Tensor, places: Tensor, words: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """As `TokenTransformer.forward`, for one code of each row."""
        there = (words[:, 0, 0] != 0).any(1).any(-1)  # [rows, words]
        begin = self.language.get_input_embeddings()(torch.tensor(self.begin, device=self.device))
        last = self.model.generation_embeddings.num_embeddings - 1
        hidden = torch.where(places[..., None] == 0, begin, self.embed(codes.clamp(max=last)))
        before = torch.arange(cache.shape[4], device=self.device) < places
        seen = torch.cat([there, before, torch.ones_like(places, dtype=torch.bool)], 1)[:, None, None]
        spoken = there.sum(1, keepdim=True)
        hidden, fresh = self.run(hidden, spoken + places, seen, torch.cat([words, cache], 4))
        return self.model.generation_head(hidden), fresh

    def run(self, hidden: Tensor, places: Tensor, seen: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Args:
            hidden: [rows, n, width]; places: [rows, n]; seen: [rows, 1, n, m + n].
            past: [rows, layers, 2, heads, m, head width]
        Returns:
            the last hidden states, and keys and values of these n.
        """
        cache: Any = DynamicCache()
        for i, layer in enumerate(past.unbind(1) if past is not None else ()):
            cache.update(layer[:, 0], layer[:, 1], i)
        output = self.language(
            inputs_embeds=hidden,
            attention_mask=torch.zeros_like(seen, dtype=self.dtype).masked_fill(~seen, torch.finfo(self.dtype).min),
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        )
        n = hidden.shape[1]
        fresh = [torch.stack([layer.keys[:, :, -n:], layer.values[:, :, -n:]], 1) for layer in cache.layers]
        return output.last_hidden_state, torch.stack(fresh, 1)


class Janus(Autoregressive):
    def __init__(self, card: ModelCard, pipeline: Any, parts: Mapping[str, Any]):
        whole = parts["janus"]
        super().__init__(card, pipeline, {**parts, "writer": JanusWriter(whole), "vq": whole.model.vqmodel})
        self.length = card.limits.prompt_tokens
        self.pad, self.bos = whole.generation_config.pad_token_id, whole.generation_config.bos_token_id

    def decode(self, *, codes: Tensor) -> Tensor:
        return (self.vq.decode(codes).float() / 2 + 0.5).clamp(0, 1)

    def fit_colours(self) -> LatentColours:
        size = self.card.size.width
        return LatentColours.fit(
            lambda x: self.latents(self.vq.encode(x.to(self.dtype)).image_tokens.view(len(x), -1)), self.device, size
        )

    def conditioning(self, r: Parameters) -> Generator[Call, Any, Tensor]:
        """Without a negative prompt, guidance steers away from as many words of nothing."""
        told = self.tokens([r.prompt])
        if r.guidance_scale > 1:
            nothing = torch.where((told == NO_WORD) | (told == self.bos), told, self.pad)
            told = torch.cat([self.tokens([r.negative_prompt]) if r.negative_prompt else nothing, told])
        return (yield Call(self.text_encoder, {"input_ids": told}, len(told)))

    def tokens(self, texts: list[str]) -> Tensor:
        """[texts, tokens]: what is asked, as Janus was taught to be asked, and `NO_WORD` after it."""
        answered = self.tokenizer(ANSWERED, add_special_tokens=False).input_ids
        rows = list[list[int]]()
        for text in texts:
            ids = self.tokenizer(ASKED.format(text) + ANSWERED).input_ids
            rows.append(ids if len(ids) <= self.length else ids[: self.length - len(answered)] + answered)
        return torch.tensor([ids + [NO_WORD] * (self.length - len(ids)) for ids in rows])

    def warnings(self, r: Parameters) -> list[str]:
        around = len(self.tokenizer(ASKED.format("") + ANSWERED, add_special_tokens=False).input_ids)
        return unseen(r, self.tokenizer, self.length - around)
