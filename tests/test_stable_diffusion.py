"""The shipped model through its own program: what diffusers would have drawn, for whoever asks, in whatever company."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from app.schemas import Parameters
from models import samplers
from models.catalog import Catalog
from models.loading import load_pipeline
from models.program import Inputs, Program, generator
from models.stable_diffusion import StableDiffusion
from tests import tiny
from workers.engine import Engine, Pass, Ticket

CARD = Catalog.read(["emoji-sd"])["emoji-sd"]
NOTHING = Inputs()

# The largest difference of a pixel in [0, 1], in float32 on a CPU.
FROM_STOCK = 1e-5
# Begun at a zero terminal SNR, where sigma is 4096 and more, diffusers' own step cancels to three or four digits; the
# tables, whose coefficients are read off in float64, do not (tests/test_samplers.py). Measured 2e-4, 1.1e-3 and 3e-5.
FROM_STOCK_AT_INFINITY = {"euler": 1e-3, "euler_a": 1e-3, "deis": 3e-3, "heun": 1e-4}
IN_COMPANY = 1e-5  # the default lane's contract: another row count is another order of float32 additions


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture(scope="module")
def shipped() -> StableDiffusion:
    return StableDiffusion(CARD, load_pipeline(CARD, "cpu"))


@pytest.fixture(scope="module")
def apple(shipped: StableDiffusion) -> Image.Image:
    return as_image(alone(shipped, asked(num_inference_steps=8)))


# -- the stock pipelines


TASKS: dict[str, dict[str, Any]] = {
    "text-to-image": {"negative_prompt": "blue", "seed": 0},
    "unguided": {"guidance_scale": 1.0, "seed": 1},
    "image-to-image": {"strength": 0.6, "image": "given", "negative_prompt": "green"},
    "unguided image-to-image from nothing but noise": {"strength": 1.0, "image": "given", "guidance_scale": 0.0},
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("scheduler", CARD.schedulers)
def test_the_stock_pipeline_draws_the_same(shipped: StableDiffusion, apple: Image.Image, scheduler: str, task: str):
    r = asked(scheduler=scheduler, num_inference_steps=4, **TASKS[task])
    inputs = Inputs(apple) if r.image else NOTHING
    pipeline = StableDiffusionImg2ImgPipeline if r.image else StableDiffusionPipeline
    difference = (alone(shipped, r, inputs) - stock(shipped, pipeline, r, inputs)).abs().max()
    from_infinity = r.strength in (None, 1.0)
    assert difference <= (FROM_STOCK_AT_INFINITY.get(scheduler, FROM_STOCK) if from_infinity else FROM_STOCK)


@pytest.mark.parametrize("channels", [4, 9], ids=["blending", "nine channels"])
@pytest.mark.parametrize("scheduler", CARD.schedulers)
def test_the_stock_pipeline_repaints_the_same(scheduler: str, channels: int):
    """On tiny models, for it takes no others than those of four latent channels."""
    model = small_model(channels)
    image = as_image(torch.rand(3, 32, 32, generator=generator(4)))
    for strength, guidance_scale in ((1.0, 1.0), (0.7, 3.0)):
        r = asked(scheduler=scheduler, strength=strength, guidance_scale=guidance_scale, **INPAINTING, **SMALL)
        inputs = Inputs(image, square(32, 8, 20))
        ours = alone(model, r, inputs)
        theirs = stock(model, StableDiffusionInpaintPipeline, r, inputs)
        assert (ours - theirs).abs().max() <= FROM_STOCK
        assert theirs.std() > 0.1  # something was drawn


@cache
def small_model(channels: int) -> StableDiffusion:
    return StableDiffusion(CARD, tiny.stable_diffusion(channels, StableDiffusionInpaintPipeline))


INPAINTING = {"image": "given", "mask": "given", "num_inference_steps": 6}
SMALL = {"width": 32, "height": 32}


def test_the_shipped_model_repaints_the_hole_and_keeps_the_rest(shipped: StableDiffusion, apple: Image.Image):
    r = asked(prompt="a green pear on a blue background", strength=1.0, **INPAINTING | {"num_inference_steps": 10})
    picture = alone(shipped, r, Inputs(apple, square(128, 40, 88)))
    change = (picture - as_tensor(apple)).abs().mean(0)
    kept = torch.ones(128, 128, dtype=torch.bool)
    kept[24:104, 24:104] = False  # the decoder sees two latents far
    assert change[kept].mean() < 0.02  # what the autoencoder loses
    assert change[48:80, 48:80].mean() > 0.15


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_shipped_model_repaints_as_a_plain_loop_over_diffusers_does(
    shipped: StableDiffusion, apple: Image.Image, strength: float
):
    r = asked(strength=strength, scheduler="ddim", **INPAINTING)
    mask = square(128, 40, 88)
    ours = alone(shipped, r, Inputs(apple, mask))
    assert (ours - repainted_plainly(shipped, r, apple, mask)).abs().max() <= FROM_STOCK


@torch.no_grad()
def repainted_plainly(model: StableDiffusion, r: Parameters, image: Image.Image, mask: Image.Image) -> Tensor:
    """Inpainting by blending, as StableDiffusionInpaintPipeline does it for four channels."""
    pipeline, rng = model.pipeline, generator(r.seed)
    context = torch.cat(pipeline.encode_prompt(r.prompt, "cpu", 1, True)[::-1])
    scheduler = samplers.scheduler(r.scheduler, model.scheduler_config)
    scheduler.set_timesteps(r.num_inference_steps)
    timesteps = scheduler.timesteps[r.num_inference_steps - int(r.num_inference_steps * r.strength) :]
    posterior = pipeline.vae.encode(pipeline.image_processor.preprocess(image)).latent_dist
    x0 = posterior.sample(rng) * pipeline.vae.config.scaling_factor
    noise = torch.randn(x0.shape, generator=rng)
    hole = torch.nn.functional.interpolate(as_tensor(mask)[None, :1], x0.shape[-2:])
    x = noise if r.strength == 1 else scheduler.add_noise(x0, noise, timesteps[:1])
    for i, t in enumerate(timesteps):
        e_u, e_c = pipeline.unet(torch.cat([x, x]), t, encoder_hidden_states=context).sample.chunk(2)
        x = scheduler.step(e_u + r.guidance_scale * (e_c - e_u), t, x).prev_sample
        last = i + 1 == len(timesteps)
        x = (1 - hole) * (x0 if last else scheduler.add_noise(x0, noise, timesteps[i + 1 : i + 2])) + hole * x
    pixels = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
    return (pixels[0] / 2 + 0.5).clamp(0, 1)


def test_at_least_one_step_is_taken_however_slight_the_strength(shipped: StableDiffusion, apple: Image.Image):
    """Where diffusers' pipelines would take none, and fail."""
    engine = Engine()
    ticket = engine.submit(shipped.draw(asked(strength=0.01, image="given"), 0, Inputs(apple)))
    run_out(engine, ticket)
    assert ticket.at == (1, 1)


