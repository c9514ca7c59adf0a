"""Models with an IP-Adapter, in a crowd: each takes up its own picture, as diffusers' pipelines would alone."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor

from app.schemas import GenerationRequest, Parameters, Task
from models import samplers
from models.catalog import Catalog, Folder
from models.loading import ModelUnavailable, load_parts, load_pipeline
from models.program import Inputs, generator
from models.stock import StockPipelines
from tests import tiny
from tests.test_journal import resumed_with_the_same_bytes
from tests.test_stable_diffusion import as_image, run_out
from tests.test_stock import asked
from workers.curve import warm_up
from workers.engine import Engine, Pass

CARD = Catalog.read(["sd15-ip-adapter"])["sd15-ip-adapter"]
CLASSES: dict[Task, Any] = {
    "text-to-image": StableDiffusionPipeline,
    "image-to-image": StableDiffusionImg2ImgPipeline,
}


def encoder() -> Any:
    torch.manual_seed(2)
    return tiny.clip_vision()


@cache
def resident() -> StockPipelines:
    pipeline: Any = tiny.stable_diffusion()
    limits = CARD.limits.model_copy(update={"prompt_tokens": tiny.TOKENS})
    size = CARD.size.model_copy(update={"width": 32, "height": 32})
    card = CARD.model_copy(update={"limits": limits, "size": size, "reproducible_rows": 4})
    parts = {"ip_adapter": tiny.ip_adapter(pipeline.unet), "image_encoder": encoder()}
    model = StockPipelines(card, pipeline, parts)
    for module in model.modules:
        module.double()
    return model


def looking(task: Task, seed: int, **given: Any) -> tuple[Parameters, Inputs]:
    """A request with a picture of its own to look at, which is not square."""
    noise = [as_image(torch.rand(3, 32, 48 - 16 * i, generator=generator(10 * seed + i))) for i in range(2)]
    image: Image.Image | None = None
    if task == "image-to-image":
        image = noise[1]
        given |= {"image": "given", "strength": 0.5}
    return asked(seed=seed, ip_adapter_image="given", **given), Inputs(image, ip_adapter_image=noise[0])


def alone(task: Task, r: Parameters, inputs: Inputs) -> Tensor:
    """By a pipeline of its own, that nobody else has turned a scale of."""
    base: Any = tiny.stable_diffusion()
    looks = encoder()
    side = looks.config.image_size
    base.register_modules(
        image_encoder=looks,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
    )
    base.load_ip_adapter(tiny.ip_adapter(base.unet), subfolder="", weight_name="")
    pipeline = CLASSES[task](**base.components, requires_safety_checker=False).to(torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = samplers.scheduler(r.scheduler, resident().scheduler_config)
    pipeline.set_ip_adapter_scale(1.0 if r.ip_adapter_scale is None else r.ip_adapter_scale)
    size = {"image": inputs.image, "strength": r.strength} if inputs.image else {"width": 32, "height": 32}
    output = pipeline(
        prompt=r.prompt,
        num_inference_steps=r.num_inference_steps,
        guidance_scale=r.guidance_scale,
        ip_adapter_image=inputs.ip_adapter_image,
        generator=generator(r.seed),
        output_type="pt",
        **size,
    )
    return output.images[0].float()


@pytest.mark.parametrize("task", list(CLASSES))
def test_a_crowd_looks_each_at_its_own_picture(task: Task):
    model, passes = resident(), list[Pass]()
    engine = Engine(passes.append)
    wanted = [
        looking(task, seed, **given)
        for seed, given in enumerate(({}, {"scheduler": "euler"}, {"ip_adapter_scale": 0.4}, {"guidance_scale": 1.0}))
    ]
    tickets = [engine.submit(model.draw(r, r.seed, inputs)) for r, inputs in wanted]
    run_out(engine, *tickets)
    for ticket, (r, inputs) in zip(tickets, wanted, strict=True):
        assert (ticket.result - alone(task, r, inputs)).abs().max() < 6e-8
    assert max(one.calls for one in passes if one.net is model.nets["image_encoder"]) > 1
    assert max(one.calls for one in passes if one.net is model.denoiser) > 1


def test_another_picture_or_less_of_it_makes_another_picture():
    (r, one), (_, other) = (looking("text-to-image", seed) for seed in (1, 2))
    drawn = alone("text-to-image", r, one)
    assert (drawn - alone("text-to-image", r, other)).abs().max() > 1e-3
    less = r.model_copy(update={"ip_adapter_scale": 0.2})
    assert (drawn - alone("text-to-image", less, one)).abs().max() > 1e-3


def test_it_goes_on_with_the_same_bytes():
    r, inputs = looking("text-to-image", 3, reproducible=True)
    resumed_with_the_same_bytes(resident(), r, inputs)


def test_it_is_measured_before_its_first_request():
    assert {net.name for net in warm_up(resident(), 4)} == {"unet", "vae.decode"}


@pytest.mark.parametrize(
    ("model", "given", "problem"),
    [
        ("sd15-ip-adapter", {}, ("ip_adapter_image", "sd15-ip-adapter needs one, for its IP-Adapter")),
        ("sdxl", {"ip_adapter_image": "x"}, ("ip_adapter_image", "sdxl has no IP-Adapter")),
        ("sdxl", {"ip_adapter_scale": 1.0}, ("ip_adapter_scale", "needs a `ip_adapter_image`")),
    ],
)
def test_a_picture_to_look_at_goes_with_a_model_that_looks(model: str, given: Any, problem: tuple[str, str]):
    card = Catalog.read([model])[model]
    assert list(card.problems(GenerationRequest(prompt="a cat", **given))) == [problem]


def test_its_weights_come_from_a_file_and_a_folder(tmp_path: Path):
    pipeline: Any = tiny.stable_diffusion()
    tiny.save(pipeline, tmp_path / "model")
    halves = tiny.ip_adapter(pipeline.unet)
    flat = {f"{half}.{name}": weights for half, own in halves.items() for name, weights in own.items()}
    safetensors.torch.save_file(flat, tmp_path / "ip-adapter.safetensors")
    encoder().save_pretrained(tmp_path / "encoder")
    places = {
        "ip_adapter": str(tmp_path / "ip-adapter.safetensors"),
        "image_encoder": str(tmp_path / "encoder"),
    }
    source = Folder(kind="folder", path=tmp_path / "model")
    card = CARD.model_copy(update={"source": source, "parts": places, "dtype": CARD.dtype})
    read = StockPipelines(card, load_pipeline(card, "cpu"), load_parts(card, "cpu"))
    made = StockPipelines(card, pipeline, {"ip_adapter": halves, "image_encoder": encoder()})
    r, inputs = looking("text-to-image", 4)
    engine = Engine()
    tickets = [engine.submit(model.draw(r, r.seed, inputs)) for model in (read, made)]
    run_out(engine, *tickets)
    assert torch.equal(*(ticket.result for ticket in tickets))


def test_what_is_no_ip_adapter_is_refused(tmp_path: Path):
    safetensors.torch.save_file({"unet.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    card = CARD.model_copy(update={"parts": {"ip_adapter": str(tmp_path / "other.safetensors")}})
    with pytest.raises(ModelUnavailable, match=r"no IP-Adapter: it has unet\.weight"):
        load_parts(card, "cpu")
