"""How long a pass takes at each row count, measured; and from that, how wide a pass should be."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from statistics import linear_regression

import torch
from PIL import Image

from app.schemas import Parameters
from models.families import Resident
from models.program import Call, Inputs, Net, Program
from workers.passes import Eager, Placed, Runner, take_apart
from workers.policy import widest

NOISE = 0.1  # of a pass
ENOUGH = 5  # passes to know a line by
LITTLE = 0.05  # of a pass, or of its throughput: not worth a bucket
HELD_UP = 0.1  # seconds that others' denoising may wait for pictures to be decoded, or the length of a full pass


@dataclass(frozen=True)
class Curve:
    """Seconds of a pass by its rows, at the model's default size."""

    seconds: dict[int, float]

    @property
    def width(self) -> int:
        """Rows that a pass may have at most."""
        return widest(self.smooth())

    def smooth(self) -> dict[int, float]:
        """The seconds without noise, if a pass costs so much and so much more for each row; or as they were measured.

        Most nets' do, on processors and on GPUs. One lucky pass, or an unlucky one, would move the width by a third.
        """
        return self.line(self.seconds) or self.seconds

    def line(self, rows: Iterable[int]) -> dict[int, float] | None:
        """Seconds of passes of so many rows, if what was measured lies on a line, and was enough to tell."""
        if len(self.seconds) < ENOUGH:
            return None
        a_pass, a_row = linear_regression([1 / n for n in self.seconds], [s / n for n, s in self.seconds.items()])
        fits = all(abs(a_pass + a_row * n - s) < NOISE * s for n, s in self.seconds.items())
        return {n: a_pass + a_row * n for n in rows} if fits else None

    def widest_within(self, seconds: float) -> int:
        """The widest that is worth it and takes no longer than so many seconds, if any is as short."""
        return max((rows for rows in self.seconds if rows <= self.width and self.seconds[rows] <= seconds), default=1)

    def worth_having(self, buckets: tuple[int, ...]) -> tuple[int, ...]:
        """Of these, those that were not measured, and those that are quicker by 5 % than the next that is kept."""
        kept = list[int]()
        for rows in reversed(buckets):
            wider = next((other for other in kept if other in self.seconds), None)
            if wider is None or rows not in self.seconds or self.seconds[rows] < (1 - LITTLE) * self.seconds[wider]:
                kept.insert(0, rows)
        return tuple(kept)

    def rows_per_second(self, rows: int) -> float:
        return rows / self.seconds[rows]


def warm_up(resident: Resident, max_rows: int, runner: Runner | None = None) -> dict[Net, Curve]:
    """Run each net once, measure the denoiser and the decoder, and set the widths and buckets of these two."""
    denoiser, decoder, runner = resident.denoiser, resident.decoder, runner or Eager()
    with torch.no_grad():
        step, decode = example_calls(resident)
        steps = measure(denoiser, step, max_rows, runner)
        decodes = measure(decoder, decode, min(max_rows, *decoder.buckets[-1:]), runner)
    denoiser.width = steps.width
    longest = max(HELD_UP, steps.seconds[steps.width])
    decoder.width = decodes.width if decoder.journaled else decodes.widest_within(longest)  # a stage takes its turns
    curves = {denoiser: steps, decoder: decodes}
    for net, curve in curves.items():
        net.buckets = curve.worth_having(net.buckets)
    denoiser.seconds = {rows: s for rows, s in steps.smooth().items() if rows in (denoiser.buckets or steps.seconds)}
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


def measure(net: Net, call: Call, max_rows: int, runner: Runner | None = None, rounds: int = 3) -> Curve:
    """Seconds of a pass at each bucket that the call's rows fill, up to where more no longer pay.

    A processor takes its time: if ever twice the rows lie on a line, so do those between.
    """
    runner = runner or Eager()
    buckets = [bucket for bucket in net.buckets if bucket % call.rows == 0] or [call.rows]
    buckets = [bucket for bucket in buckets if bucket <= max_rows] or buckets[:1]
    doubling = [buckets[0] << i for i in range(len(buckets)) if buckets[0] << i in buckets]
    if not runner.asynchronous and len(doubling) >= ENOUGH:
        few = Curve(shortest(net, call, doubling, runner, rounds))
        if line := few.line(bucket for bucket in buckets if bucket <= max(few.seconds)):
            return Curve(line | few.seconds)
    return Curve(shortest(net, call, buckets, runner, rounds))


def shortest(net: Net, call: Call, buckets: list[int], runner: Runner, rounds: int) -> dict[int, float]:
    """The shortest pass at each of these, until three in a row have bought nothing.

    Round after round over all buckets, so that a moment's noise does not fall on one of them alone.
    """
    passes: dict[int, Placed] = {}
    seconds: dict[int, float] = {}
    best, since_best = 0.0, 0
    for rows in buckets:
        if since_best == 3:
            break
        passes[rows] = tiled(call, rows)
        for _ in range(runner.prepares):
            timed(net, passes[rows], runner)
        seconds[rows] = min(timed(net, passes[rows], runner) for _ in range(2))
        if rows / seconds[rows] > best * (1 + LITTLE):  # than the last that was: small gains add up
            best, since_best = rows / seconds[rows], 0
        else:
            since_best += 1
    for _ in range(rounds - 1):
        for rows in seconds:
            seconds[rows] = min(seconds[rows], timed(net, passes[rows], runner))
    return seconds


def tiled(call: Call, rows: int) -> Placed:
    """The call, repeated to so many rows."""
    columns = take_apart(call)
    columns.batched = [column.repeat(rows // call.rows, *[1] * (column.ndim - 1)) for column in columns.batched]
    return Placed(columns, 0, rows)


def timed(net: Net, wide: Placed, runner: Runner) -> float:
    """Seconds that a pass of nothing else takes."""
    took = runner.stopwatch()
    runner.run(net, [wide], wide.rows)
    took.stop()
    return took.seconds()
