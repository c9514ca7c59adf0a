"""Unmodified diffusers pipelines as programs: together they draw what each would have drawn alone."""

import contextlib
import gc
import inspect
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
from models.loading import load_pipeline
from models.program import Call, Inputs, Net, generator
from models.stable_diffusion import StableDiffusion
from models.stock import AUTO, Proxy, StockPipelines, stock
from tests import tiny
from workers.engine import Canceled, Engine, Pass, Ticket

TOKENS = 77
CARD = Catalog.read(["sdxl"])["sdxl"]
NOTHING = Inputs()
FAMILIES = {"sd": tiny.stable_diffusion, "sdxl": tiny.sdxl, "sd3": tiny.sd3, "flux": tiny.flux}
TASKS: dict[str, list[Task]] = {
    "sd": ["text-to-image", "image-to-image", "inpaint"],
    "sdxl": ["text-to-image", "image-to-image", "inpaint"],
    "sd3": ["text-to-image", "image-to-image"],  # its inpainting takes 16 latent channels only
    "flux": ["text-to-image", "image-to-image", "inpaint"],
}
SOME = {"sd": "ddim", "sdxl": "euler", "sd3": "flow_match", "flux": "flow_match"}
CASES = [(family, task) for family, tasks in TASKS.items() for task in tasks]
SCHEDULERS = ["dpmpp_2m", "ddim", "euler", "heun", "unipc", "pndm", "deis", "euler_a"]

# The largest difference of a pixel in [0, 1]. In float64 it is the rounding to the float32 that a program returns: the
# logic is the same. In float32 another row count adds up in another order, which random weights amplify.
TOLERANCE = {torch.float64: 6e-8, torch.float32: 1e-5}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("family", "task", "dtype"),
    [(*case, torch.float64) for case in CASES] + [(family, "text-to-image", torch.float32) for family in FAMILIES],
)
def test_a_crowd_draws_what_the_stock_pipeline_draws_alone(family: str, task: Task, dtype: torch.dtype):
    model = resident(family, dtype)
    requests = mixed(family, task)
    tickets, passes = staggered(model, requests)
    for r, ticket in zip(requests, tickets, strict=True):
        expected = alone(model, r).float()
        assert (ticket.result - expected).abs().max() <= TOLERANCE[dtype]
        assert expected.std() > 0.01  # something was drawn
    assert max(p.calls for p in passes if p.net is model.denoiser) > 1  # and they did meet


