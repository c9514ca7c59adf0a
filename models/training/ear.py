"""Trains what lets emoji-imagen's denoiser listen to a language model: what emoji-sd's text encoder would have said.

    python -m models.training.ear WORK OUT --minutes 15

A regression, without pictures. The language model's words are noised, so that what it puts close together sounds alike:
words that no caption has are heard as the known ones beside them.
"""

import torch

from models.ear import Ear
from models.training.encode import Encoders, read
from models.training.running import Run, in_half, options

BATCH = 128
LEARNING_RATE = 1e-3
NOISE = 0.5  # of the spread of the language model's states
SILENT = 0.05  # of the rows: what guidance steers away from
JUDGED = 512


def main() -> None:
    given = options(__doc__)
    meaning, context = read(given.work, "meaning", "context")
    order = torch.randperm(len(meaning), generator=torch.Generator(meaning.device).manual_seed(0))
    judged, learned = order[:JUDGED], order[JUDGED:]
    encoders = Encoders()
    silence = encoders.meaning([""])[0], encoders.context([""])[0]
    spread, scale = meaning[judged].float().std(), context[judged].float().var()
    run = Run("ear", model := Ear(meaning.shape[-1], context.shape[-1]).train(), LEARNING_RATE, given, decay=0.999)
    for rows in run.batches(len(learned), BATCH):
        words, wanted = meaning[learned[rows]].float(), context[learned[rows]].float()
        silent = (torch.rand(BATCH) < SILENT).view(-1, 1, 1)
        words, wanted = torch.where(silent, silence[0], words), torch.where(silent, silence[1], wanted)
        there = (words != 0).any(-1, keepdim=True)
        words = words + there * torch.rand(BATCH, 1, 1) * NOISE * spread * torch.randn_like(words)
        with in_half():
            told = model(words)
        run.step((told.float() - wanted).square().mean() / scale)
    run.save(given.out)
    with torch.no_grad():
        missed = (model.float()(meaning[judged].float()) - context[judged].float()).square().mean() / scale
    print(f"unexplained of captions not trained on: {missed:.3f}")


if __name__ == "__main__":
    main()
