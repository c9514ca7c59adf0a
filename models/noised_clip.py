"""Noise-aware CLIP: what a half-denoised picture will agree with. GLIDE (Nichol et al. 2021), section 2.4.

An image encoder that is shown noised latents and their timestep, in the space of an ordinary CLIP's captions. Its
gradient steers sampling towards a caption (CLIP guidance) or, over the captions of some classes, towards one of them
(classifier guidance); the ordinary encoder's would point at what only looks right to it.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel


class NoisedCLIP(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(
        self,
        channels: int = 8,
        size: int = 16,
        patch_size: int = 2,
        width: int = 256,
        layers: int = 6,
        heads: int = 4,
        intermediate_size: int = 768,
        projection_dim: int = 256,
    ):
        super().__init__()
        self.size = size
        self.vision = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=intermediate_size,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_channels=channels,
                image_size=size,
                patch_size=patch_size,
            )
        )
        self.frequencies = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(width, width)
        self.projection = nn.Linear(width, projection_dim, bias=False)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """What the finished picture is likely to be.

        Args:
            sample: [rows, C, h, w] variance-preserving noised latents; timestep: [rows].
        Returns:
            [rows, projection_dim]: its product with a caption's embedding of length one is the log likelihood of
            the caption, up to a constant. The noisier the sample, the shorter, for the less can be said.
        """
        time = self.time(self.frequencies(timestep).to(sample.dtype))
        hidden = self.vision.embeddings(sample, interpolate_pos_encoding=sample.shape[-1] != self.size)
        hidden = self.vision.pre_layrnorm(hidden + time[:, None])
        hidden = self.vision.encoder(inputs_embeds=hidden).last_hidden_state[:, 0]
        return self.projection(self.vision.post_layernorm(hidden)) * self.scale.exp()
