"""What this machine could do at best, measured in the same run: multiply, copy, and the passes of the curve."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx2
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch.utils.flop_counter import FlopCounterMode

from bench.mixes import MIXES
from bench.peers.plan import Plan
from models.loading import load_pipeline
from models.prepare import decided, dtype_of

TRIES = 8


def measured(plan: Plan) -> dict[str, Any]:
    """TFLOP/s of a product in the model's dtype, TB/s of a copy, and what one row and one picture take in TFLOP."""
    torch.set_num_threads(plan.threads or torch.get_num_threads())
    torch.set_grad_enabled(False)
    on_gpu = plan.device.startswith("cuda")
    card = decided(plan.catalog.default, plan.device, plan.dtype)
    dtype = dtype_of(card, plan.device)
    n, numbers = (8192, 2**30) if on_gpu else (2048, 2**26)
    a, b = (torch.randn(n, n, device=plan.device).to(dtype) for _ in range(2))
    x = torch.zeros(numbers, dtype=torch.bfloat16, device=plan.device)
    y = torch.empty_like(x)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_tflops": 2 * n**3 / shortest(lambda: a @ b) / 1e12,
        "copy_tbs": 2 * x.nbytes / shortest(lambda: y.copy_(x)) / 1e12,
        **work(load_pipeline(card, "meta"), card.size.height),
    }


def shortest(run: Callable[[], object]) -> float:
    """Seconds."""
    times = []
    for _ in range(TRIES):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def work(pipeline: Any, size: int) -> dict[str, float]:
    """TFLOP of the denoiser's row and of the decoder's picture, attention included."""
    unet, vae = pipeline.unet, pipeline.vae
    side = size // 2 ** (len(vae.config.block_out_channels) - 1)
    told: dict[str, Any] = {"encoder_hidden_states": empty(unet, 1, 77, unet.config.cross_attention_dim)}
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        told["added_cond_kwargs"] = {"text_embeds": empty(unet, 1, pooled), "time_ids": empty(unet, 1, 6)}
    latents = empty(unet, 1, unet.config.in_channels, side, side)
    return {
        "row_tflop": tflop(lambda: unet(latents, torch.ones(1, device=latents.device), **told)),
        "decode_tflop": tflop(lambda: vae.decode(empty(vae, 1, vae.config.latent_channels, side, side))),
    }


def empty(module: Any, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=module.dtype, device=module.device)


def tflop(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


# -- what requests of a mix take, at best


def pass_seconds(http: httpx2.Client, model: str | None = None) -> dict[str, dict[int, float]]:
    """{net: {rows: seconds}} as the worker measured at warm-up."""
    curves: dict[str, dict[int, float]] = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        if family.name == "darkroom_pass_seconds":
            for sample in family.samples:
                if model in (None, sample.labels["model"]):
                    curves.setdefault(sample.labels["net"], {})[int(sample.labels["rows"])] = sample.value
    return curves


def ideal(curves: Mapping[str, Mapping[int, float]], mix: str) -> float | None:
    """Pictures a second if nothing took time but passes, each of the most efficient width; of one size only."""
    if any(kind.size != 1 for kind in MIXES[mix]):
        return None
    decoding = [curve for net, curve in curves.items() if "decode" in net]
    (denoising,) = (curve for net, curve in curves.items() if "decode" not in net)
    a_row = min(seconds / rows for rows, seconds in denoising.items())
    a_picture = min(seconds / rows for rows, seconds in decoding[0].items())
    return 1 / (sum(kind.share * kind.steps * kind.rows for kind in MIXES[mix]) * a_row + a_picture)


def a_picture_tflop(ceilings: Mapping[str, Any], mix: str) -> float | None:
    if any(kind.size != 1 for kind in MIXES[mix]):
        return None
    rows = sum(kind.share * kind.steps * kind.rows for kind in MIXES[mix])
    return rows * ceilings["row_tflop"] + ceilings["decode_tflop"]


if __name__ == "__main__":
    json.dump(measured(Plan(**json.load(sys.stdin))), sys.stdout)
