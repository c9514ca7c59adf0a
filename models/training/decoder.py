"""Trains the decoder of emoji-unclip: emoji-sd's denoiser, told a picture's CLIP embedding instead of a prompt.

    python -m models.training.decoder WORK OUT --minutes 25

Only the projection of the embedding to tokens is trained; the denoiser stays emoji-sd's own, and is not shipped twice.
"""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from models.catalog import WEIGHTS
from models.training.encode import Encoders, read
from models.training.running import Run, alphas_of, in_half, options
from models.unclip import ImageProjection, of_variance_one

BATCH = 24
LEARNING_RATE = 1e-3
SURE = 5.0  # the loss weighs timesteps by min(1, SURE / (SNR + 1)): Hang et al. 2023, for v-prediction
HEAD_START = 1500  # steps of learning what the text encoder says of the caption, which cost next to nothing


def head_start(model: ImageProjection, image: Tensor, contexts: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(HEAD_START):
        rows = torch.randint(len(contexts), (256,))
        loss = (model(image[rows]) - contexts[rows].float()).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 250 == 0:
            print(f"head start · step {step} · loss {float(loss):.4f}", flush=True)


@torch.no_grad()
def contexts_of(tokens: Tensor) -> Tensor:
    """[rows, tokens, width] in half precision: what emoji-sd's denoiser is told for these captions"""
    encoder = CLIPTextModel.from_pretrained(WEIGHTS / "emoji-sd" / "text_encoder", dtype=torch.float32).eval()
    return torch.cat([encoder(input_ids=some.int())[0].half() for some in tokens.split(250)])


def moving(z: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noised latents, their timesteps (stratified), their velocities, and what the loss weighs at each, [rows]."""
    rows = len(z)
    timestep = ((torch.arange(rows) + torch.rand(rows)) / rows * 1000).long().clamp(max=999)
    alpha_bar = alphas_cumprod[timestep].view(-1, 1, 1, 1)
    noise = torch.randn_like(z)
    noised = alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * noise
    velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * z
    snr = (alpha_bar / (1 - alpha_bar)).view(-1)
    return noised, timestep, velocity, (SURE / (snr + 1)).clamp(max=1.0)


def main() -> None:
    given = options(__doc__)
    latents, image, tokens = read(given.work, "latents", "image", "tokens")
    image = of_variance_one(image.float())
    folder = WEIGHTS / "emoji-sd"
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).requires_grad_(False)
    unet.to(given.device)
    alphas_cumprod = alphas_of("emoji-sd/scheduler")
    model = ImageProjection()
    nothing = contexts_of(Encoders().tokens([""]))[0]
    model.nothing.data.copy_(nothing.float())
    model.nothing.requires_grad_(False)  # what emoji-sd was trained with, too
    if not (given.work / "decoder.state.pt").exists():
        head_start(model, image[:8000], contexts_of(tokens[:8000]))
    run = Run("decoder", model, LEARNING_RATE, given)
    for rows in run.batches(len(latents), BATCH):
        noised, timestep, velocity, weight = moving(latents[rows].float(), alphas_cumprod)
        with in_half():
            told = model(image[rows])
            guess = unet(noised, timestep, encoder_hidden_states=told, return_dict=False)[0]
        error = (guess.float() - velocity).square().mean((1, 2, 3))
        run.step((error * weight).mean(), unweighted=error.detach().mean())
    run.save(given.out)


if __name__ == "__main__":
    main()
