"""How wide a pass should be: judged from measured passes of a net whose speed is known."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from models.catalog import Catalog
from models.program import BUCKETS, Call, Net
from models.stable_diffusion import StableDiffusion
from tests import tiny
from workers.curve import Curve, example_calls, measure, tiled, warm_up

CARD = Catalog.read(["emoji-sd"])["emoji-sd"]
X = torch.arange(4.0).view(2, 2)


@pytest.mark.parametrize(
    ("seconds", "width"),
    [
        ({2: 0.05, 4: 0.10, 8: 0.20, 16: 0.40}, 2),  # one row costs as much as the other
        ({2: 0.05, 4: 0.05, 8: 0.05, 16: 0.05}, 16),  # all rows cost as much as one
        ({2: 0.05, 4: 0.06, 8: 0.10, 16: 0.199}, 8),  # twice as wide buys half a percent
        ({2: 0.05, 4: 0.06, 8: 0.10, 16: 0.195}, 16),  # and here more than two
        ({2: 0.05, 4: 0.06, 8: 0.30, 16: 0.90}, 4),  # a device out of its depth
        ({6: 0.1}, 6),
    ],
)
def test_the_width_is_the_smallest_within_two_percent_of_the_best_throughput(seconds: dict[int, float], width: int):
    assert Curve(seconds).width == width


def test_noise_moves_no_width_where_passes_lie_on_a_line():
    line = {rows: 0.016 + 0.0077 * rows for rows in (2, 4, 6, 8, 10, 12, 14, 16, 20)}
    lucky, unlucky = line | {8: 0.93 * line[8]}, line | {20: 1.07 * line[20]}
    assert [Curve(seconds).width for seconds in (line, lucky, unlucky)] == [20, 20, 20]
    assert Curve(line | {20: 2 * line[20]}).width == 14  # out of its depth: no line


def test_decoding_is_as_wide_as_pays_and_holds_nobody_up_for_long():
    curve = Curve({1: 0.06, 2: 0.10, 4: 0.17, 8: 0.35})
    assert [curve.widest_within(seconds) for seconds in (1, 0.2, 0.05)] == [4, 4, 1]
    assert Curve({1: 0.06, 2: 0.12, 4: 0.24}).widest_within(1) == 1


def test_a_bucket_that_costs_what_the_next_one_does_is_none():
    curve = Curve({2: 0.010, 4: 0.010, 6: 0.0104, 8: 0.02})
    assert curve.worth_having((1, 2, 3, 4, 6, 8, 16)) == (1, 3, 6, 8, 16)


def test_a_curve_tells_rows_a_second():
    assert Curve({4: 0.5}).rows_per_second(4) == 8


def test_every_bucket_is_measured_while_more_rows_pay(clock: "Clock"):
    net = clock.net(lambda rows: 0.01)
    assert list(measure(net, Call(net, {"x": X}, 2), max_rows=32).seconds) == [b for b in BUCKETS if 2 <= b <= 32]


def test_of_passes_that_lie_on_a_line_every_doubling_is_run_and_the_line_tells_the_others(clock: "Clock"):
    net = clock.net(lambda rows: 0.01 + 0.005 * rows)
    curve = measure(net, Call(net, {"x": X}, 2), max_rows=32)
    assert set(clock.rows) == {2, 4, 8, 16, 32}
    assert curve.seconds == pytest.approx({rows: 0.01 + 0.005 * rows for rows in BUCKETS if 2 <= rows <= 32})


def test_too_few_passes_to_know_a_line_by_are_not_relied_on(clock: "Clock"):
    net = clock.net(lambda rows: 0.01 + 0.005 * rows)
    measure(net, Call(net, {"x": X}, 2), max_rows=16)
    assert set(clock.rows) == {2, 4, 6, 8, 10, 12, 14, 16}


def test_measuring_stops_when_three_buckets_in_a_row_have_bought_nothing(clock: "Clock"):
    net = clock.net(lambda rows: 0.01 * max(rows, 8))
    curve = measure(net, Call(net, {"x": X}, 2), max_rows=32)
    assert list(curve.seconds) == [2, 4, 6, 8, 10, 12, 14]
    assert curve.seconds == pytest.approx({rows: 0.01 * max(rows, 8) for rows in curve.seconds})
    assert curve.width == 8


def test_small_gains_add_up(clock: "Clock"):
    net = clock.net(lambda rows: 0.01 * rows**0.85)  # of four, three, two percent a bucket
    assert list(measure(net, Call(net, {"x": X}, 2), max_rows=32).seconds) == [b for b in BUCKETS if 2 <= b <= 32]


def test_no_pass_is_tried_that_is_wider_than_allowed(clock: "Clock"):
    net = clock.net(lambda rows: 0.01)
    measure(net, Call(net, {"x": X}, 2), max_rows=12)
    assert max(clock.rows) == 12


def test_buckets_that_the_call_does_not_fill_are_left_out(clock: "Clock"):
    net = clock.net(lambda rows: 0.01)
    assert list(measure(net, Call(net, {"x": torch.ones(3, 1)}, 3), max_rows=24).seconds) == [6, 12, 24]


@pytest.mark.parametrize("buckets", [(), (1,), (4, 8)])
def test_something_is_measured_whatever_the_buckets(clock: "Clock", buckets: tuple[int, ...]):
    net = clock.net(lambda rows: 0.01, buckets)
    assert Curve(measure(net, Call(net, {"x": X}, 2), max_rows=1).seconds).width in (2, 4)


def test_the_best_of_several_rounds_counts_and_the_first_of_all_does_not(clock: "Clock"):
    slow = iter([9.0, 0.5, 0.4, 0.1, 0.3])  # preparing, the first round, which is of two, and two more
    net = clock.net(lambda rows: next(slow), (2,))
    assert measure(net, Call(net, {"x": X}, 2), max_rows=2).seconds == pytest.approx({2: 0.1})


def test_a_call_is_repeated_with_its_pairs_together_and_what_it_shares_as_it_is():
    ids = torch.zeros(2, 3)
    call = Call(Net("n", dict, frozenset({"ids"})), {"x": X, "t": torch.tensor(5.0), "ids": ids, "k": None}, 2)
    wide = tiled(call, 6)
    told = wide.columns.arguments(wide.columns.batched)
    assert torch.equal(told["x"], torch.cat([X, X, X]))
    assert told["t"].tolist() == [5.0] * 6
    assert told["ids"] is ids
    assert told["k"] is None


def test_a_model_is_warm_when_its_denoiser_and_its_decoder_have_their_widths():
    model = StableDiffusion(CARD.model_copy(update={"size": SMALL, "max_rows": 8}), tiny.stable_diffusion())
    curves = warm_up(model, 4)
    assert set(curves) == {model.denoiser, model.decoder}
    assert set(curves[model.denoiser].seconds) <= {2, 4}
    assert model.denoiser.width in (2, 4)
    assert model.denoiser.seconds.keys() == set(curves[model.denoiser].seconds) & set(model.denoiser.buckets)
    assert model.decoder.width in model.decoder.buckets


def test_what_is_measured_is_a_guided_step_and_the_decoding_of_one_picture():
    model = StableDiffusion(CARD.model_copy(update={"size": SMALL}), tiny.stable_diffusion())
    with torch.no_grad():
        step, decode = example_calls(model)
    assert (step.net, step.rows) == (model.denoiser, 2)
    assert (decode.net, decode.rows) == (model.decoder, 1)


SMALL = CARD.size.model_copy(update={"width": 32, "height": 32})


class Clock:
    """Time that passes only in nets."""

    def __init__(self):
        self.now, self.rows = 0.0, list[int]()

    def net(self, seconds: Any, buckets: tuple[int, ...] = BUCKETS) -> Net:
        def run(x: Tensor) -> Tensor:
            self.rows.append(len(x))
            self.now += seconds(len(x))
            return x

        return Net("timed", run, buckets=buckets)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock
