"""How long a pass takes at each row count, measured; and from that, how wide a pass should be."""

import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from app.schemas import Parameters
from models.families import Resident
from models.program import Call, Inputs, Net, Program
from workers.engine import take_apart

CLOSE_TO_PEAK = 0.95  # a wider pass than this needs buys little throughput and costs everybody latency


@dataclass(frozen=True)
class Curve:
    """Seconds of a pass by its rows, at the model's default size."""

    seconds: dict[int, float]

    @property
    def width(self) -> int:
        """The smallest row count within 5 % of the best throughput."""
        best = max(self.rows_per_second(rows) for rows in self.seconds)
        return min(rows for rows in self.seconds if self.rows_per_second(rows) >= CLOSE_TO_PEAK * best)

    def rows_per_second(self, rows: int) -> float:
        return rows / self.seconds[rows]


def warm_up(resident: Resident, max_rows: int) -> dict[Net, Curve]:
    """Run each net once, measure the two that matter, the denoiser and the decoder, and set their widths."""
    with torch.no_grad():
        step, decode = example_calls(resident)
        curves = {
            resident.denoiser: measure(resident.denoiser, step, max_rows),
            resident.decoder: measure(resident.decoder, decode, min(max_rows, *resident.decoder.buckets[-1:])),
        }
    for net, curve in curves.items():
        net.width = curve.width
    return curves


def example_calls(resident: Resident) -> tuple[Call, Call]:
    """A denoising call with guidance and the decoding call of an ordinary picture."""
    card = resident.card
    enlarges = not {"text-to-image", "text-to-video"} & set(card.tasks)
    gray = Image.new("RGB", (card.size.width, card.size.height), "gray")
    request = Parameters.model_validate(
        {
            "model": card.name,
            "task": "upscale" if enlarges else card.tasks[0],
            "prompt": next(iter(card.classes), "warming up"),
            "width": card.size.width,
            "height": card.size.height,
            "num_inference_steps": 2,
            "guidance_scale": 2.0,
            "scheduler": card.defaults.scheduler,
            "seed": 0,
            "num_frames": card.video and card.video.num_frames,
            "fps": card.video and card.video.fps,
        }
    )
    given = Inputs(gray if enlarges else None, **dict.fromkeys(card.needs, gray))
    with closing(resident.draw(request, 0, given)) as program:
        call = run_until(program, program.send(None), resident.denoiser)
        return call, run_until(program, call, resident.decoder)


def run_until(program: Program, call: Call, net: Net) -> Call:
    """Run a program by itself up to its first call of `net`."""
    while call.net is not net:
        call = program.send(call.net.run(**call.args))
    return call


def measure(net: Net, call: Call, max_rows: int, rounds: int = 3) -> Curve:
    """The shortest pass at each bucket that the call's rows fill, up to where more no longer pay.

    Round after round over all buckets, so that a moment's noise does not fall on one of them alone.
    """
    arguments: dict[int, dict[str, Any]] = {}
    seconds: dict[int, float] = {}
    best, since_best = 0.0, 0
    for rows in [bucket for bucket in net.buckets if bucket % call.rows == 0] or [call.rows]:
        if (rows > max_rows and seconds) or since_best == 3:
            break
        arguments[rows] = tiled(call, rows)
        timed(net, arguments[rows])  # the first pass of a shape also prepares for it
        seconds[rows] = timed(net, arguments[rows])
        since_best = 0 if rows / seconds[rows] > best * (2 - CLOSE_TO_PEAK) else since_best + 1
        best = max(best, rows / seconds[rows])
    for _ in range(rounds - 1):
        for rows in seconds:
            seconds[rows] = min(seconds[rows], timed(net, arguments[rows]))
    return Curve(seconds)


def tiled(call: Call, rows: int) -> dict[str, Any]:
    """The call's arguments, repeated to so many rows."""
    columns = take_apart(call)
    return columns.arguments(column.repeat(rows // call.rows, *[1] * (column.ndim - 1)) for column in columns.batched)


def timed(net: Net, arguments: dict[str, Any]) -> float:
    began = time.perf_counter()
    net.run(**arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
