"""Pipelines after pipelines, and pipelines with several denoisers: a crowd draws what diffusers draws alone."""

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from app.schemas import Parameters
from models.catalog import CARDS, ModelCard, read_cards
from models.families import FAMILIES
from models.program import Inputs, generator
from models.stock_stages import picture
from models.unclip import slerp
from tests import tiny
from tests.test_journal import resumed_with_the_same_bytes
from tests.test_stable_diffusion import NOTHING, as_image, run_out, threads
from workers.curve import warm_up
from workers.engine import Engine, Pass

ALL = {card.name: card for card in read_cards(CARDS)}
PICTURES = [as_image(torch.rand(3, 32, 32, generator=generator(seed))) for seed in (1, 2)]
TOLERANCE = 6e-8  # in float64, the rounding to the float32 that a program returns; in float32 random weights amplify


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def brief(name: str, **steps: int) -> ModelCard:
    """The card, with short stages."""
    card = ALL[name]
    stages = {stage: own.model_copy(update={"num_inference_steps": steps[stage]}) for stage, own in card.stages.items()}
    return card.model_copy(update={"stages": stages})


@cache
def model(name: str) -> Any:
    """With random weights, in double precision."""

    def double(pipeline: Any) -> Any:
        return pipeline.to(torch.float64)

    if name == "deepfloyd-if":
        base, upsampler = map(double, tiny.deepfloyd())
        return FAMILIES["deepfloyd"](brief(name, upsampler=3), base, {"upsampler": upsampler})
    if name == "kandinsky22":
        prior, decoder = map(double, tiny.kandinsky())
        return FAMILIES["kandinsky"](brief(name, prior=3), decoder, {"prior": prior})
    if name == "karlo":
        return FAMILIES["karlo"](brief(name, prior=3, upsampler=4), double(tiny.karlo()), {})
    own = {"dit": tiny.dit, "amused": tiny.amused, "sd-x4-upscaler": tiny.upscaler}[name]
    return FAMILIES[ALL[name].family](brief(name), double(own()), {})


def asked(name: str, **given: Any) -> Parameters:
    card = ALL[name]
    prompt = "goldfish" if card.classes else "a cat"
    defaults: dict[str, Any] = {"prompt": prompt, "width": 32, "height": 32, "num_inference_steps": 4, "seed": 0}
    if name == "amused":
        defaults |= {"width": 8, "height": 8}
    if name == "sd-x4-upscaler":
        defaults |= {"width": 64, "height": 64, "task": "upscale", "image": "given"}
    own = {"model": name, "guidance_scale": 3.0, "scheduler": card.defaults.scheduler}
    return Parameters.model_validate(defaults | own | given)


# -- by diffusers alone


def own_copy(pipeline: Any) -> Any:
    """With schedulers of its own: they remember."""
    again = copy.copy(pipeline)
    for name, one in pipeline.components.items():
        if hasattr(one, "set_timesteps"):
            again.__dict__[name] = copy.deepcopy(one)
    return again


def deepfloyd(r: Parameters, inputs: Inputs) -> Tensor:
    base, upsampler = (own_copy(p) for p in model(r.model).pipelines.values())
    rng = generator(r.seed)
    words = base.encode_prompt(r.prompt, negative_prompt=r.negative_prompt)
    told = dict(zip(("prompt_embeds", "negative_prompt_embeds"), words, strict=True))
    steps = {"num_inference_steps": r.num_inference_steps, "guidance_scale": r.guidance_scale}
    small = base(**told, **steps, width=16, height=16, generator=rng, output_type="pt").images
    steps = {"num_inference_steps": 3, "guidance_scale": 4.0}
    return picture(upsampler(**told, image=small, **steps, width=32, height=32, generator=rng, output_type="np").images)


