"""What a card says of precision and speed is done, and each picture stays what it was but for rounding."""

import importlib.util
from typing import Any

import pytest
import structlog
import torch
from diffusers import ModelMixin
from torch import Tensor

from models import prepare
from models.catalog import Catalog, Dtype, ModelCard, Speed
from models.loading import load_pipeline
from models.prepare import decided, dtype_of
from models.program import Inputs
from models.stable_diffusion import StableDiffusion
from tests.test_stable_diffusion import asked
from workers.engine import Engine
from workers.journal import model_identity

CARD = Catalog.read(["emoji-sd"])["emoji-sd"]
A_LEVEL = 1 / 255


def card(dtype: str = "float32", **speed: Any) -> ModelCard:
    return CARD.model_copy(update={"dtype": Dtype.model_validate({"cpu": dtype}), "speed": Speed(**speed)})


def load(some: ModelCard) -> StableDiffusion:
    return StableDiffusion(some, load_pipeline(some, "cpu"))


def drawn(model: StableDiffusion, count: int = 1, **fields: Any) -> list[Tensor]:
    engine = Engine()
    requests = [asked(num_inference_steps=3, seed=seed, width=64, height=64, **fields) for seed in range(count)]
    tickets = [engine.submit(model.draw(r, r.seed, Inputs()), r.seed if r.reproducible else None) for r in requests]
    while engine:
        engine.step()
    return [ticket.result for ticket in tickets if ticket.result is not None]


@pytest.fixture(scope="module")
def exact() -> Tensor:
    return drawn(load(card()))[0]


@pytest.mark.parametrize(
    ("dtype", "speed", "levels"),
    [
        ("float32", {"channels_last": "both"}, 0.01),
        ("float32", {"channels_last": "decoder"}, 0.01),
        ("float32", {"fused_qkv": True}, 0.01),
        ("bfloat16", {}, 2),
        ("bfloat16", {"channels_last": "decoder"}, 2),
        ("bfloat16", {"storage": "float8"}, 5),
    ],
)
def test_a_picture_is_the_same_but_for_rounding(exact: Tensor, dtype: str, speed: dict[str, Any], levels: float):
    (picture,) = drawn(load(card(dtype, **speed)))
    assert (picture - exact).abs().mean() < levels * A_LEVEL


def test_in_bfloat16_too_the_exact_lane_gives_the_same_bytes_in_any_company():
    model = load(card("bfloat16", channels_last="decoder"))
    (alone,) = drawn(model, reproducible=True)
    assert torch.equal(drawn(model, 3, reproducible=True)[0], alone)


def test_auto_is_what_the_processor_computes_in(monkeypatch: pytest.MonkeyPatch):
    for native, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(prepare, "computes_in_bfloat16", lambda native=native: native)
        assert decided(card("auto"), "cpu").dtype.cpu == dtype


@pytest.mark.parametrize(("device", "kind"), [("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda")])
def test_what_the_operator_asks_for_goes_before_what_a_card_says(device: str, kind: str):
    assert getattr(decided(card("bfloat16"), device, "float32").dtype, kind) == "float32"
    assert dtype_of(decided(card(), device, "bfloat16"), device) is torch.bfloat16


def test_a_card_that_nobody_decided_on_is_read_in_float32():
    assert dtype_of(card("auto"), "cpu") is torch.float32


def test_what_one_precision_has_begun_is_not_gone_on_with_in_another():
    pipeline = load_pipeline(card(), "cpu")
    nets = [one for one in pipeline.components.values() if isinstance(one, torch.nn.Module)]
    identities = {model_identity(decided(card("auto"), "cpu", dtype), nets) for dtype in ("float32", "bfloat16")}
    assert len(identities) == 2


def test_layers_are_laid_out_as_the_card_says():
    model = load(card(channels_last="decoder"))
    assert model.pipeline.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.pipeline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_are_stored_in_half_the_memory():
    half, plain = (load_pipeline(card("bfloat16", **speed), "cpu").unet for speed in ({"storage": "float8"}, {}))
    held = [sum(p.nbytes for p in unet.parameters()) for unet in (half, plain)]
    assert held[0] < 0.6 * held[1]


def test_a_net_that_names_no_regions_is_not_compiled_by_them_and_the_log_says_so():
    class Plain(ModelMixin):
        pass

    with structlog.testing.capture_logs() as logs:
        prepare.compiled(Plain(), "regional")
    assert [(line["event"], line["net"]) for line in logs] == [("not_compiled", "Plain")]


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_a_library_that_is_missing_is_named_with_the_field_that_wants_it():
    with pytest.raises(ValueError, match=r"^speed\.quantize: torchao is not installed"):
        load_pipeline(card(quantize="float8"), "cpu")


@pytest.mark.parametrize("option", [{"fused_qkv": True}, {"storage": "float8"}, {"quantize": "float8"}])
def test_what_changes_weights_does_not_go_with_adapters(option: dict[str, Any]):
    with pytest.raises(ValueError, match=f"speed.{next(iter(option))}: LoRA adapters need the weights as they are"):
        ModelCard.model_validate(CARD.model_dump() | {"loras": {"ink": "ink.safetensors"}, "speed": option})
