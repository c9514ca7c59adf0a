"""Trains the noise-aware CLIP that steers emoji-sd or, of pixels instead of latents, emoji-glide.

    python -m models.training.noised_clip WORK OUT --minutes 25
    python -m models.training.noised_clip WORK OUT --pixels --minutes 25

It begins with emoji-clip's own layers, and learns to find a noised picture's caption among those of its batch. WORK has
the encoded scenes (models.training.encode) and the state it goes on from.
"""

import argparse
import math

import torch
from torch import Tensor

from models.noised_clip import NoisedCLIP
from models.training.base import small
from models.training.encode import Encoders, read
from models.training.running import Run, alphas_of, in_half, options

BATCH = 128
LEARNING_RATE = 4e-4
EXAMPLES = 600  # pictures from which the new eyes learn what the old ones saw


def begin(latents: Tensor) -> NoisedCLIP:
    """emoji-clip's image encoder; its new eyes see in patches of clean latents what the old ones saw in pixels."""
    encoders = Encoders()
    clip = encoders.clip
    model = NoisedCLIP()
    kept = {name: value for name, value in clip.vision_model.state_dict().items() if "patch_embedding" not in name}
    model.vision.load_state_dict(kept, strict=False)
    model.projection.load_state_dict(clip.visual_projection.state_dict())
    with torch.no_grad():
        pixels = torch.cat([encoders.decode(some.float()) for some in latents[:EXAMPLES].split(50)])
        wanted = clip.vision_model.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2).flatten(0, 1)
        patches = torch.nn.functional.unfold(latents[:EXAMPLES].float(), 2, stride=2).transpose(1, 2).flatten(0, 1)
        eyes = torch.linalg.lstsq(patches, wanted).solution.T
        model.vision.embeddings.patch_embedding.weight.copy_(eyes.view(-1, 8, 2, 2))
        seen = model(latents[:EXAMPLES].float(), torch.zeros(len(latents[:EXAMPLES])))
        model.scale.copy_(torch.log(clip.logit_scale.exp() / seen.norm(dim=-1).mean()))
    return model


def begin_with_pixels() -> NoisedCLIP:
    """emoji-clip's image encoder, which sees a small picture as it saw the large one."""
    clip = Encoders().clip
    model = NoisedCLIP(channels=3, size=64, patch_size=8)
    state = clip.vision_model.state_dict()
    eyes = "embeddings.patch_embedding.weight"
    state[eyes] = torch.nn.functional.avg_pool2d(state[eyes], 2) * 4
    model.vision.load_state_dict(state)
    model.projection.load_state_dict(clip.visual_projection.state_dict())
    with torch.no_grad():
        model.scale.copy_(clip.logit_scale - math.log(10))  # a first guess: its features are about so long
    return model


def noised(latents: Tensor, timestep: Tensor, alphas_cumprod: Tensor) -> Tensor:
    alpha_bar = alphas_cumprod[timestep].view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * torch.randn_like(latents)


def loss_of(model: NoisedCLIP, latents: Tensor, text: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """Contrastive, over the captions of the batch; and how often the right one comes first, at low and high noise."""
    timestep = torch.randint(len(alphas_cumprod), (len(latents),))
    with in_half():
        seen = model(noised(latents, timestep, alphas_cumprod), timestep)
    logits = seen.float() @ text.T
    found = (logits.argmax(1) == torch.arange(len(logits))).float()
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits))), found


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--pixels", action="store_true", help="the noise lies on pixels, not on latents")
    given = options(__doc__, parser)
    pictures, text = read(given.work, "pixels" if given.pixels else "latents", "text")
    alphas_cumprod = alphas_of("emoji-sd/scheduler")
    model = begin_with_pixels() if given.pixels else begin(pictures)
    run = Run("noised-clip-pixels" if given.pixels else "noised-clip", model, LEARNING_RATE, given)
    for rows in run.batches(len(pictures), BATCH):
        clean = small(pictures[rows]) if given.pixels else pictures[rows].float()
        loss, found = loss_of(model, clean, text[rows].float(), alphas_cumprod)
        run.step(loss, first=found.mean())
    run.save(given.out)


if __name__ == "__main__":
    main()
