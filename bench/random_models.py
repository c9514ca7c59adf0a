"""Stable Diffusion 1.5 and XL with random weights, in diffusers' layout with a card: speed does not depend on weights.

    python -m bench.random_models FOLDER sd15-random sdxl-random [--device cuda] [--tiny]

Configurations as published; the tokenizer is emoji-sd's, whose ids the text encoders know as well as any.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from models.catalog import WEIGHTS

SD15_UNET = {
    "sample_size": 64,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL_UNET = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}

# `--tiny`: the same shapes of things, for trying the benchmark itself on a CPU
TINY_UNET = {"sample_size": 8, "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32, "layers_per_block": 1}
TINY_XL = {
    "sample_size": 8,
    "block_out_channels": (32, 64, 64),
    "cross_attention_dim": 64,
    "attention_head_dim": (2, 4, 4),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}
TINY_VAE = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
TINY_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}

CARD = """name = "{name}"
title = "{name}"
description = "Random weights, to measure with."
family = "{family}"
licence = "none"
licence_url = "https://example.org"
tasks = ["text-to-image"]
schedulers = ["euler"]
memory_mib = {mib}
max_rows = {rows}

[source]
kind = "folder"
path = "{folder}"

[dtype]
cuda = "bfloat16"

[size]
width = {size}
height = {size}
minimum = 32
maximum = 2048
multiple_of = 8

[limits]
n = 4
num_inference_steps = 100
guidance_scale = 20.0
prompt_tokens = 77

[defaults]
num_inference_steps = 20
guidance_scale = 5.0
scheduler = "euler"
strength = 0.75
"""


def made(kind: Any, config: Any, device: str, dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return (kind(config) if isinstance(config, CLIPTextConfig) else kind(**config)).to(device, dtype)
    finally:
        torch.set_default_dtype(before)


def pipeline(name: str, device: str, dtype: torch.dtype, tiny: bool) -> Any:
    xl = name.startswith("sdxl")
    unet = (SDXL_UNET if xl else SD15_UNET) | ((TINY_XL if xl else TINY_UNET) if tiny else {})
    vae = VAE | {"scaling_factor": 0.13025 if xl else 0.18215} | (TINY_VAE if tiny else {})
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "emoji-sd" / "tokenizer", model_max_length=77)
    first, second = (CLIPTextConfig(**({**clip, **TINY_CLIP} if tiny else clip)) for clip in (CLIP_L, CLIP_G))
    second.projection_dim = second.hidden_size
    shared = {
        "unet": made(UNet2DConditionModel, unet, device, dtype),
        "vae": made(AutoencoderKL, vae, device, dtype),
        "text_encoder": made(CLIPTextModel, first, device, dtype),
        "tokenizer": tokenizer,
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    }
    if not xl:
        return StableDiffusionPipeline(
            **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    text = made(CLIPTextModelWithProjection, second, device, dtype)
    return StableDiffusionXLPipeline(**shared, text_encoder_2=text, tokenizer_2=tokenizer, add_watermarker=False)


def write(folder: Path, name: str, device: str, tiny: bool) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    xl, place = name.startswith("sdxl"), (folder / name).absolute()
    pipeline(name, device, dtype, tiny).save_pretrained(place)
    card = CARD.format(
        name=name,
        family="diffusers" if xl else "stable-diffusion",
        mib=9000 if xl else 3000,
        rows=8 if xl else 32,
        folder=place,
        size=64 if tiny else (1024 if xl else 512),
    )
    (folder / f"{name}.toml").write_text(card)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for one in given.names:
        write(given.folder, one, given.device, given.tiny)