def kandinsky(r: Parameters, inputs: Inputs) -> Tensor:
    prior, decoder = (own_copy(p) for p in model(r.model).pipelines.values())
    rng = generator(r.seed)

    def imagined(prompt: str) -> Tensor:
        return prior(prompt, num_inference_steps=3, guidance_scale=4.0, generator=rng).image_embeds

    def seen(image: Image.Image) -> Tensor:
        pixels = prior.image_processor(image, return_tensors="pt").pixel_values
        return prior.image_encoder(pixels.to(prior.image_encoder.dtype)).image_embeds

    embedding = imagined(r.prompt) if inputs.image is None else seen(inputs.image)
    if r.kind == "interpolate":
        end = imagined(r.end_prompt or "") if inputs.end_image is None else seen(inputs.end_image)
        embedding = slerp(embedding, end, r.mix or 0.0)
    away = imagined(r.negative_prompt) if r.negative_prompt else prior.get_zero_embed()
    steps = {"num_inference_steps": r.num_inference_steps, "guidance_scale": r.guidance_scale}
    told = {"image_embeds": embedding, "negative_image_embeds": away}
    return picture(decoder(**told, **steps, width=32, height=32, generator=rng, output_type="np").images)


def karlo(r: Parameters, inputs: Inputs) -> Tensor:
    output = own_copy(model(r.model).pipelines["whole"])(
        prompt=r.prompt,
        prior_num_inference_steps=3,
        prior_guidance_scale=4.0,
        decoder_num_inference_steps=r.num_inference_steps,
        decoder_guidance_scale=r.guidance_scale,
        super_res_num_inference_steps=4,
        generator=generator(r.seed),
        output_type="np",
    )
    return picture(output.images)


def dit(r: Parameters, inputs: Inputs) -> Tensor:
    pipeline = own_copy(model(r.model).pipelines["whole"])
    output = pipeline(
        pipeline.get_label_ids([r.prompt]),
        num_inference_steps=r.num_inference_steps,
        guidance_scale=r.guidance_scale,
        generator=generator(r.seed),
        output_type="np",
    )
    return picture(output.images)


def amused(r: Parameters, inputs: Inputs) -> Tensor:
    output = own_copy(model(r.model).pipelines["whole"])(
        r.prompt,
        num_inference_steps=r.num_inference_steps,
        guidance_scale=r.guidance_scale,
        height=8,
        width=8,
        generator=generator(r.seed),
        output_type="np",
    )
    return picture(output.images)


def upscaler(r: Parameters, inputs: Inputs) -> Tensor:
    assert inputs.image is not None
    output = own_copy(model(r.model).pipelines["whole"])(
        r.prompt,
        image=inputs.image.resize((16, 16), Image.Resampling.BOX),
        noise_level=20,
        num_inference_steps=r.num_inference_steps,
        guidance_scale=r.guidance_scale,
        generator=generator(r.seed),
        output_type="np",
    )
    return picture(output.images)


BY_ITSELF = {
    "deepfloyd-if": deepfloyd,
    "kandinsky22": kandinsky,
    "karlo": karlo,
    "dit": dit,
    "amused": amused,
    "sd-x4-upscaler": upscaler,
}


def beside(name: str) -> Inputs:
    return Inputs(as_image(torch.rand(3, 64, 64, generator=generator(5)))) if name == "sd-x4-upscaler" else NOTHING


def mixed(name: str) -> list[tuple[Parameters, Inputs]]:
    prompts = ["goldfish", "white shark"] if ALL[name].classes else ["a cat", "a red house by the sea"]
    return [
        (asked(name, seed=i, prompt=prompts[i % 2], num_inference_steps=steps, guidance_scale=scale), beside(name))
        for i, (steps, scale) in enumerate([(4, 3.0), (6, 1.0), (3, 5.0)])
    ]


TASKS: dict[str, tuple[dict[str, Any], Inputs]] = {
    "variation": ({"prompt": "", "image": "given"}, Inputs(PICTURES[0])),
    "interpolate": ({"end_prompt": "a dog", "mix": 0.3}, NOTHING),
    "interpolate pictures": (
        {"prompt": "", "image": "a", "end_image": "b", "mix": 0.7},
        Inputs(PICTURES[0], None, PICTURES[1]),
    ),
    "negative": ({"negative_prompt": "a dog"}, NOTHING),
}


