"""Pixel diffusion and its upsampler: what must hold for any weights, and what the shipped ones can do."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor, nn

from app.schemas import Parameters
from models import guidance
from models.cascade import Cascade, pixels_of
from models.catalog import Catalog, ModelCard
from models.loading import load_parts, load_pipeline
from models.program import Inputs, generator
from models.sampling import Span, moved
from models.scoring import Scorer
from models.stable_diffusion import StableDiffusion
from tests import tiny
from tests.test_journal import resumed_with_the_same_bytes
from tests.test_stable_diffusion import NOTHING, alone, as_image, progress, run_out, square, threads
from tests.test_stable_diffusion import asked as asked_of_sd
from workers.engine import Engine, Pass

CARDS = Catalog.read(["emoji-glide", "emoji-imagen"])
GLIDE, IMAGEN = CARDS["emoji-glide"], CARDS["emoji-imagen"]
ENLARGING = GLIDE.stages["upsampler"].num_inference_steps
INPAINT = {"image": "given", "mask": "given", "strength": 1.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@cache
def small_model(known: bool = True) -> Cascade:
    return Cascade(GLIDE, None, tiny.cascade(known))


@cache
def shipped(name: str = GLIDE.name) -> Cascade:
    return Cascade(CARDS[name], None, load_parts(CARDS[name], "cpu"))


def asked(**given: Any) -> Parameters:
    return asked_of_sd(**{"model": GLIDE.name, "num_inference_steps": 4, "scheduler": "ddim"} | given)


def noise_picture(size: int, seed: int = 0) -> Image.Image:
    return as_image(torch.rand(3, size, size, generator=generator(seed)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_draw_and_enlarge(dtype: torch.dtype):
    """As on a GPU, where a card's weights are float16."""
    nets = {name: part.to(dtype) if isinstance(part, nn.Module) else part for name, part in tiny.cascade().items()}
    r = asked(width=32, height=32)
    apart = alone(Cascade(GLIDE, None, nets), r) - alone(small_model(), r)
    assert apart.abs().mean() < 0.05


# -- thresholds


def test_static_thresholding_cuts_off():
    x0 = torch.tensor([[-3.0, -0.5, 0.5, 2.0]])
    assert guidance.thresholded(x0).tolist() == [[-1.0, -0.5, 0.5, 1.0]]


@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_thresholding_is_that_of_imagen_for_each_row(percentile: float):
    x0 = torch.randn(3, 3, 8, 8, generator=generator(0)) * torch.tensor([0.2, 1.0, 4.0]).view(3, 1, 1, 1)
    for row, ours in zip(x0, guidance.thresholded(x0, torch.full((3,), percentile)), strict=True):
        limit = max(float(torch.quantile(row.abs(), percentile)), 1.0)
        torch.testing.assert_close(ours, row.clamp(-limit, limit) / limit)


def test_rows_of_one_pass_have_their_own_percentile():
    x0 = 3 * torch.randn(2, 3, 8, 8, generator=generator(0))
    together = guidance.thresholded(x0, torch.tensor([0.6, 0.99]))
    for row, percentile in enumerate([0.6, 0.99]):
        by_itself = guidance.thresholded(x0[row : row + 1], torch.tensor([percentile]))
        assert torch.equal(together[row : row + 1], by_itself)


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_the_small_picture_is_that_of_a_plain_loop_over_diffusers(threshold: float | None):
    model = small_model()
    given = {} if threshold is None else {"dynamic_threshold": threshold}
    r = asked(guidance_scale=4.0, guidance=given, seed=3)
    assert (
        small_pictures(model, r)[0] - plainly(model, r)
    ).abs().max() < 5e-5  # products are summed in an order of the processor's


def small_pictures(model: Cascade, *requests: Parameters) -> list[Tensor]:
    """What the first stage hands to the second, each [1, 3, h, w]."""
    engine = Engine()
    tickets = [
        engine.submit(
            model.drawn(r, generator(r.seed), None, None, Span(0, r.num_inference_steps, r.num_inference_steps))
        )
        for r in requests
    ]
    run_out(engine, *tickets)
    return [ticket.result for ticket in tickets]


@torch.no_grad()
def plainly(model: Cascade, r: Parameters) -> Tensor:
    """The base by diffusers' own scheduler, which clips or thresholds by itself."""
    percentile = r.guidance.dynamic_threshold
    kind = {"thresholding": True, "dynamic_thresholding_ratio": percentile, "sample_max_value": 1e9}
    config = (
        dict(model.scheduler_config)
        | {"prediction_type": "sample"}
        | (kind if percentile else {"clip_sample": True, "clip_sample_range": 1.0})
    )
    scheduler: Any = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(r.num_inference_steps)
    context = model.encode_text(input_ids=model.tokens([r.negative_prompt, r.prompt]))
    x = torch.randn(1, 3, model.small, model.small, generator=generator(r.seed))
    unknown = torch.cat([torch.zeros(2, 12, 8, 8), torch.ones(2, 4, 8, 8)], 1)
    for t in scheduler.timesteps:
        seen = torch.cat([torch.nn.functional.pixel_unshuffle(x, 2).expand(2, -1, -1, -1), unknown], 1)
        e = torch.nn.functional.pixel_shuffle(model.base(seen, t, context, return_dict=False)[0], 2)
        e = e[:1] + r.guidance_scale * (e[1:] - e[:1])
        x = scheduler.step(e, t, x, use_clipped_model_output=True, return_dict=False)[0]
    return x


