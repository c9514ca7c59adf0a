"""Janus among others writes what transformers would write with it alone."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

from app.schemas import Parameters
from models.catalog import Catalog, Sampling
from models.janus import ANSWERED, ASKED, Janus
from tests import tiny
from tests.test_journal import resumed_with_the_same_bytes
from tests.test_stable_diffusion import NOTHING, alone, run_out
from tests.test_stable_diffusion import asked as asked_of_sd
from workers.engine import Engine, Pass

CARD = Catalog.read(["janus-pro-1b"])["janus-pro-1b"]
GREEDY = CARD.model_copy(update={"sampling": Sampling(top_p=1e-6), "size": CARD.size.model_copy(update={"width": 16})})
CODES = 16
BEGIN_OF_IMAGE = 3


@cache
def janus() -> Janus:
    """Of random weights: 4 × 4 codes of a picture of 16 pixels."""
    torch.manual_seed(0)
    tokenizer = tiny.clip_tokenizer()
    config = JanusConfig(
        vision_config=JanusVisionConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4,
            projection_dim=32, num_image_tokens=CODES,
        ),
        text_config=LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(tokenizer),
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8, num_embeddings=32, latent_channels=32, base_channels=32, channel_multiplier=[1, 1, 1],
            num_res_blocks=1, num_patches=4, projection_dim=32, image_token_embed_dim=32,
        ),
    )  # fmt: skip
    whole: Any = JanusForConditionalGeneration(config).eval()
    for parameter in whole.model.language_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    whole.generation_config.update(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    whole.generation_config.generation_kwargs = {"boi_token_id": BEGIN_OF_IMAGE}
    return Janus(GREEDY, None, {"janus": whole, "tokenizer": tokenizer})


def asked(**given: Any) -> Parameters:
    size = {"width": 16, "height": 16, "num_inference_steps": CODES, "scheduler": "top_p", "guidance_scale": 5.0}
    return asked_of_sd(**{"model": CARD.name, **size} | given)


def of_transformers(r: Parameters) -> Tensor:
    whole = janus().parts["janus"]
    ids = [*janus().tokenizer(ASKED.format(r.prompt) + ANSWERED).input_ids, BEGIN_OF_IMAGE]
    codes = whole.generate(
        torch.tensor([ids]), torch.ones(1, len(ids)), generation_mode="image", do_sample=False,
        guidance_scale=r.guidance_scale,
    )  # fmt: skip
    with torch.no_grad():
        pixels = whole.decode_image_tokens(codes)[0].permute(2, 0, 1)
    return (pixels / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("prompt", ["a cat", "a red apple on a blue background"])
@pytest.mark.parametrize("guidance_scale", [2.0, 5.0])  # at 1 its own sampling fails
def test_it_writes_what_transformers_writes(prompt: str, guidance_scale: float):
    r = asked(prompt=prompt, guidance_scale=guidance_scale)
    assert (alone(janus(), r) - of_transformers(r)).abs().max() < 1e-5


def test_prompts_of_different_lengths_share_passes_and_do_not_hear_each_other():
    passes = list[Pass]()
    engine = Engine(passes.append)
    requests = [asked(prompt=prompt) for prompt in ("a cat", "a red apple on a blue background", "owls")]
    tickets = list[Any]()
    for r in requests:
        tickets.append(engine.submit(janus().draw(r, r.seed, NOTHING)))
        engine.step()
        engine.step()
    run_out(engine, *tickets)
    assert any(len(one.tickets) == 3 for one in passes if one.net is janus().denoiser), "nothing was shared"
    for r, ticket in zip(requests, tickets, strict=True):
        assert (ticket.result - of_transformers(r)).abs().max() < 1e-5


def test_it_goes_on_where_its_worker_died():
    resumed_with_the_same_bytes(janus(), asked(reproducible=True))


def test_a_prompt_that_is_too_long_is_cut_before_the_answer_and_says_so():
    words = " ".join(["apple"] * 200)
    ids = janus().tokens([words])[0]
    answered = janus().tokenizer(ANSWERED, add_special_tokens=False).input_ids
    assert ids[-len(answered) :].tolist() == answered
    (warning,) = janus().warnings(asked(prompt=words))
    assert warning.startswith("prompt is cut after")
