"""LoRA adapters: each request draws with its own, whoever shares the engine, and the weights stay one copy."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from app.images import parameters_text
from app.schemas import Parameters
from models import samplers
from models.catalog import Catalog, Folder, ModelCard
from models.loading import ModelUnavailable, UnsafeWeights, load_pipeline
from models.program import generator
from models.stable_diffusion import StableDiffusion
from models.stock import StockPipelines
from tests import tiny
from tests.test_journal import resumed_with_the_same_bytes
from tests.test_stable_diffusion import NOTHING, alone, run_out, threads
from tests.test_stable_diffusion import asked as asked_of_sd
from workers.engine import Engine, Pass

SETS: list[list[dict[str, Any]]] = [
    [],
    [{"name": "ink"}],
    [{"name": "ink", "scale": 0.3}],
    [{"name": "clay"}, {"name": "ink", "scale": -0.5}],
]
TOLERANCE = 1e-5  # of a pixel in [0, 1], in float32


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, an adapter of its denoiser and text encoder (ink) and one of its denoiser alone (clay)."""
    folder = tmp_path_factory.mktemp("lora")
    pipeline: Any = tiny.stable_diffusion()
    tiny.save(pipeline, folder / "model")
    for seed, name in enumerate(("ink", "clay")):
        torch.manual_seed(seed)
        layers = {"unet_lora_layers": layers_of(pipeline.unet, name, ["to_q", "to_v", "to_out.0"])}
        if name == "ink":
            layers["text_encoder_lora_layers"] = layers_of(pipeline.text_encoder, name, ["q_proj", "v_proj"])
        StableDiffusionPipeline.save_lora_weights(folder / name, **layers)
    return folder


def layers_of(module: Any, name: str, targets: list[str]) -> dict[str, Tensor]:
    module.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False), name)
    return get_peft_model_state_dict(module, adapter_name=name)


def card_of(folder: Path, **loras: str) -> ModelCard:
    source = Folder(kind="folder", path=folder / "model")
    limits = {"source": source, "loras": loras, "parts": {}, "name": "tiny"}
    return Catalog.read(["emoji-sd"])["emoji-sd"].model_copy(update=limits)


@pytest.fixture(scope="module")
def model(folder: Path) -> StableDiffusion:
    card = card_of(folder, ink=str(folder / "ink"), clay=str(folder / "clay" / "pytorch_lora_weights.safetensors"))
    return StableDiffusion(card, load_pipeline(card, "cpu"))


def asked(**given: Any) -> Parameters:
    small = {"model": "tiny", "width": 32, "height": 32, "num_inference_steps": 4, "scheduler": "ddim"}
    return asked_of_sd(**small | given)


def stock(model: StableDiffusion | StockPipelines, r: Parameters) -> Tensor:
    """By diffusers alone."""
    pipeline = copy.copy(model.pipeline)
    pipeline.__dict__["scheduler"] = samplers.scheduler(r.scheduler, model.scheduler_config)
    if r.loras:
        pipeline.enable_lora()
        pipeline.set_adapters([lora.name for lora in r.loras], [lora.scale for lora in r.loras])
    else:
        pipeline.disable_lora()
    model.wardrobe.worn = None  # behind its back
    sizes = {"width": r.width, "height": r.height, "num_inference_steps": r.num_inference_steps}
    output = pipeline(r.prompt, guidance_scale=r.guidance_scale, generator=generator(r.seed), output_type="pt", **sizes)
    return output.images[0].float()


@pytest.mark.parametrize("loras", SETS, ids=["none", "one", "a third of it", "two"])
def test_the_stock_pipeline_draws_the_same_with_the_same_adapters(model: StableDiffusion, loras: list[Any]):
    r = asked(loras=loras)
    assert (alone(model, r) - stock(model, r)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("loras", SETS[:3], ids=["none", "one", "a third of it"])
def test_so_does_a_stock_program(tmp_path: Path, loras: list[Any]):
    pipeline: Any = tiny.sdxl()
    tiny.save(pipeline, tmp_path / "model")
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path / "ink", unet_lora_layers=layers_of(pipeline.unet, "ink", ["to_q", "to_v"])
    )
    card = card_of(tmp_path, ink=str(tmp_path / "ink")).model_copy(update={"tasks": ["text-to-image"]})
    model = StockPipelines(card, load_pipeline(card, "cpu"))
    other, r = asked(seed=5, scheduler="euler"), asked(loras=loras, scheduler="euler")
    engine = Engine()
    tickets = [engine.submit(model.draw(one, one.seed, NOTHING)) for one in (other, r)]
    run_out(engine, *tickets)
    assert (tickets[1].result - stock(model, r)).abs().max() <= TOLERANCE


def test_each_draws_with_its_own_in_any_company(model: StableDiffusion):
    requests = [asked(loras=loras, seed=seed) for seed in (1, 2) for loras in SETS]
    by_itself = [alone(model, r) for r in requests]
    engine, passes, tickets = Engine(lambda done: passes.append(done)), list[Pass](), list[Any]()
    for r in requests:
        tickets.append(engine.submit(model.draw(r, r.seed, NOTHING)))
        engine.step()
    run_out(engine, *tickets)
    for ticket, expected in zip(tickets, by_itself, strict=True):
        assert (ticket.result - expected).abs().max() <= TOLERANCE
    different = [(a - b).abs().max() for i, a in enumerate(by_itself[:4]) for b in by_itself[:i]]
    assert min(different) > 1e-3  # adapters do something
    assert max(done.calls for done in passes if done.net.name == "denoise") == 2  # and the same ones meet


def test_a_request_without_adapters_draws_what_a_model_without_any_does(model: StableDiffusion, folder: Path):
    bare = StableDiffusion(card_of(folder), load_pipeline(card_of(folder), "cpu"))
    r = asked(reproducible=True)
    assert torch.equal(alone(model, r, exact=True), alone(bare, r, exact=True))


def test_it_goes_on_with_the_same_bytes_after_a_kill(model: StableDiffusion):
    resumed_with_the_same_bytes(model, asked(loras=SETS[3], reproducible=True))


def test_an_adapter_that_a_model_has_not_is_named(model: StableDiffusion):
    def wrong(*names: str) -> dict[str, str]:
        return dict(model.card.problems(asked(width=64, height=64, loras=[{"name": name} for name in names])))

    assert wrong("ink", "clay") == {}
    assert wrong("ink", "oil") == {"loras.1.name": "tiny has no 'oil'; it has ink, clay"}
    assert wrong("ink", "ink") == {"loras.1.name": "ink is there already"}
    assert model.card.public().loras == ["ink", "clay"]


def test_adapters_that_cannot_be_read_make_the_model_unavailable(folder: Path, tmp_path: Path):
    torch.save({}, tmp_path / "lora.bin")
    with pytest.raises(UnsafeWeights, match=r"lora\.bin is a pickle"):
        load_pipeline(card_of(folder, ink=str(tmp_path)), "cpu")
    with pytest.raises(ModelUnavailable, match=r"tiny: cannot load its LoRA ink from .*nowhere"):
        load_pipeline(card_of(folder, ink=str(tmp_path / "nowhere")), "cpu")


def test_a_family_that_cannot_wear_adapters_has_none_on_its_card():
    card = Catalog.read(["emoji-glide"])["emoji-glide"]
    with pytest.raises(ValueError, match="loras: the family glide has none"):
        ModelCard.model_validate(card.model_dump() | {"loras": {"ink": "ink"}})


def test_a_picture_says_what_it_wore():
    assert parameters_text(asked(prompt="a cat", loras=SETS[2]), 0).startswith("a cat <lora:ink:0.3>\n")