# -- tasks and stages


def test_what_is_known_of_a_picture_stays_to_the_last_bit():
    model, image = small_model(), noise_picture(32)
    r = asked(**INPAINT, scheduler="euler_a")
    picture = alone(model, r, Inputs(image, square(32, 8, 20)))
    same = (picture * 255).round() == ((pixels_of(image)[0] / 2 + 0.5) * 255).round()
    hole = torch.zeros(32, 32, dtype=torch.bool)
    hole[8:20, 8:20] = True
    assert same[:, ~hole].all()
    assert not same[:, hole].all()


def test_what_is_known_is_part_of_every_estimate():
    model, image = small_model(), noise_picture(32)
    known = model.known(pixels_of(image), torch.nn.functional.pad(torch.ones(1, 1, 16, 16), (8, 8, 8, 8)))
    r = asked(**INPAINT)
    engine, estimates = Engine(), list[Tensor]()
    ticket = engine.submit(model.draw(r, 0, Inputs(image, square(32, 8, 24))))
    while engine:
        if ticket.estimate is not None and ticket.stage == "base":
            estimates.append(ticket.estimate())
        engine.step()
    assert estimates
    outside = (known[:, 3:] == 0).expand(-1, 3, -1, -1)
    for estimate in estimates:
        torch.testing.assert_close(estimate[outside], known[:, :3][outside], atol=1e-5, rtol=0)


def test_upscaling_draws_nothing_small():
    model, passes = small_model(), list[Pass]()
    engine = Engine(passes.append)
    r = asked(task="upscale", image="given", prompt="")
    ticket = engine.submit(model.draw(r, 0, Inputs(noise_picture(32))))
    run_out(engine, ticket)
    assert [done.net.name for done in passes] == ["upsample"] * ENLARGING
    assert ticket.result is not None
    assert ticket.result.shape == (3, 32, 32)


@pytest.mark.parametrize("known", [True, False], ids=["glide", "imagen"])
def test_progress_counts_through_both_stages(known: bool):
    model = small_model(known)
    r = asked(num_inference_steps=3)
    assert progress(model, r) == [(i, 3 + ENLARGING) for i in range(3 + ENLARGING)]
    engine, stages = Engine(), list[str]()
    ticket = engine.submit(model.draw(r, 0, NOTHING))
    while engine:
        if ticket.stage not in stages:
            stages.append(ticket.stage)
        engine.step()
    assert stages == ["", "base", "upsampler"]


def test_image_to_image_begins_with_the_picture():
    model, image = small_model(), noise_picture(32)
    steps = progress(model, asked(num_inference_steps=8, image="given", strength=0.5), Inputs(image))
    assert steps[-1] == (4 + ENLARGING - 1, 4 + ENLARGING)


def test_a_language_models_padding_says_nothing():
    """The same words in a longer row: zeros where there is no word, and the words' own states unmoved."""
    model = small_model(known=False)
    ids = model.tokens(["a dog"])
    with torch.no_grad():
        told = model.encode_text(input_ids=ids)
        shorter = model.encode_text(input_ids=ids[:, : int((ids != 0).sum())])
    assert not told[:, shorter.shape[1] :].any()
    torch.testing.assert_close(told[:, : shorter.shape[1]], shorter, atol=1e-5, rtol=0)


def test_stages_of_different_pictures_share_their_passes():
    model, passes = small_model(), list[Pass]()
    engine = Engine(passes.append)
    tickets = [engine.submit(model.draw(asked(seed=seed), seed, NOTHING)) for seed in range(3)]
    run_out(engine, *tickets)
    assert [done.calls for done in passes if done.net in (model.denoiser, model.decoder)] == [3] * (4 + ENLARGING)


@pytest.mark.parametrize("task", ["text-to-image", "inpaint", "upscale"])
def test_the_exact_lane_keeps_every_bit_in_company(task: str):
    model, image = small_model(), noise_picture(32)
    own = {"text-to-image": {}, "inpaint": INPAINT, "upscale": {"image": "given"}}[task]
    r = asked(task=task, **own, seed=11, reproducible=True)
    inputs = Inputs(*([image] if r.image else []), *([square(32, 8, 20)] if r.mask else []))
    by_itself = alone(model, r, inputs, exact=True)
    engine = Engine()
    for seed in range(3):
        engine.submit(model.draw(asked(seed=seed, num_inference_steps=2 + seed), seed, NOTHING))
        engine.step()
    ticket = engine.submit(model.draw(r, r.seed, inputs), seat=r.seed)
    run_out(engine, ticket)
    assert torch.equal(ticket.result, by_itself)


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m_sde"])
def test_it_goes_on_with_the_same_bytes_in_either_stage(scheduler: str):
    r = asked(scheduler=scheduler, reproducible=True, guidance={"dynamic_threshold": 0.95})
    resumed_with_the_same_bytes(small_model(), r)


