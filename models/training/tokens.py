"""Trains the transformers of emoji-dalle and emoji-parti: the codes of a picture, one after another, given its caption.

    python -m models.training.tokens WORK OUT --model parti --vq VQ --minutes 60

`VQ` is the folder of the trained `models.training.vq`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.token_transformer import TokenTransformer
from models.training.encode import Encoders, read
from models.training.running import Run, in_half, options
from models.training.vq import nearest

BATCH = 16
LEARNING_RATE = 1e-3
DROPPED = 0.1  # captions, for classifier-free guidance
SIZES: dict[str, dict[str, Any]] = {
    "dalle": {"vocabulary": 4096, "layers": 8},
    "parti": {"context_width": 256, "layers": 6},
}


def begin(kind: str, codebook: Tensor) -> TokenTransformer:
    """Codes that look alike begin alike."""
    model: Any = TokenTransformer(codes=len(codebook), **SIZES[kind])
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    for layer in model.blocks:
        for last in (layer.out, layer.narrow):
            torch.nn.init.normal_(last.weight, std=0.02 / (2 * len(model.blocks)) ** 0.5)
    like = codebook / codebook.std(0) @ torch.randn(codebook.shape[1], model.config.width) * 0.02
    with torch.no_grad():
        model.code.weight[:-1] += like
        model.head.weight += like
    return model


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", choices=list(SIZES), required=True)
    parser.add_argument("--vq", type=Path, required=True)
    given = options(__doc__, parser)
    vq: Any = VQModel.from_pretrained(given.vq, torch_dtype=torch.float32)
    codebook = vq.quantize.embedding.weight.detach().to(given.device)
    latents, told = read(given.work, "latents", "tokens" if given.model == "dalle" else "context")
    codes = torch.cat([nearest(some.float(), codebook).flatten(1) for some in latents.split(500)]).short()
    del latents
    encoders = Encoders()
    nothing = encoders.tokens([""])[0] if given.model == "dalle" else encoders.context([""])[0]
    begins = torch.full((BATCH, 1), len(codebook))
    places = torch.arange(codes.shape[1]).expand(BATCH, -1)
    run = Run(given.model, model := begin(given.model, codebook).train(), LEARNING_RATE, given, decay=0.999)
    for rows in run.batches(len(codes), BATCH):
        wanted = codes[rows].long()
        kept = (torch.rand(BATCH) > DROPPED).view(-1, *[1] * (told.ndim - 1))
        words = torch.where(kept, told[rows].to(nothing.dtype), nothing)
        with in_half():
            logits, _ = model(torch.cat([begins, wanted[:, :-1]], 1), places, model.hear(words))
        run.step(cross_entropy(logits.float().flatten(0, 1), wanted.flatten()))
    run.save(given.out)


if __name__ == "__main__":
    main()
