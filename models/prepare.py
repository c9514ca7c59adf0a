"""How a model is made fast here: the precision it draws in, and what its card's `[speed]` does to its nets."""

import importlib
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import structlog
import torch
from diffusers import ModelMixin

from models.catalog import Dtype, ModelCard

log = structlog.get_logger()

COMPUTES_IN_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux names it, of x86 and of ARM
SHAPES = 64  # that a net is compiled for, if sizes differ or rows are one; torch gives up after 8


def decided(card: ModelCard, device: str, asked: str = "auto") -> ModelCard:
    """The card with the precision that its model has on this device: what is asked, or else what the card says.

    That makes it part of the model's identity: what one precision has begun is not gone on with in another.
    """
    kind = "cpu" if torch.device(device).type == "cpu" else "cuda"
    dtype = getattr(card.dtype, kind) if asked == "auto" else asked
    if dtype == "auto":
        dtype = "bfloat16" if computes_in_bfloat16() else "float32"
    return card.model_copy(update={"dtype": Dtype.model_validate(card.dtype.model_dump() | {kind: dtype})})


def dtype_of(card: ModelCard, device: str) -> torch.dtype:
    """What the card's weights are read in: float32 if that is still to be decided, which is the same everywhere."""
    dtype = card.dtype.cpu if torch.device(device).type == "cpu" else card.dtype.cuda
    return torch.float32 if dtype == "auto" else getattr(torch, dtype)


@cache
def computes_in_bfloat16() -> bool:
    """Whether the processor has instructions for it; elsewhere it is float32 with rounding, and slower."""
    told = Path("/proc/cpuinfo")
    words = told.read_text().split() if told.is_file() else []
    return not COMPUTES_IN_BFLOAT16.isdisjoint(words)


def prepare(card: ModelCard, components: Iterable[Any], dtype: torch.dtype) -> None:
    """Do to the model's nets what its card says, before they first run.

    Raises:
        ValueError: something cannot be had here; the message names the field.
    """
    speed, nets = card.speed, [one for one in components if isinstance(one, ModelMixin)]
    decoders = [net for net in nets if hasattr(net, "decode")]
    denoisers = [net for net in nets if not hasattr(net, "decode")]
    for role, some in (("denoiser", denoisers), ("decoder", decoders)):
        if speed.channels_last in (role, "both"):
            for net in some:
                net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for net in nets:
        if speed.fused_qkv and hasattr(net, "fuse_qkv_projections"):
            net.fuse_qkv_projections()
    for net in denoisers:
        if speed.storage:
            net.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        if speed.quantize:
            quantize(net)
        compiled(net, speed.compile)


def quantize(net: Any) -> None:
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("speed.quantize: torchao is not installed (`pip install torchao`)")
    torchao = importlib.import_module("torchao.quantization")
    how = "Float8DynamicActivationFloat8WeightConfig" if net.device.type == "cuda" else "Float8WeightOnlyConfig"
    torchao.quantize_(net, getattr(torchao, how)())


def compiled(net: Any, how: str) -> None:
    """For any number of rows. Launches are not inductor's business: they are recorded by `workers/graphs.py`."""
    if how == "off":
        return
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    dynamo.recompile_limit = SHAPES
    if how == "whole":
        net.compile(dynamic=True)
    elif getattr(net, "_repeated_blocks", None):
        net.compile_repeated_blocks(dynamic=True)
    else:  # such as a judge beside the denoiser
        log.warning("not_compiled", net=type(net).__name__, reason="it names no repeated blocks; `whole` is for it")