def test_a_step_is_the_samplers_table():
    torch.manual_seed(0)
    sample, e, noise = torch.randn(3, 2, 3, 4, 4)
    memory, coefficients = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 7)
    by_hand = sum(
        coefficients[:, k].view(2, 1, 1, 1) * term for k, term in enumerate([sample, e, noise, *memory.unbind(1)])
    )
    torch.testing.assert_close(moved(sample, e, noise, memory, coefficients), by_hand)


# -- what the shipped weights can do

CAPTIONS = [
    f"a {thing} on a {colour} background"
    for thing, colour in zip(
        ("red apple", "penguin", "rocket", "cactus", "lemon", "car", "rose", "owl", "pizza", "tree", "banana", "pear"),
        ("blue", "yellow", "pink") * 4,
        strict=True,
    )
]


@cache
def scorer() -> Scorer:
    return Scorer()


def agreement(card: ModelCard, prompts: list[str], captions: list[str] = CAPTIONS, **given: Any) -> float:
    """Of the small pictures with their captions, as CLIP sees it."""
    requests = [
        asked(model=card.name, prompt=prompt, seed=i, num_inference_steps=8, scheduler="dpmpp_2m", **given)
        for i, prompt in enumerate(prompts)
    ]
    drawn = [as_image((small[0] / 2 + 0.5).clamp(0, 1)) for small in small_pictures(shipped(card.name), *requests)]
    return float((scorer().pictures(drawn) * scorer().captions(captions)).sum(-1).mean())


def test_classifier_free_guidance_raises_clip_agreement():
    without, guided = (agreement(GLIDE, CAPTIONS, guidance_scale=scale) for scale in (1.0, 4.0))
    assert guided > without + 0.02, (without, guided)


def test_clip_guidance_raises_clip_agreement():
    without, guided = (agreement(GLIDE, CAPTIONS, guidance_scale=1.0, guidance={"clip": pull}) for pull in (0.0, 3.0))
    assert guided > without + 0.03, (without, guided)


def test_dynamic_thresholding_keeps_strong_guidance_from_saturating():
    def saturated(**guidance: float) -> float:
        requests = [
            asked(prompt=c, seed=i, num_inference_steps=8, guidance_scale=15.0, guidance=guidance)
            for i, c in enumerate(CAPTIONS[:6])
        ]
        return float((torch.cat(small_pictures(shipped(), *requests)).abs() > 0.99).float().mean())

    cut_off, divided = saturated(), saturated(dynamic_threshold=0.9)
    assert divided < 0.7 * cut_off, (cut_off, divided)


def test_a_language_model_knows_words_that_training_never_had():
    """Synonyms: the captions of training have the second of each, and never the first."""
    words = {"pooch": "dog", "feline": "cat", "citadel": "castle", "residence": "house", "arachnid": "spider",
             "textbook": "book", "hog": "pig", "stallion": "horse", "grizzly": "bear", "trout": "fish"}  # fmt: skip
    new, known = ([f"a {word}" for word in side] for side in (words, words.values()))
    of_glide, of_imagen = (agreement(card, new, known, guidance_scale=3.0) for card in (GLIDE, IMAGEN))
    assert of_imagen > of_glide + 0.08, (of_glide, of_imagen)


def test_what_is_drawn_into_a_hole_follows_the_prompt():
    model = shipped()
    plain = Image.new("RGB", (128, 128), (250, 220, 60))
    prompts = ["a penguin on a yellow background", "a red apple on a yellow background"]
    inputs = Inputs(plain, square(128, 24, 104))
    asking = INPAINT | {"seed": 2, "scheduler": "dpmpp_2m", "num_inference_steps": 8}
    pictures = [alone(model, asked(prompt=prompt, **asking), inputs) for prompt in prompts]
    likeness = scorer().pictures([as_image(one) for one in pictures]) @ scorer().captions(prompts).T
    assert likeness.argmax(1).tolist() == [0, 1]


def test_an_enlarged_picture_looks_the_same_from_afar():
    r = asked_of_sd(prompt="a red apple on a blue background", num_inference_steps=12)
    source = Catalog.read(["emoji-sd"])["emoji-sd"]
    original = alone(StableDiffusion(source, load_pipeline(source, "cpu")), r)
    small = torch.nn.functional.avg_pool2d(original, 2)
    blown_up = as_image(torch.nn.functional.interpolate(small[None], (128, 128))[0])
    enlarged = alone(shipped(), asked(task="upscale", image="given", prompt=""), Inputs(blown_up))
    assert (torch.nn.functional.avg_pool2d(enlarged, 2) - small).abs().mean() < 0.03
