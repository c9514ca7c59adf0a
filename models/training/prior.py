"""Trains the prior of emoji-unclip: the embedding of a picture, from the embedding of its caption.

python -m models.training.prior WORK OUT --minutes 5
"""

import torch
from diffusers import DDIMScheduler, PriorTransformer

from models.training.encode import read
from models.training.running import Run, in_half, options
from models.unclip import PRIOR_SCHEDULER, of_variance_one

BATCH = 512
LEARNING_RATE = 6e-4
DROPPED = 0.1  # captions, for classifier-free guidance
WIDTH = 256


def begin() -> PriorTransformer:
    model = PriorTransformer(
        num_attention_heads=4,
        attention_head_dim=96,
        num_layers=4,
        embedding_dim=WIDTH,
        num_embeddings=0,
        additional_embeddings=4,
        encoder_hid_proj_type=None,
    )
    model.clip_std.data.fill_(1.0)
    torch.nn.init.normal_(model.positional_embedding, std=0.02)
    assert model.prd_embedding is not None
    torch.nn.init.normal_(model.prd_embedding, std=0.02)
    return model


def main() -> None:
    given = options(__doc__)
    image, text = (of_variance_one(x.float()) for x in read(given.work, "image", "text"))
    alphas_cumprod = DDIMScheduler(**PRIOR_SCHEDULER).alphas_cumprod.to(given.device)
    run = Run("prior", model := begin(), LEARNING_RATE, given, decay=0.999)
    for rows in run.batches(len(image), BATCH):
        caption = text[rows] * (torch.rand(BATCH, 1) > DROPPED)
        timestep = torch.randint(1000, (BATCH,))
        alpha_bar = alphas_cumprod[timestep][:, None]
        noised = alpha_bar.sqrt() * image[rows] + (1 - alpha_bar).sqrt() * torch.randn(BATCH, WIDTH)
        with in_half():
            guess = model(noised, timestep, proj_embedding=caption).predicted_image_embedding
        run.step((guess.float() - image[rows]).square().mean())
    run.save(given.out)


if __name__ == "__main__":
    main()
