"""Fewer steps, and cheaper ones: samplers of distilled models, denoisers that guide themselves, guidance used again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

from app.schemas import Parameters
from models import samplers
from models.catalog import Catalog, Folder, ModelCard
from models.loading import load_parts, load_pipeline
from models.program import Inputs, generator
from models.stable_diffusion import StableDiffusion
from models.stock import StockPipelines
from tests import tiny
from tests.test_journal import resumed_with_the_same_bytes
from tests.test_lora import layers_of
from tests.test_stable_diffusion import CARD, FROM_STOCK, NOTHING, alone, as_image, asked, run_out, stock, threads
from workers.engine import Engine

SMALL = {"width": 32, "height": 32, "num_inference_steps": 4}
ETA = {"tcd": {"eta": 0.3}}  # the scheduler's own default, which the pipeline overrides with DDIM's


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture(scope="module")
def small() -> StableDiffusion:
    return StableDiffusion(CARD, tiny.stable_diffusion())


@pytest.fixture(scope="module")
def guides_itself() -> StableDiffusion:
    """As an LCM does: its guidance scale is something that it is told (Luo et al. 2023)."""
    pipeline = tiny.stable_diffusion()
    torch.manual_seed(0)
    pipeline.register_modules(unet=tiny.unet(cross_attention_dim=tiny.WIDTH, time_cond_proj_dim=32))
    return StableDiffusion(CARD, pipeline)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return as_image(torch.rand(3, 32, 32, generator=generator(4)))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("scheduler", ["lcm", "tcd", "euler_trailing"])
@pytest.mark.parametrize("kind", ["small", "guides_itself"])
def test_the_stock_pipeline_draws_the_same(kind: str, scheduler: str, steps: int, request: pytest.FixtureRequest):
    model = request.getfixturevalue(kind)
    r = asked(scheduler=scheduler, guidance_scale=3.0, **SMALL | {"num_inference_steps": steps})
    ours, theirs = alone(model, r), stock(model, StableDiffusionPipeline, r, NOTHING, **ETA.get(scheduler, {}))
    assert (ours - theirs).abs().max() <= FROM_STOCK
    assert theirs.std() > 0.1


@pytest.mark.parametrize("scheduler", ["lcm", "tcd"])
@pytest.mark.parametrize("kind", ["small", "guides_itself"])
def test_the_stock_pipeline_changes_a_picture_the_same_way(
    kind: str, scheduler: str, picture: Image.Image, request: pytest.FixtureRequest
):
    model = request.getfixturevalue(kind)
    r = asked(scheduler=scheduler, guidance_scale=2.0, image="given", strength=0.5, **SMALL)
    theirs = stock(model, StableDiffusionImg2ImgPipeline, r, Inputs(picture), **ETA.get(scheduler, {}))
    assert (alone(model, r, Inputs(picture)) - theirs).abs().max() <= FROM_STOCK


def test_a_denoiser_that_guides_itself_has_one_row_and_is_told_how_much(guides_itself: StableDiffusion):
    weak, strong = (asked(scheduler="lcm", guidance_scale=scale, **SMALL) for scale in (1.5, 8.0))
    assert rows(guides_itself, strong) == [1] * 4
    assert not torch.equal(alone(guides_itself, weak), alone(guides_itself, strong))


def assert_same_in_a_crowd(model: StableDiffusion, requests: list[Parameters]) -> None:
    engine = Engine()
    tickets = [engine.submit(model.draw(r, r.seed, NOTHING)) for r in requests]
    run_out(engine, *tickets)
    for r, ticket in zip(requests, tickets, strict=True):
        assert ticket.result is not None
        assert (ticket.result - alone(model, r)).abs().max() <= FROM_STOCK


def test_in_a_crowd_each_is_told_its_own_guidance_scale(guides_itself: StableDiffusion):
    requests = [
        asked(scheduler="lcm", guidance_scale=scale, seed=i, **SMALL) for i, scale in enumerate((1.0, 4.0, 8.0))
    ]
    assert_same_in_a_crowd(guides_itself, requests)


@pytest.mark.parametrize("given", [{}, {"rescale": 0.7}], ids=["plain", "rescaled"])
def test_guidance_at_every_step_is_guidance(small: StableDiffusion, given: dict[str, Any]):
    every, plain = (asked(guidance_scale=5.0, guidance=given | more, **SMALL) for more in ({"every": 1}, {}))
    assert torch.equal(alone(small, every), alone(small, plain))


def test_guidance_at_every_other_step_costs_half_between_and_stays_close(small: StableDiffusion):
    steps = {**SMALL, "num_inference_steps": 8}
    plain, reusing = (asked(guidance_scale=5.0, guidance=given, **steps) for given in ({}, {"every": 2}))
    unguided = asked(guidance_scale=1.0, **steps)
    assert rows(small, reusing) == [2, 1] * 4
    near, far = ((alone(small, r) - alone(small, plain)).abs().mean() for r in (reusing, unguided))
    assert near < far / 3


def test_guidance_is_used_again_within_its_interval_only(small: StableDiffusion):
    r = asked(
        guidance_scale=5.0, guidance={"interval": [0.25, 0.875], "every": 3}, **SMALL | {"num_inference_steps": 8}
    )
    assert rows(small, r) == [1, 1, 2, 1, 1, 2, 1, 1]


def test_whoever_uses_guidance_again_draws_the_same_in_a_crowd(small: StableDiffusion):
    requests = [asked(guidance_scale=5.0, guidance={"every": n}, seed=n, **SMALL) for n in (1, 2, 3)]
    requests += [asked(guidance_scale=5.0, seed=9, **SMALL)]
    assert_same_in_a_crowd(small, requests)


def test_whoever_uses_guidance_again_is_taken_over_towards_the_same_bytes(small: StableDiffusion):
    resumed_with_the_same_bytes(small, asked(guidance_scale=5.0, guidance={"every": 2}, reproducible=True, **SMALL))


def rows(model: StableDiffusion, r: Any) -> list[int]:
    seen = list[int]()
    engine = Engine(lambda done: seen.append(done.rows) if done.net is model.denoiser else None)
    run_out(engine, engine.submit(model.draw(r, r.seed, NOTHING)))
    return seen


# -- the cards of distilled models


@pytest.mark.parametrize("name", ["lcm-dreamshaper", "sd15-lcm", "sd-turbo"])
def test_a_card_of_few_steps_draws_what_its_own_pipeline_draws(name: str, request: pytest.FixtureRequest):
    card = Catalog.read([name])[name]
    pipeline = request.getfixturevalue("guides_itself" if name == "lcm-dreamshaper" else "small").pipeline
    model, defaults = StableDiffusion(card, pipeline), card.defaults
    own = {"scheduler": defaults.scheduler, "guidance_scale": defaults.guidance_scale}
    r = asked(**SMALL | own | {"num_inference_steps": defaults.num_inference_steps})
    assert (alone(model, r) - stock(model, StableDiffusionPipeline, r, NOTHING)).abs().max() <= FROM_STOCK


@pytest.mark.parametrize("name", ["sdxl-turbo", "sdxl-lightning"])
def test_a_card_of_few_steps_draws_what_its_stock_pipeline_draws(name: str):
    card = Catalog.read([name])[name]
    pipeline: Any = tiny.sdxl()
    model, defaults = StockPipelines(card, pipeline), card.defaults
    own = {"scheduler": defaults.scheduler, "guidance_scale": defaults.guidance_scale}
    r = asked(**SMALL | own | {"num_inference_steps": defaults.num_inference_steps})
    engine = Engine()
    run_out(engine, ticket := engine.submit(model.draw(r, 0, NOTHING)))
    pipeline.scheduler = samplers.scheduler(r.scheduler, model.scheduler_config)
    size = {"width": r.width, "height": r.height, "guidance_scale": r.guidance_scale}
    theirs = pipeline(
        r.prompt, num_inference_steps=r.num_inference_steps, generator=generator(0), output_type="pt", **size
    )
    assert ticket.result is not None
    assert (ticket.result - theirs.images[0]).abs().max() <= FROM_STOCK


def test_an_adapter_that_is_merged_draws_as_one_that_is_worn(tmp_path: Path):
    pipeline: Any = tiny.stable_diffusion()
    tiny.save(pipeline, tmp_path / "model")
    layers: dict[str, Any] = layers_of(pipeline.unet, "few", ["to_q", "to_v", "to_out.0"])
    StableDiffusionPipeline.save_lora_weights(tmp_path / "few", unet_lora_layers=layers)
    source = Folder(kind="folder", path=tmp_path / "model")
    cards = [
        CARD.model_copy(update={"source": source, "parts": {}} | how)
        for how in ({"merged_lora": str(tmp_path / "few")}, {"loras": {"few": str(tmp_path / "few")}}, {})
    ]
    merged, worn, bare = (StableDiffusion(card, load_pipeline(card, "cpu")) for card in cards)
    r, wears = asked(**SMALL), asked(loras=[{"name": "few"}], **SMALL)
    torch.testing.assert_close(alone(merged, r), alone(worn, wears), atol=FROM_STOCK, rtol=0)
    assert not torch.allclose(alone(merged, r), alone(bare, r), atol=1e-3)
    assert not any("lora" in name for name, _ in merged.pipeline.unet.named_parameters())


def test_a_tiny_decoder_takes_the_place_of_the_decoder(small: StableDiffusion, tmp_path: Path):
    torch.manual_seed(0)
    levels = {f"{half}_block_out_channels": (16, 16) for half in ("encoder", "decoder")}
    AutoencoderTiny(**levels, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(tmp_path)  # pyright: ignore[reportArgumentType]
    card = CARD.model_copy(update={"parts": {"decoder": str(tmp_path)}})
    parts = load_parts(card, "cpu")
    quick, r = StableDiffusion(card, small.pipeline, parts), asked(**SMALL)
    with_it = StableDiffusionPipeline(
        **small.pipeline.components | {"vae": parts["decoder"]}, requires_safety_checker=False
    )
    theirs = stock(StableDiffusion(CARD, small.pipeline), lambda **_: with_it, r, NOTHING)
    assert (alone(quick, r) - theirs).abs().max() <= FROM_STOCK
    assert (alone(quick, r) - alone(small, r)).abs().max() > 0.01


@pytest.mark.parametrize("field", ["merged_lora", "parts.decoder"])
def test_a_family_that_cannot_is_told_so_by_its_card(field: str):
    given = {"merged_lora": "few"} if field == "merged_lora" else {"parts": {"decoder": "tiny"}}
    with pytest.raises(ValueError, match=f"{field}: the family unclip has"):
        ModelCard.model_validate(CARD.model_dump() | {"family": "unclip", "prompt_weights": False} | given)
