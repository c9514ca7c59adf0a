"""What lets a denoiser listen to another text encoder than the one it grew up with."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class Ear(ModelMixin, ConfigMixin):
    """Learned queries, one for each token that the denoiser is told, look for theirs among the words heard."""

    @register_to_config
    def __init__(
        self,
        hears: int = 384,
        tells: int = 256,
        tokens: int = 32,
        layers: int = 3,
        heads: int = 4,
        intermediate_size: int = 1024,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.words = nn.Linear(hears, tells)
        self.places = nn.Parameter(torch.randn(tokens, tells) * 0.02)
        self.queries = nn.Parameter(torch.randn(tokens, tells) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(
                tells, heads, intermediate_size, dropout, nn.functional.gelu, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(tells)
        self.out = nn.Linear(tells, tells)

    def forward(self, words: Tensor) -> Tensor:
        """[rows, tokens, hears], zeros where there is no word, to [rows, tokens, tells]."""
        absent = (words == 0).all(-1)
        absent[:, 0] = False  # in a row that is nobody's there is none at all
        heard = self.words(words) + self.places[: words.shape[1]]
        told = self.queries.expand(len(words), -1, -1)
        for layer in self.blocks:
            told = layer(told, heard, memory_key_padding_mask=absent)
        return self.out(self.norm(told))
