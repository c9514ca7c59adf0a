"""Models with a ControlNet, in a crowd: each follows its own picture, as diffusers' pipelines would alone."""

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionControlNetImg2ImgPipeline, StableDiffusionControlNetPipeline
from PIL import Image
from torch import Tensor

from app.schemas import GenerationRequest, Parameters, Task
from models import samplers
from models.catalog import Catalog
from models.program import Inputs, generator
from models.stock import StockPipelines
from tests import tiny
from tests.test_journal import resumed_with_the_same_bytes
from tests.test_stable_diffusion import as_image, run_out
from tests.test_stock import asked
from workers.curve import warm_up
from workers.engine import Engine, Pass

CARD = Catalog.read(["sd15-canny"])["sd15-canny"]
CLASSES: dict[Task, Any] = {
    "text-to-image": StableDiffusionControlNetPipeline,
    "image-to-image": StableDiffusionControlNetImg2ImgPipeline,
}


@cache
def resident() -> StockPipelines:
    pipeline: Any = tiny.stable_diffusion()
    limits = CARD.limits.model_copy(update={"prompt_tokens": tiny.TOKENS})
    size = CARD.size.model_copy(update={"width": 32, "height": 32})
    card = CARD.model_copy(update={"limits": limits, "size": size, "reproducible_rows": 4})
    return StockPipelines(card, pipeline.to(torch.float64), {"controlnet": tiny.controlnet(pipeline.unet).double()})


def following(task: Task, seed: int, **given: Any) -> tuple[Parameters, Inputs]:
    """A request to follow a picture of its own."""
    noise = [as_image(torch.rand(3, 32, 32, generator=generator(10 * seed + i))) for i in range(2)]
    image: Image.Image | None = None
    if task == "image-to-image":
        image = noise[1]
        given |= {"image": "given", "strength": 0.5}
    return asked(seed=seed, control_image="given", **given), Inputs(image, control_image=noise[0])


def alone(task: Task, r: Parameters, inputs: Inputs) -> Tensor:
    pipeline = CLASSES[task](**resident().pipeline.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = samplers.scheduler(r.scheduler, resident().scheduler_config)
    pictures: dict[str, Any] = {"image": inputs.control_image, "width": 32, "height": 32}
    if task == "image-to-image":
        pictures = {"image": inputs.image, "control_image": inputs.control_image, "strength": r.strength}
    output = pipeline(
        prompt=r.prompt,
        num_inference_steps=r.num_inference_steps,
        guidance_scale=r.guidance_scale,
        controlnet_conditioning_scale=1.0 if r.control_scale is None else r.control_scale,
        generator=generator(r.seed),
        output_type="pt",
        **pictures,
    )
    return output.images[0].float()


@pytest.mark.parametrize("task", list(CLASSES))
def test_a_crowd_follows_each_its_own_picture(task: Task):
    model, passes = resident(), list[Pass]()
    engine = Engine(passes.append)
    wanted = [
        following(task, seed, **given)
        for seed, given in enumerate(({}, {"scheduler": "euler"}, {"control_scale": 0.5}))
    ]
    tickets = [engine.submit(model.draw(r, r.seed, inputs)) for r, inputs in wanted]
    run_out(engine, *tickets)
    for ticket, (r, inputs) in zip(tickets, wanted, strict=True):
        assert (ticket.result - alone(task, r, inputs)).abs().max() < 6e-8
    assert max(one.calls for one in passes if one.net is model.nets["controlnet"]) > 1
    assert max(one.calls for one in passes if one.net is model.denoiser) > 1


def test_another_picture_to_follow_makes_another_picture():
    (r, one), (_, other) = (following("text-to-image", seed) for seed in (1, 2))
    assert (alone("text-to-image", r, one) - alone("text-to-image", r, other)).abs().max() > 1e-3


def test_it_goes_on_with_the_same_bytes():
    r, inputs = following("text-to-image", 3, reproducible=True)
    resumed_with_the_same_bytes(resident(), r, inputs)


def test_it_is_measured_before_its_first_request():
    assert {net.name for net in warm_up(resident(), 4)} == {"unet", "vae.decode"}


@pytest.mark.parametrize(
    ("model", "given", "problem"),
    [
        ("sd15-canny", {}, ("control_image", "sd15-canny needs one, for its ControlNet")),
        ("sdxl", {"control_image": "x"}, ("control_image", "sdxl has no ControlNet")),
        ("sdxl", {"control_scale": 1.0}, ("control_scale", "needs a `control_image`")),
    ],
)
def test_a_picture_to_follow_goes_with_a_model_that_follows_one(model: str, given: Any, problem: tuple[str, str]):
    card = Catalog.read([model])[model]
    assert list(card.problems(GenerationRequest(prompt="a cat", **given))) == [problem]