def test_the_seed_decides_the_picture(shipped: StableDiffusion):
    first, again, other = (alone(shipped, asked(seed=seed, num_inference_steps=2)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.01


# -- in company

WANTED = {
    "guided": {"scheduler": "dpmpp_2m_sde", "guidance_scale": 4.0, "seed": 11},
    "unguided": {"scheduler": "unipc", "guidance_scale": 1.0, "seed": 12},
    "image-to-image": {"scheduler": "euler_a", "strength": 0.7, "image": "given", "seed": 13},
}


def crowds(apple: Image.Image) -> dict[str, list[tuple[Parameters, Inputs, int | None, int]]]:
    """Who else is there: their request, inputs, seat, and the pass before which they join."""
    return {
        "of the default lane": [
            (asked(scheduler="ddim", seed=1, num_inference_steps=3), NOTHING, None, 0),
            (asked(scheduler="heun", seed=2, guidance_scale=1.0, num_inference_steps=2), NOTHING, None, 0),
            (asked(scheduler="pndm", seed=3, guidance_scale=9.0, num_inference_steps=4), NOTHING, None, 2),
            (asked(scheduler="euler", seed=4, strength=0.5, image="given"), Inputs(apple), None, 4),
        ],
        "of the exact lane": [
            (asked(scheduler="ddim", seed=11, prompt="a boat", num_inference_steps=3), NOTHING, 11, 0),
            (asked(scheduler="ddpm", seed=12, guidance_scale=1.0, num_inference_steps=3), NOTHING, 12, 1),
            (asked(scheduler="deis", seed=14, num_inference_steps=4), NOTHING, 14, 3),
        ],
        "of other sizes": [
            (asked(scheduler="dpmpp_2m", seed=1, width=64, height=64, num_inference_steps=6), NOTHING, None, 0),
            (asked(scheduler="unipc", seed=2, width=64, height=128, num_inference_steps=2), NOTHING, 2, 1),
            (asked(scheduler="euler_a", seed=3, num_inference_steps=3), NOTHING, None, 2),
        ],
    }


def test_an_exact_request_has_the_same_bytes_alone_and_in_any_crowd(shipped: StableDiffusion, apple: Image.Image):
    expected = {name: alone(shipped, *wanted(name, apple), exact=True) for name in WANTED}
    for crowd in crowds(apple).values():
        for name, picture in in_crowd(shipped, apple, crowd, exact=True).items():
            assert torch.equal(picture, expected[name]), name


def test_an_exact_request_has_the_same_bytes_in_company_with_several_threads_too(shipped: StableDiffusion):
    small = {"width": 64, "height": 64, "num_inference_steps": 2}
    with threads(2):
        expected = alone(shipped, asked(seed=1, **small), exact=True)
        engine = Engine()
        engine.submit(shipped.draw(asked(seed=2, scheduler="ddim", **small), 2, NOTHING), seat=2)
        engine.submit(shipped.draw(asked(seed=3, guidance_scale=1.0, scheduler="heun", **small), 3, NOTHING))
        engine.step()
        ticket = engine.submit(shipped.draw(asked(seed=1, **small), 1, NOTHING), seat=1)
        run_out(engine, ticket)
    assert torch.equal(ticket.result, expected)


def test_a_default_request_has_nearly_the_same_pixels_alone_and_in_any_crowd(
    shipped: StableDiffusion, apple: Image.Image
):
    expected = {name: alone(shipped, *wanted(name, apple)) for name in WANTED}
    for crowd in crowds(apple).values():
        for name, picture in in_crowd(shipped, apple, crowd, exact=False).items():
            assert (picture - expected[name]).abs().max() <= IN_COMPANY, name


def test_two_exact_requests_of_one_seed_at_once_have_the_same_bytes(shipped: StableDiffusion):
    r = asked(seed=5, num_inference_steps=3)
    expected = alone(shipped, r, exact=True)
    engine = Engine()
    first = engine.submit(shipped.draw(r, 5, NOTHING), seat=5)
    for _ in range(3):
        engine.step()
    second = engine.submit(shipped.draw(r, 5, NOTHING), seat=5)
    run_out(engine, first, second)
    assert torch.equal(first.result, expected)
    assert torch.equal(second.result, expected)


def test_guided_and_unguided_requests_share_their_passes(shipped: StableDiffusion):
    """Three rows in a pass of four: an empty row must not look for a partner beyond the end."""
    passes = list[Pass]()
    engine = Engine(passes.append)
    tickets = [engine.submit(shipped.draw(asked(guidance_scale=g, num_inference_steps=2), 0, NOTHING)) for g in (3, 1)]
    run_out(engine, *tickets)
    assert [(p.calls, p.rows, p.padded) for p in passes if p.net is shipped.denoiser] == [(2, 3, 4)] * 2


def test_an_exact_request_needs_one_pass_for_each_step(shipped: StableDiffusion):
    passes = list[Pass]()
    engine = Engine(passes.append)
    run_out(engine, engine.submit(shipped.draw(asked(num_inference_steps=2), 0, NOTHING), seat=0))
    assert [(p.rows, p.padded) for p in passes if p.net is shipped.denoiser] == [(2, CARD.reproducible_rows)] * 2


# -- what goes wrong with one of them


def raising(program: Program) -> Program:
    call = program.send(None)
    for _ in range(2):
        call = program.send((yield call))
    raise ZeroDivisionError


def altered(program: Program, **change: Any) -> Program:
    """Its denoising calls have another argument: a function of its own."""
    call = program.send(None)
    while True:
        for name, change_of in change.items():
            if name in call.args:
                call.args[name] = change_of(call.args[name])
        try:
            call = program.send((yield call))
        except StopIteration as end:
            return end.value


BAD = {
    "raises in its program": raising,
    "is not a number": lambda program: altered(program, context=lambda c: c * torch.nan),
    "has a shape that fails": lambda program: altered(program, context=lambda c: c[..., :-1]),
    "has an argument of the wrong kind": lambda program: altered(program, scale=lambda _: torch.Generator()),
    "raises in its net": lambda program: altered(program, sample=lambda x: x * 0 + 13),
}


@pytest.fixture(scope="module")
def two(shipped: StableDiffusion) -> dict[str, list[Tensor]]:
    """Two small pictures, each drawn alone, in either lane."""
    return {lane: [alone(shipped, r, exact=lane == "exact") for r in TWO] for lane in ("default", "exact")}


@pytest.mark.parametrize("lane", ["default", "exact"])
@pytest.mark.parametrize("fault", BAD)
def test_one_bad_request_does_not_hurt_the_others(
    shipped: StableDiffusion, two: dict[str, list[Tensor]], fault: str, lane: str, monkeypatch: pytest.MonkeyPatch
):
    def denoise(**args: Any) -> Any:
        if (args["sample"] == 13).flatten(1).all(1).any():
            raise ArithmeticError("an unlucky number")
        return shipped.denoise(**args)

    monkeypatch.setattr(shipped.denoiser, "run", denoise)
    exact = lane == "exact"
    engine = Engine()
    good = [engine.submit(shipped.draw(r, r.seed, NOTHING), seat=r.seed if exact else None) for r in TWO]
    bad = engine.submit(BAD[fault](shipped.draw(asked(width=64, height=64), 3, NOTHING)), seat=3 if exact else None)
    run_out(engine, *good)
    assert bad.done
    assert bad.error is not None or bad.result.isnan().all()
    for ticket, picture in zip(good, two[lane], strict=True):
        assert (ticket.result - picture).abs().max() <= (0 if exact else IN_COMPANY)


def test_a_request_that_cannot_begin_is_its_own_failure(shipped: StableDiffusion):
    engine = Engine()
    bad = engine.submit(shipped.draw(asked(scheduler="no_such"), 0, NOTHING))
    good = engine.submit(shipped.draw(asked(num_inference_steps=1), 0, NOTHING))
    run_out(engine, good)
    assert isinstance(bad.error, KeyError)


# -- what is seen of it meanwhile


@pytest.mark.parametrize("scheduler", CARD.schedulers)
def test_progress_counts_the_steps_that_were_asked_for(scheduler: str):
    model = small_model(4)
    image = as_image(torch.rand(3, 32, 32, generator=generator(4)))
    assert progress(model, asked(scheduler=scheduler, num_inference_steps=5, **SMALL)) == [(i, 5) for i in range(6)]
    r = asked(scheduler=scheduler, num_inference_steps=6, strength=0.5, image="given", **SMALL)
    assert progress(model, r, Inputs(image)) == [(i, 3) for i in range(4)]


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler", "heun", "unipc"])
def test_an_estimate_looks_like_the_picture_to_come(shipped: StableDiffusion, scheduler: str):
    engine = Engine()
    ticket = engine.submit(shipped.draw(asked(scheduler=scheduler, num_inference_steps=6), 0, NOTHING))
    shown = torch.empty(0)
    while engine:
        shown = ticket.estimate() if ticket.estimate else shown
        engine.step()
    preview = as_tensor(Image.fromarray(shipped.colours.paint(shown).numpy()))
    small = torch.nn.functional.adaptive_avg_pool2d(ticket.result, preview.shape[-2:])
    assert (preview - small).abs().mean() < 0.08


def test_words_that_are_not_seen_are_reported(shipped: StableDiffusion):
    long = asked(prompt="apple " * 40 + "with a worm")
    (warning,) = shipped.warnings(long)
    assert "prompt is cut after 30 tokens" in warning
    assert "with a worm" in warning
    assert shipped.warnings(asked(prompt="apple " * 5, negative_prompt="pear")) == []
    (warning,) = shipped.warnings(asked(negative_prompt="apple " * 40))
    assert warning.startswith("negative_prompt")


# -- how they are drawn


def asked(**given: Any) -> Parameters:
    defaults = {
        "model": "emoji-sd",
        "prompt": "a red apple on a blue background",
        "width": 128,
        "height": 128,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "scheduler": "dpmpp_2m",
        "seed": 0,
    }
    return Parameters.model_validate(defaults | given)


TWO = [asked(seed=seed, num_inference_steps=2, width=64, height=64) for seed in (1, 2)]


def alone(model: StableDiffusion, r: Parameters, inputs: Inputs = NOTHING, exact: bool = False) -> Tensor:
    engine = Engine()
    ticket = engine.submit(model.draw(r, r.seed, inputs), seat=r.seed if exact else None)
    run_out(engine, ticket)
    return ticket.result


def wanted(name: str, apple: Image.Image) -> tuple[Parameters, Inputs]:
    r = asked(num_inference_steps=4, **WANTED[name])
    return r, Inputs(apple) if r.image else NOTHING


def in_crowd(model: StableDiffusion, apple: Image.Image, crowd: list[Any], exact: bool) -> dict[str, Tensor]:
    """The wanted pictures, which join one after another, from among others, which come and go."""
    engine, tickets, passes = Engine(), dict[str, Ticket](), 0
    joining = {1 + 2 * i: name for i, name in enumerate(WANTED)}
    while engine or passes <= max(joining):
        for r, inputs, seat, when in crowd:
            if when == passes:
                engine.submit(model.draw(r, r.seed, inputs), seat)
        if passes in joining:
            r, inputs = wanted(joining[passes], apple)
            tickets[joining[passes]] = engine.submit(model.draw(r, r.seed, inputs), seat=r.seed if exact else None)
        engine.step()
        passes += 1
    run_out(engine, *tickets.values())
    return {name: ticket.result for name, ticket in tickets.items()}


def run_out(engine: Engine, *tickets: Ticket) -> None:
    while engine:
        engine.step()
    for ticket in tickets:
        if ticket.error:
            raise ticket.error


def progress(model: StableDiffusion, r: Parameters, inputs: Inputs = NOTHING) -> list[Any]:
    """What a client is told, each once."""
    engine, told = Engine(), list[Any]()
    ticket = engine.submit(model.draw(r, r.seed, inputs))
    while engine:
        if ticket.at and ticket.at not in told:
            told.append(ticket.at)
        engine.step()
    run_out(engine, ticket)
    return told


def stock(model: StableDiffusion, cls: Any, r: Parameters, inputs: Inputs, **given: Any) -> Tensor:
    pipeline = cls(**model.pipeline.components, requires_safety_checker=False)
    pipeline.scheduler = samplers.scheduler(r.scheduler, model.scheduler_config)
    pipeline.set_progress_bar_config(disable=True)
    pictures = {"image": inputs.image, "mask_image": inputs.mask, "strength": r.strength}
    size = {} if cls is StableDiffusionImg2ImgPipeline else {"width": r.width, "height": r.height}
    return pipeline(
        r.prompt,
        negative_prompt=r.negative_prompt or None,
        num_inference_steps=r.num_inference_steps,
        guidance_scale=r.guidance_scale,
        generator=generator(r.seed),
        output_type="pt",
        **size,
        **given,
        **{name: value for name, value in pictures.items() if value is not None},
    ).images[0]


def square(size: int, begin: int, end: int) -> Image.Image:
    mask = Image.new("L", (size, size), 0)
    mask.paste(255, (begin, begin, end, end))
    return mask


def as_image(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())


def as_tensor(image: Image.Image) -> Tensor:
    """[3, height, width] in [0, 1]"""
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 255


class threads:
    """So many for torch, while it lasts."""

    def __init__(self, count: int):
        self.count, self.before = count, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.count)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)
