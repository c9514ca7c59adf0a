"""A transformer that writes a picture as a sequence of codes, in raster order, having been told words."""

from math import isqrt
from typing import Any, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Layer(nn.Module):
    """Pre-norm attention to what was written before, to the words by themselves if there is a `context_width`, and
    two linear layers."""

    def __init__(self, width: int, heads: int, intermediate_size: int, context_width: int | None):
        super().__init__()
        self.heads, self.crosses = heads, context_width is not None
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        if context_width is not None:
            self.asks, self.query = nn.LayerNorm(width), nn.Linear(width, width)
            self.context, self.told = nn.Linear(context_width, 2 * width), nn.Linear(width, width)
        self.last = nn.LayerNorm(width)
        self.widen, self.narrow = nn.Linear(width, intermediate_size), nn.Linear(intermediate_size, width)

    def forward(self, hidden: Tensor, past: list[Tensor], words: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Args:
            hidden: [rows, n, width]; past, words: keys and values, [rows, 2, heads, m, head width].
            mask: [rows or 1, 1, n, m of the past + n], true where there is something to attend to.
        Returns:
            the next hidden states, and the keys and values of these n, [rows, 2, heads, n, head width].
        """
        query, *own = self.split(self.qkv(self.norm(hidden)))
        fresh = torch.stack(own, 1)
        keys, values = torch.cat([*past, fresh], 3).unbind(1)
        hidden = hidden + self.out(joined(scaled_dot_product_attention(query, keys, values, mask)))
        if self.crosses and words is not None:
            (query,) = self.split(self.query(self.asks(hidden)))
            keys, values = words.unbind(1)
            hidden = hidden + self.told(joined(scaled_dot_product_attention(query, keys, values)))
        return hidden + self.narrow(nn.functional.gelu(self.widen(self.last(hidden)))), fresh

    def listen(self, context: Tensor) -> Tensor:
        """[rows, m, context_width] to keys and values, [rows, 2, heads, m, head width]"""
        return torch.stack(self.split(self.context(context)), 1)

    def split(self, x: Tensor) -> list[Tensor]:
        """[rows, n, k · width] to k of [rows, heads, n, head width]"""
        width = self.out.in_features
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in x.split(width, -1)]


class TokenTransformer(ModelMixin, ConfigMixin):
    """Decoder-only where it has a `vocabulary`: words and codes are one sequence, as in DALL·E (Ramesh et al. 2021).
    With a `context_width` it is the decoder to somebody else's text encoder, as in Parti (Yu et al. 2022)."""

    @register_to_config
    def __init__(
        self,
        vocabulary: int | None = None,
        context_width: int | None = None,
        words: int = 32,
        codes: int = 1024,
        length: int = 256,
        width: int = 256,
        layers: int = 6,
        heads: int = 4,
        intermediate_size: int = 768,
    ):
        super().__init__()
        self.side, self.cache_shape = isqrt(length), (layers, 2, heads, length, width // heads)
        self.word: Any = None
        if vocabulary is not None:
            self.word, self.word_places = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(words, width))
        self.code = nn.Embedding(codes + 1, width)  # the last one begins
        self.down, self.across = nn.Embedding(self.side, width), nn.Embedding(self.side, width)
        self.blocks = nn.ModuleList(Layer(width, heads, intermediate_size, context_width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, codes)

    def hear(self, told: Tensor) -> Tensor:
        """What every code is told of the words: keys and values, [rows, layers, 2, heads, words, head width].

        Args:
            told: [rows, words] numbers of words or, of a text encoder, its states [rows, words, context_width].
        """
        if self.word is None:
            return torch.stack([cast(Layer, layer).listen(told) for layer in self.blocks], 1)
        hidden: Tensor = self.word(told) + self.word_places
        heard = list[Tensor]()
        mask = causal(told.shape[1], told.device)
        for layer in self.blocks:
            hidden, fresh = layer(hidden, [], None, mask)
            heard.append(fresh)
        return torch.stack(heard, 1)

    def forward(
        self, codes: Tensor, places: Tensor, words: Tensor, cache: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What may follow each of n codes.

        Args:
            codes: [rows, n], each the one before its place; places: [rows, n], in order and without a gap.
            words: as `hear` returns them.
            cache: [rows, layers, 2, heads, length, head width] of what was written before; what it holds from the first
                place on does not matter. None: the places begin at 0.
        Returns:
            logits [rows, n, codes]; keys and values of these n, [rows, layers, 2, heads, n, head width].
        """
        hidden = self.code(codes) + self.down(places // self.side) + self.across(places % self.side)
        seen = causal(codes.shape[1], codes.device).expand(len(codes), -1, -1, -1)
        if cache is not None:
            before = torch.arange(cache.shape[4], device=codes.device) < places[:, :1]
            seen = torch.cat([before[:, None, None].expand(-1, -1, codes.shape[1], -1), seen], -1)
        if self.word is not None:
            seen = torch.nn.functional.pad(seen, (words.shape[4], 0), value=True)
        fresh = list[Tensor]()
        for i, layer in enumerate(self.blocks):
            past = [] if self.word is None else [words[:, i]]
            past += [] if cache is None else [cache[:, i]]
            hidden, own = layer(hidden, past, words[:, i], seen)
            fresh.append(own)
        return self.head(self.norm(hidden)), torch.stack(fresh, 1)


def causal(n: int, device: torch.device) -> Tensor:
    """[1, 1, n, n]: each sees itself and those before it."""
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()[None, None]


def joined(x: Tensor) -> Tensor:
    """[rows, heads, n, head width] to [rows, n, width]"""
    return x.transpose(1, 2).flatten(2)