@pytest.mark.parametrize(("family", "task"), CASES)
def test_progress_counts_steps_and_the_estimate_becomes_the_picture(family: str, task: Task):
    model = resident(family)
    for r in mixed(family, task):
        steps = r.num_inference_steps if r.strength is None else r.num_inference_steps // 2
        told, estimate, latents = followed(model, r)
        assert told == [(i, steps) for i in range(steps + 1)]
        assert estimate.shape == latents.shape == (1, 4, r.height // 2, r.width // 2)
        hole = slice(4, 12) if r.mask else slice(None)  # the rest is put back after the estimate
        estimate, latents = estimate[..., hole, hole], latents[..., hole, hole]
        assert (estimate - latents).abs().mean() < 0.5 * (latents - latents.mean()).abs().mean()


def followed(model: StockPipelines, r: Parameters) -> tuple[list[Any], Any, Tensor]:
    """What a client is told, each once; the last estimate; and the latents that are decoded."""
    engine, told, latents, estimate = Engine(), list[Any](), Tensor(), None
    ticket = engine.submit(model.draw(r, r.seed, inputs(r)))
    config = model.pipeline.vae.config
    while engine:
        estimate = ticket.estimate() if ticket.estimate else None
        if ticket.at and ticket.at not in told:
            told.append(ticket.at)
        if ticket.call and ticket.call.net is model.decoder:
            latents = (ticket.call.args["z"] - (config.shift_factor or 0)) * config.scaling_factor
        engine.step()
    assert ticket.error is None
    return told, estimate, latents


def test_the_shipped_model_has_the_same_colours_as_by_its_own_program():
    shipped = Catalog.read(["emoji-sd"])["emoji-sd"].model_copy(update={"tasks": ["text-to-image"]})
    pipeline = load_pipeline(shipped, "cpu")
    ours, theirs = StockPipelines(shipped, pipeline).colours, StableDiffusion(shipped, pipeline).colours
    torch.testing.assert_close(ours.weights, theirs.weights)


def test_colours_are_those_of_latents_as_the_denoiser_knows_them():
    """Shifted and scaled: not as the autoencoder returns them."""
    model = resident("sd3")
    config, picture = model.pipeline.vae.config, torch.rand(1, 3, 32, 32, generator=generator(1))
    with torch.no_grad():
        mean = model.pipeline.vae.encode(picture).latent_dist.mean
        torch.testing.assert_close(model.latent_means(picture), (mean - config.shift_factor) * config.scaling_factor)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_request_has_the_same_bytes_alone_and_in_a_crowd(family: str):
    model = resident(family)
    wanted = mixed(family, "text-to-image")[0]
    expected, _ = staggered(model, [wanted], exact=1)
    for exact, neighbours in ((1, mixed(family, "text-to-image")[1:]), (3, mixed(family, "image-to-image"))):
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


def test_a_canceled_program_leaves_no_greenlet_behind():
    before = greenlets()
    for family in FAMILIES:
        for passes in range(5):
            engine = Engine()
            ticket = engine.submit(resident(family).draw(asked(scheduler=SOME[family]), 0, NOTHING))
            for _ in range(passes):
                engine.step()
            engine.cancel(ticket)
            assert isinstance(ticket.error, Canceled)
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
    module = nn.Linear(2, 2)
    proxy: Any = Proxy(module, Net("linear", module), lambda call: call)
    assert isinstance(proxy, nn.Module)
    with pytest.raises(AttributeError, match="read-only"):
        proxy.training = False
    assert proxy.to(torch.float16) is proxy
    assert proxy.weight.dtype == torch.float32
    x = torch.ones(3, 2)
    assert proxy(x) == Call(proxy.net, {"input": x}, 3)


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
    limits = CARD.limits.model_copy(update={"prompt_tokens": 20})
    model = StockPipelines(card("flux").model_copy(update={"limits": limits}), tiny.flux())
    with torch.no_grad(), contextlib.closing(model.draw(asked(scheduler="flow_match"), 0, NOTHING)) as program:
        call = program.send(None)
        while call.net is not model.denoiser:
            call = program.send(call.net.run(**call.args))
    assert call.args["encoder_hidden_states"].shape[1] == 20
    assert "after 19 tokens" in model.warnings(asked(prompt="a" * 40))[0]


# -- requests and models


def card(family: str) -> ModelCard:
    limits = CARD.limits.model_copy(update={"prompt_tokens": TOKENS})
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
    if task == "inpaint":
        pictures["mask"] = "given"
    steps = [4, 6, 4] if pictures else [3, 4, 2]
    names = (SCHEDULERS[1::2] if pictures else SCHEDULERS) if family in ("sd", "sdxl") else ["flow_match"] * 4
    return [
        asked(
            prompt=["a cat", "red house by the sea", "dog"][i % 3],
            negative_prompt=["", "ugly"][i % 2] if family != "flux" else "",
            scheduler=name,
            seed=100 + i,
            num_inference_steps=steps[i % 3],
            guidance_scale=[7.5, 1.0, 3.0][i % 3],
            width=[32, 48][i % 3 == 2],
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
    pipeline = AUTO[r.kind].from_pipe(model.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = samplers.scheduler(r.scheduler, model.scheduler_config)
    given = inputs(r)
    offered = {
        "image": given.image,
        "mask_image": given.mask,
        "strength": r.strength,
        "width": r.width,
        "height": r.height,
        "max_sequence_length": TOKENS,
        "negative_prompt": r.negative_prompt or None,
    }
    takes = inspect.signature(pipeline.__call__).parameters
    return pipeline(
        prompt=r.prompt,
        num_inference_steps=r.num_inference_steps,
        guidance_scale=r.guidance_scale,
        generator=generator(r.seed),
        output_type="pt",
        **{name: value for name, value in offered.items() if name in takes and value is not None},
    ).images[0]


def staggered(model: StockPipelines, requests: list[Parameters], exact: int = 0) -> tuple[list[Ticket], list[Pass]]:
    """One joins before each pass; the first `exact` of them in the exact lane."""
    passes, tickets = list[Pass](), list[Ticket]()
    engine = Engine(passes.append)
    for i, r in enumerate(requests):
        tickets.append(engine.submit(model.draw(r, r.seed, inputs(r)), seat=r.seed if i < exact else None))
        engine.step()
    run_out(engine)
    for ticket in tickets:
        if ticket.error:
            raise ticket.error
    return tickets, passes


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


def greenlets() -> int:
    """How many are not finished."""
    return sum(isinstance(one, greenlet.greenlet) and not one.dead for one in gc.get_objects())


def frames(error: BaseException) -> list[str]:
    found, traceback = list[str](), error.__traceback__
    while traceback:
        found.append(traceback.tb_frame.f_code.co_filename)
        traceback = traceback.tb_next
    return found
