"""Unmodified diffusers pipelines as programs: together they draw what each would have drawn alone."""

import contextlib
import gc
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any

import greenlet
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from app.schemas import Parameters, Task
from models import samplers
from models.catalog import Catalog, ModelCard
from models.program import Call, generator
from models.stable_diffusion import Inputs
from models.stock import AUTO, StockPipelines, stock
from tests import tiny
from workers.engine import Engine, Pass, Ticket

CARD = Catalog.read(["sdxl"])["sdxl"]
NOTHING = Inputs()
FAMILIES = {"sd": tiny.stable_diffusion, "sdxl": tiny.sdxl, "sd3": tiny.sd3, "flux": tiny.flux}
TASKS: dict[str, list[Task]] = {
    "sd": ["text-to-image", "image-to-image", "inpainting"],
    "sdxl": ["text-to-image", "image-to-image", "inpainting"],
    "sd3": ["text-to-image", "image-to-image", "inpainting"],
    "flux": ["text-to-image", "image-to-image", "inpainting"],
}
CASES = [(family, task) for family, tasks in TASKS.items() for task in tasks]
SCHEDULERS = ["ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "pndm", "heun", "deis"]

# The largest difference of a pixel in [0, 1]: in float64 the logic is the same, in float32 another row count adds up in
# another order, which random weights amplify.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("family", "task"), CASES)
def test_a_crowd_draws_what_the_stock_pipeline_draws_alone(family: str, task: Task, dtype: torch.dtype):
    model = resident(family, dtype)
    requests = mixed(family, task)
    tickets, passes = staggered(model, requests)
    for r, ticket in zip(requests, tickets, strict=True):
        expected = alone(model, r)
        assert (ticket.result - expected).abs().max() <= TOLERANCE[dtype]
        assert expected.std() > 0.01  # something was drawn
    assert max(p.calls for p in passes if p.net is model.denoiser) > 1  # and they did meet


@pytest.mark.parametrize(("family", "task"), CASES)
def test_progress_counts_steps_and_ends_with_all_of_them(family: str, task: Task):
    model = resident(family)
    for r in mixed(family, task):
        steps = r.num_inference_steps if r.strength is None else r.num_inference_steps // 2
        assert progress(model, r) == [(i, steps) for i in range(steps + 1)]


@pytest.mark.parametrize(("family", "task"), CASES)
def test_an_estimate_looks_like_the_picture_to_come(family: str, task: Task):
    """The last one of all: the latents are then decoded."""
    model = resident(family)
    for r in mixed(family, task):
        engine = Engine()
        ticket = engine.submit(model.draw(r, r.seed, inputs(r)))
        decoded = Tensor()
        while engine:
            if ticket.call and ticket.call.net is model.decoder:
                config = model.pipeline.vae.config
                decoded = (ticket.call.args["z"] - (config.shift_factor or 0)) * config.scaling_factor
            engine.step()
        assert ticket.estimate is not None
        assert ticket.estimate.shape == decoded.shape
        spread = (decoded - decoded.mean()).abs().mean()
        assert (ticket.estimate - decoded).abs().mean() < 0.35 * spread
        preview = model.colours.paint(ticket.estimate)
        assert preview.shape == (r.height // 2, r.width // 2, 3)


def test_colours_are_those_of_scaled_latents():
    """As the denoiser sees them: not as the autoencoder does."""
    model = resident("sd3")
    vae = model.pipeline.vae
    flat = torch.full((1, 3, 32, 32), 0.5)
    latents = (vae.encode(flat).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    own = model.colours.weights
    model.__dict__.pop("colours")
    vae.register_to_config(scaling_factor=vae.config.scaling_factor * 2)
    doubled = model.colours.paint(latents * 2 + 0).float()
    vae.register_to_config(scaling_factor=vae.config.scaling_factor / 2)
    model.__dict__.pop("colours")
    assert not torch.allclose(own, model.colours.weights * 2)
    assert (doubled - model.colours.paint(latents).float()).abs().max() <= 60


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_request_has_the_same_bytes_alone_and_in_a_crowd(family: str):
    model = resident(family)
    wanted = mixed(family, "text-to-image")[0]
    expected, _ = staggered(model, [wanted], exact=1)
    for neighbours in (mixed(family, "text-to-image")[1:], mixed(family, "image-to-image")):
        for exact in (1, 3):
            tickets, _ = staggered(model, [wanted, *neighbours], exact)
            assert torch.equal(tickets[0].result, expected[0].result)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_failing_call_is_raised_in_its_pipeline_and_hurts_nobody_else(family: str, monkeypatch: pytest.MonkeyPatch):
    model = resident(family)
    forward, fatal = model.denoiser.run, list[int]()

    def run(**args: Any) -> Any:
        if any(row.isnan().any() for row in args[hidden]):
            fatal.append(len(args[hidden]))
            raise ArithmeticError("not a number")
        return forward(**args)

    hidden = "sample" if family in ("sd", "sdxl") else "hidden_states"
    monkeypatch.setattr(model.denoiser, "run", run)
    requests = mixed(family, "text-to-image")
    expected, _ = staggered(model, requests)
    before = greenlets()
    engine = Engine()
    tickets = [engine.submit(model.draw(r, r.seed, NOTHING)) for r in requests[1:]]
    bad = engine.submit(spoilt(model.draw(requests[0], requests[0].seed, NOTHING), hidden))
    run_out(engine)
    assert isinstance(bad.error, ArithmeticError)
    assert any("diffusers" in frame for frame in frames(bad.error))  # it went through the pipeline
    for ticket, alike in zip(tickets, expected[1:], strict=True):
        assert (ticket.result - alike.result).abs().max() <= TOLERANCE[torch.float32]
    del bad, tickets
    assert greenlets() == before


def test_a_request_that_its_pipeline_refuses_fails_alone():
    model = resident("sd")
    engine = Engine()
    refused = engine.submit(model.draw(asked(width=33), 0, NOTHING))
    fine = engine.submit(model.draw(asked(num_inference_steps=1), 0, NOTHING))
    run_out(engine)
    assert isinstance(refused.error, ValueError)
    assert fine.result is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_canceled_program_leaves_no_greenlet_behind(family: str):
    model, before = resident(family), greenlets()
    for passes in range(5):
        engine = Engine()
        ticket = engine.submit(model.draw(asked(), 0, NOTHING))
        for _ in range(passes):
            engine.step()
        engine.cancel(ticket)
        assert not engine
        del ticket
        assert greenlets() == before
    assert torch.is_grad_enabled()


def test_what_a_request_held_is_free_when_it_is_done():
    """At once: not when Python looks for cycles, for it may hold a device's memory."""
    model = resident("sd")
    scheduler = samplers.scheduler("dpmpp_2m", model.scheduler_config)
    held = weakref.ref(scheduler)
    gc.disable()
    try:
        engine = Engine()
        arguments = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
        ticket = engine.submit(stock(model.pipeline, model.nets, scheduler, prompt="a cat", **arguments))
        del scheduler
        run_out(engine)
        assert ticket.error is None
        assert held() is None
    finally:
        gc.enable()


def test_a_program_that_is_not_given_a_scheduler_leaves_that_of_the_pipeline_alone():
    model = resident("sd")
    arguments = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
    engine = Engine()
    before = model.pipeline.scheduler.timesteps.clone()
    ticket = engine.submit(stock(model.pipeline, model.nets, prompt="a cat", **arguments))
    run_out(engine)
    assert ticket.result.images.shape == (1, 3, 32, 32)
    assert torch.equal(model.pipeline.scheduler.timesteps, before)


def test_residents_are_read_only_for_requests():
    model = resident("sdxl")

    def meddling() -> Iterator[Any]:
        program = stock(model.pipeline, model.nets, prompt="a cat", num_inference_steps=1, height=32, width=32)
        call = program.send(None)
        frame = next(o for o in gc.get_referrers(call.net) if isinstance(o, dict) and "suspend" in o)
        proxy = next(o for o in gc.get_referrers(frame) if hasattr(o, "suspend"))
        with pytest.raises(AttributeError, match="read-only"):
            proxy.training = True
        assert isinstance(proxy, nn.Module)
        assert proxy.to(torch.float16) is proxy
        program.close()
        yield from ()

    list(meddling())
    assert {p.dtype for p in model.pipeline.text_encoder.parameters()} == {torch.float32}


def test_the_autoencoder_of_sdxl_is_upcast_once_and_for_all():
    """Each stock pipeline casts it up and down again, which would pull it from under the others."""
    pipeline: Any = tiny.sdxl()
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.to(torch.float16)
    model = StockPipelines(card("sdxl"), pipeline)
    assert pipeline.vae.dtype == torch.float32
    requests = [asked(seed=i, num_inference_steps=2 + i, scheduler="euler") for i in range(2)]
    requests += [asked(seed=3, num_inference_steps=4, scheduler="ddim", image="given", strength=0.5)]
    tickets, _ = staggered(model, requests)
    assert pipeline.vae.dtype == torch.float32
    assert pipeline.unet.dtype == torch.float16
    assert all(ticket.result.isfinite().all() for ticket in tickets)


@pytest.mark.parametrize(("family", "kept"), [("sd", 75), ("sdxl", 75), ("sd3", 76), ("flux", 76)])
def test_words_that_are_not_seen_are_reported(family: str, kept: int):
    """Judged by the text encoder that sees most of them."""
    model = resident(family)
    (warning,) = model.warnings(asked(prompt="a" * 60 + "b" * 20 + "ten"))
    assert f"prompt is cut after {kept} tokens" in warning
    assert warning.endswith("ten' is not seen")
    assert model.warnings(asked(prompt="a" * 40)) == []


def test_no_more_words_are_encoded_than_the_card_says():
    model = StockPipelines(card("flux").model_copy(update={"limits": CARD.limits.model_copy(update={"prompt_tokens": 20})}),
                           FAMILIES["flux"]())  # fmt: skip
    seen = list[Call]()
    engine = Engine()
    ticket = engine.submit(noting(model.draw(asked(scheduler="flow_match"), 0, NOTHING), seen))
    run_out(engine)
    assert ticket.error is None
    assert {c.args["encoder_hidden_states"].shape[1] for c in seen if c.net is model.denoiser} == {20}
    assert "after 19 tokens" in model.warnings(asked(prompt="a" * 40))[0]


# -- requests and models


def card(family: str) -> ModelCard:
    limits = CARD.limits.model_copy(update={"prompt_tokens": 77})
    return CARD.model_copy(update={"name": family, "tasks": TASKS[family], "limits": limits, "reproducible_rows": 4})


@cache
def resident(family: str, dtype: torch.dtype = torch.float32) -> StockPipelines:
    pipeline: Any = FAMILIES[family]()
    pipeline.to(dtype)
    return StockPipelines(card(family), pipeline)


def asked(**given: Any) -> Parameters:
    defaults = {
        "model": "tiny",
        "prompt": "a cat",
        "width": 32,
        "height": 32,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "scheduler": "ddim",
        "seed": 0,
    }
    return Parameters.model_validate(defaults | given)


def mixed(family: str, task: Task) -> list[Parameters]:
    """Requests with different samplers, steps, guidance and sizes; half of the steps are left out with a picture."""
    pictures = {"image": "given", "strength": 0.5} if task != "text-to-image" else {}
    if task == "inpainting":
        pictures["mask"] = "given"
    names = SCHEDULERS if family in ("sd", "sdxl") else ["flow_match"] * 4
    return [
        asked(
            prompt=["a cat", "red house by the sea", "dog"][i % 3],
            negative_prompt=["", "ugly"][i % 2] if family != "flux" else "",
            scheduler=name,
            seed=100 + i,
            num_inference_steps=[4, 6, 8][i % 3],
            guidance_scale=[7.5, 1.0, 3.0][i % 3],
            width=[32, 48][i % 4 == 3],
            **pictures,
        )
        for i, name in enumerate(names)
    ]


def inputs(r: Parameters) -> Inputs:
    if r.image is None:
        return NOTHING
    noise = (torch.rand(r.height, r.width, 3, generator=generator(7)) * 255).byte()
    image = Image.fromarray(noise.numpy()).resize((r.width, r.height))
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (8, 8, 24, 24))
    return Inputs(image, mask if r.mask else None)


def alone(model: StockPipelines, r: Parameters) -> Tensor:
    """By the stock pipeline itself."""
    pipeline = AUTO[r.task].from_pipe(model.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = samplers.scheduler(r.scheduler, model.scheduler_config)
    given = inputs(r)
    arguments = {"image": given.image, "mask_image": given.mask, "strength": r.strength} if given.image else {}
    if not given.mask:
        arguments.pop("mask_image", None)
    if not (
        r.task == "image-to-image"
        and "Diffusion3" not in type(pipeline).__name__
        and "Flux" not in type(pipeline).__name__
    ):
        arguments |= {"width": r.width, "height": r.height}  # fmt: skip
    if "Diffusion3" in type(pipeline).__name__ or "Flux" in type(pipeline).__name__:
        arguments["max_sequence_length"] = 77
    return pipeline(
        r.prompt,
        negative_prompt=r.negative_prompt or None,
        num_inference_steps=r.num_inference_steps,
        guidance_scale=r.guidance_scale,
        generator=generator(r.seed),
        output_type="pt",
        **arguments,
    ).images[0]


def staggered(model: StockPipelines, requests: list[Parameters], exact: int = 0) -> tuple[list[Ticket], list[Pass]]:
    """One joins every second pass; the first `exact` of them in the exact lane."""
    passes, tickets = list[Pass](), list[Ticket]()
    engine, waiting = Engine(passes.append), list(enumerate(requests))
    while engine or waiting:
        if waiting and len(passes) >= 2 * len(tickets):
            i, r = waiting.pop(0)
            tickets.append(engine.submit(model.draw(r, r.seed, inputs(r)), seat=r.seed if i < exact else None))
        engine.step()
        if not engine:
            passes += []
            while waiting and not engine:
                i, r = waiting.pop(0)
                tickets.append(engine.submit(model.draw(r, r.seed, inputs(r)), seat=r.seed if i < exact else None))
    for ticket in tickets:
        if ticket.error:
            raise ticket.error
    return tickets, passes


def progress(model: StockPipelines, r: Parameters) -> list[Any]:
    """What a client is told, each once."""
    engine, told = Engine(), list[Any]()
    ticket = engine.submit(model.draw(r, r.seed, inputs(r)))
    while engine:
        if ticket.at and ticket.at not in told:
            told.append(ticket.at)
        engine.step()
    if ticket.error:
        raise ticket.error
    return told


def run_out(engine: Engine) -> None:
    while engine:
        engine.step()


def spoilt(program: Any, argument: str) -> Iterator[Call]:
    """Its second step is not a number."""
    call, steps = program.send(None), 0
    with contextlib.closing(program):
        while True:
            if argument in call.args and call.at:
                steps += 1
                if steps == 2:
                    call.args[argument] = call.args[argument] * torch.nan
            try:
                value = yield call
            except Exception as error:
                call = program.throw(error)
            else:
                call = program.send(value)


def noting(program: Any, calls: list[Call]) -> Iterator[Call]:
    call = program.send(None)
    while True:
        calls.append(call)
        try:
            call = program.send((yield call))
        except StopIteration as end:
            return end.value


def greenlets() -> int:
    """How many are neither finished nor the one of this thread."""
    gc.collect()
    return sum(isinstance(one, greenlet.greenlet) and not one.dead for one in gc.get_objects()) - 1


def frames(error: BaseException) -> list[str]:
    found, traceback = list[str](), error.__traceback__
    while traceback:
        found.append(traceback.tb_frame.f_code.co_filename)
        traceback = traceback.tb_next
    return found