def crowd(name: str, requests: list[tuple[Parameters, Inputs]]) -> tuple[list[Any], list[Pass]]:
    passes, tickets = list[Pass](), list[Any]()
    engine = Engine(passes.append)
    for r, inputs in requests:
        tickets.append(engine.submit(model(name).draw(r, r.seed, inputs)))
        engine.step()
    run_out(engine, *tickets)
    return tickets, passes


@pytest.mark.parametrize("name", BY_ITSELF)
def test_a_crowd_draws_what_each_would_alone(name: str):
    requests = mixed(name)
    tickets, passes = crowd(name, requests)
    for (r, inputs), ticket in zip(requests, tickets, strict=True):
        with torch.no_grad():
            expected = BY_ITSELF[name](r, inputs).float()
        assert expected.std() > 0.01
        assert (ticket.result - expected).abs().max() <= TOLERANCE
    assert max(done.calls for done in passes if done.net is model(name).denoiser) > 1


@pytest.mark.parametrize("task", TASKS)
def test_kandinsky_does_more_than_draw_a_caption(task: str):
    given, inputs = TASKS[task]
    named = {} if task == "negative" else {"task": task.split()[0]}
    requests = [(asked("kandinsky22", seed=seed, **given, **named), inputs) for seed in (0, 1)]
    tickets, _ = crowd("kandinsky22", requests)
    for (r, inputs), ticket in zip(requests, tickets, strict=True):
        with torch.no_grad():
            expected = kandinsky(r, inputs)
        assert (ticket.result - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("deepfloyd-if", ["base"] * 4 + ["upsampler"] * 3),
        ("kandinsky22", ["prior"] * 3 + ["base"] * 4),
        ("karlo", ["prior"] * 3 + ["base"] * 4 + ["upsampler"] * 4),
        ("dit", ["base"] * 4),
        ("amused", ["base"] * 4),
        ("sd-x4-upscaler", ["base"] * 4),
    ],
)
def test_progress_counts_through_all_stages(name: str, stages: list[str]):
    engine, told = Engine(), list[Any]()
    ticket = engine.submit(model(name).draw(asked(name), 0, beside(name)))
    while engine:
        if ticket.call and ticket.call.at and ticket.call.net in model(name).stages:
            told.append((ticket.call.at, ticket.stage))
        engine.step()
    run_out(engine, ticket)
    assert told == [((i, len(stages)), stage) for i, stage in enumerate(stages)]


@pytest.mark.parametrize("name", BY_ITSELF)
def test_it_goes_on_with_the_same_bytes_after_a_kill(name: str):
    resumed_with_the_same_bytes(model(name), asked(name, reproducible=True), beside(name))


@pytest.mark.parametrize("name", BY_ITSELF)
def test_it_is_measured_at_warm_up(name: str):
    size = {"amused": 8, "sd-x4-upscaler": 64}.get(name, 32)
    card = model(name).card
    own = card.size.model_copy(update={"width": size, "height": size})
    small = copy.copy(model(name))
    small.card = card.model_copy(update={"size": own})
    curves = warm_up(small, 2)
    assert set(curves) == {small.denoiser, small.decoder}


def test_nets_of_several_pipelines_are_told_apart_in_metrics():
    names = [net.name for name in BY_ITSELF for net in (model(name).denoiser, model(name).decoder)]
    assert names[:4] == ["base.unet", "upsampler.unet", "decoder.unet", "decoder.movq.decode"]
    assert len(set(names[4:6])) == 2


def test_words_that_are_not_seen_are_reported():
    long = asked("karlo", prompt="x" * 200)
    assert "prompt is cut" in model("karlo").warnings(long)[0]
    assert model("dit").warnings(asked("dit")) == []
    assert "negative" in model("karlo").warnings(asked("karlo", negative_prompt="a dog"))[0]
    varied = asked("kandinsky22", task="variation", image="given", prompt="a dog", end_prompt="a cat")
    assert "without regard to prompts" in model("kandinsky22").warnings(varied)[0]
