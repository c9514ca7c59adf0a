"""The engine alone: who shares a pass, which rows, and what becomes of those that fail."""

import math
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from models.program import Call, Inputs, Net
from models.stable_diffusion import StableDiffusion
from tests.test_stable_diffusion import asked, shipped  # noqa: F401
from workers.engine import NARROW_FOR, Canceled, Engine, Pass, Ticket
from workers.outcomes import OutOfMemory
from workers.passes import take_apart


@dataclass
class Recorder:
    """A net that notes what it is given; twice `x` is what it returns."""

    seen: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, **args: Any) -> Tensor:
        self.seen.append(args)
        return args["x"] * 2

    @property
    def rows(self) -> list[int]:
        return [len(args["x"]) for args in self.seen]


def test_calls_on_the_same_net_and_shapes_share_a_pass_and_each_gets_its_own_rows():
    net = recording()
    tickets = drawn([asking(net, x=x) for x in (torch.ones(1, 3), torch.ones(2, 3) * 5, torch.ones(1, 3) * 9)])
    assert net.run.rows == [4]
    assert [t.result.tolist() for t in tickets] == [[[2.0] * 3], [[10.0] * 3] * 2, [[18.0] * 3]]


def test_programs_with_different_numbers_of_steps_come_and_go_between_passes():
    net = recording()
    engine = Engine()
    long, short = engine.submit(counting(net, 5)), engine.submit(counting(net, 2))
    engine.step()
    late = engine.submit(counting(net, 3))
    run_out(engine)
    assert net.run.rows == [2, 3, 2, 2, 1]
    assert [t.result for t in (long, short, late)] == [32.0, 4.0, 8.0]


# -- never merge strangers

X = torch.arange(6.0).view(2, 3)
STRANGERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "another shape": ({"x": X}, {"x": torch.ones(2, 4)}),
    "another dtype": ({"x": X}, {"x": X.double()}),
    "another name": ({"x": X, "a": X}, {"x": X, "b": X}),
    "another number": ({"x": X, "k": 1}, {"x": X, "k": 2}),
    "one and true": ({"x": X, "k": 1}, {"x": X, "k": True}),
    "one and one point nought": ({"x": X, "k": 1}, {"x": X, "k": 1.0}),
    "a number and its text": ({"x": X, "k": 1}, {"x": X, "k": "1"}),
    "nought and minus nought": ({"x": X, "k": 0.0}, {"x": X, "k": -0.0}),
    "numbers that print alike": ({"x": X, "k": 0.1 + 0.2}, {"x": X, "k": 0.3}),
    "none and its absence": ({"x": X, "k": None}, {"x": X}),
    "none and nothing in it": ({"x": X, "k": None}, {"x": X, "k": ()}),
    "a list and a tuple": ({"x": X, "k": [1, 2]}, {"x": X, "k": (1, 2)}),
    "other brackets": ({"x": X, "k": [[1], 2]}, {"x": X, "k": [1, [2]]}),
    "more of them": ({"x": X, "k": [X]}, {"x": X, "k": [X, X]}),
    "keys that print alike": ({"x": X, "k": {1: 2}}, {"x": X, "k": {"1": 2}}),
    "a large tensor that differs in the middle": (
        {"x": X, "k": torch.zeros(5000)},
        {"x": X, "k": torch.zeros(5000).index_fill(0, torch.tensor(2500), 1)},
    ),
    "the same numbers in another shape": ({"x": X, "k": torch.zeros(3, 4)}, {"x": X, "k": torch.zeros(4, 3)}),
    "the same bytes as another dtype": (
        {"x": X, "k": torch.zeros(5)},
        {"x": X, "k": torch.zeros(5, dtype=torch.int32)},
    ),
    "dtypes": ({"x": X, "k": torch.float16}, {"x": X, "k": torch.bfloat16}),
    "rows and no rows": ({"x": X, "k": X}, {"x": X, "k": None}),
}


@pytest.mark.parametrize("difference", STRANGERS)
def test_calls_that_differ_beyond_their_rows_never_share_a_pass(difference: str):
    net = recording()
    drawn([asking(net, **args) for args in STRANGERS[difference]])
    assert net.run.rows == [2, 2]


def test_the_same_calls_of_two_nets_never_share_a_pass():
    nets = [recording("twin"), recording("twin")]
    drawn([asking(net, x=X) for net in nets])
    assert [net.run.rows for net in nets] == [[2], [2]]


SAME: dict[str, Callable[[], dict[str, Any]]] = {
    "scalars": lambda: {"a": 3, "b": "text", "c": None, "d": 0.1, "e": True, "f": torch.float16},
    "not a number": lambda: {"a": math.nan},
    "a shared tensor by content": lambda: {"a": torch.arange(7)},
    "a shared tensor that is not contiguous": lambda: {"a": torch.arange(12).view(3, 4).T},
    "trees": lambda: {"a": {"p": X.clone(), "q": [X.clone(), 1]}},
}


@pytest.mark.parametrize("arguments", SAME)
def test_equal_content_shares_a_pass_whatever_object_holds_it(arguments: str):
    net = recording()
    drawn([asking(net, x=X, **SAME[arguments]()) for _ in range(3)])
    assert net.run.rows == [6]


def test_shared_arguments_are_compared_even_if_they_look_like_rows():
    net = recording(shared=frozenset({"ids"}))
    one, other = torch.zeros(2, 3), torch.ones(2, 3)
    drawn([asking(net, x=X, ids=one), asking(net, x=X, ids=other), asking(net, x=X, ids=one.clone())])
    assert net.run.rows == [4, 2]
    assert [args["ids"].tolist() for args in net.run.seen] == [one.tolist(), other.tolist()]


def test_a_shared_argument_may_be_a_single_number():
    net = recording(shared=frozenset({"sigma"}))
    drawn([asking(net, x=X, sigma=torch.tensor(sigma)) for sigma in (1.0, 2.0, 1.0)])
    assert net.run.rows == [4, 2]
    assert net.run.seen[0]["sigma"].ndim == 0


def test_single_numbers_are_repeated_for_each_row_of_their_call():
    net = recording()
    drawn([asking(net, x=torch.ones(rows, 1), t=torch.tensor(t)) for rows, t in ((2, 7.0), (1, 8.0))])
    assert net.run.seen[0]["t"].tolist() == [7.0, 7.0, 8.0]


def test_trees_of_arguments_arrive_as_they_were_sent():
    net = recording()
    drawn([asking(net, x=X, k={"p": [X + i, (X, None)], "q": 4}) for i in range(2)])
    (seen,) = net.run.seen
    assert torch.equal(seen["k"]["p"][0], torch.cat([X, X + 1]))
    assert torch.equal(seen["k"]["p"][1][0], torch.cat([X, X]))
    assert seen["k"]["p"][1][1] is None
    assert seen["k"]["q"] == 4


def test_what_can_be_neither_batched_nor_compared_is_an_error_of_its_own_call():
    net = recording()
    good, bad = drawn([asking(net, x=X), asking(net, x=X, rng=torch.Generator())])
    assert torch.equal(good.result, X * 2)
    assert isinstance(bad.error, TypeError)
    assert "'rng' is a Generator" in str(bad.error)


# -- how many rows


@pytest.mark.parametrize(("rows", "run"), [([1], 1), ([2, 1], 4), ([4, 3], 8), ([8], 8), ([9], 9)])
def test_a_pass_is_padded_with_zeros_to_the_next_bucket_if_there_is_one(rows: list[int], run: int):
    net = recording(buckets=(1, 2, 4, 8))
    tickets = drawn([asking(net, x=torch.full((n, 2), 3.0)) for n in rows])
    assert net.run.rows == [run]
    assert not net.run.seen[0]["x"][sum(rows) :].any()
    assert [len(t.result) for t in tickets] == rows


def test_no_pass_is_wider_than_its_net_allows_unless_one_call_is():
    net = recording(width=4)
    drawn([asking(net, x=torch.ones(rows, 1)) for rows in (3, 2, 1, 6, 2)])
    assert net.run.rows == [4, 4, 6]


# -- who goes first


def test_a_lone_odd_call_is_not_starved_by_a_crowd():
    net = recording(width=4)
    engine = Engine()
    crowd = [engine.submit(counting(net, 1000)) for _ in range(8)]
    odd = engine.submit(asking(net, x=torch.ones(1, 7)))
    for _ in range(9):
        engine.step()
    assert odd.done
    assert not any(ticket.done for ticket in crowd)


def test_everybody_in_a_crowd_too_wide_for_one_pass_gets_on():
    net = recording(width=4)
    engine = Engine()
    crowd = [engine.submit(counting(net, 1000)) for _ in range(10)]
    for _ in range(100):
        engine.step()
    assert min(ticket.at[0] for ticket in crowd) >= 100 // 10


def test_exact_and_default_lanes_take_turns():
    net = recording(reproducible_rows=4)
    engine = Engine()
    exact, default = [[engine.submit(counting(net, 10), seat) for _ in range(6)] for seat in (0, None)]
    for _ in range(14):
        engine.step()
    assert all(ticket.at[0] >= 1 for ticket in (*exact, *default))


# -- the exact lane


def test_an_exact_call_always_sits_in_the_same_rows_of_a_pass_of_the_same_size():
    for crowd in (0, 3, 9):
        net = recording(reproducible_rows=8, buckets=(1, 2, 4, 8, 16))
        engine = Engine()
        engine.submit(asking(net, x=torch.full((2, 1), 7.0)), seat=6)  # of four seats for two rows, the third
        for _ in range(crowd):
            engine.submit(asking(net, x=torch.ones(1, 1)))
        engine.step()
        x = net.run.seen[0]["x"].flatten().tolist()
        assert len(x) == 8
        assert x[4:6] == [7.0, 7.0]
        assert sum(x) == 14.0 + min(crowd, 6)  # the others fill the gaps


def test_two_exact_calls_of_one_seat_take_one_pass_each():
    net = recording(reproducible_rows=4)
    tickets = [asking(net, x=torch.full((1, 1), value)) for value in (1.0, 2.0)]
    engine = Engine()
    first, second = [engine.submit(program, seat=3) for program in tickets]
    assert engine.step() == [first]
    assert engine.step() == [second]
    assert [args["x"].flatten().tolist() for args in net.run.seen] == [[0, 0, 0, 1], [0, 0, 0, 2]]


def test_exact_calls_of_different_seats_share_a_pass():
    net = recording(reproducible_rows=4)
    engine = Engine()
    for seat in (1, 2, 2**53):
        engine.submit(asking(net, x=torch.full((1, 1), 1.0 + seat % 4)), seat=seat)
    engine.step()
    assert net.run.seen[0]["x"].flatten().tolist() == [1.0, 2.0, 3.0, 0.0]


@pytest.mark.parametrize(("reproducible", "rows"), [(None, 3), (2, 3)])
def test_an_exact_call_without_a_pass_of_its_size_runs_alone_at_its_own(reproducible: int | None, rows: int):
    net = recording(reproducible_rows=reproducible, buckets=(4, 8))
    engine = Engine()
    exact = engine.submit(asking(net, x=torch.ones(rows, 1)), seat=0)
    engine.submit(asking(net, x=torch.ones(rows, 1)))
    assert engine.step() == [exact]
    assert net.run.rows == [rows]


def test_an_exact_call_too_wide_for_the_pass_of_another_has_its_own():
    net = recording(reproducible_rows=4)
    engine = Engine()
    tickets = [engine.submit(asking(net, x=torch.ones(rows, 1)), seat=0) for rows in (1, 6)]
    run_out(engine)
    assert [len(ticket.result) for ticket in tickets] == [1, 6]
    assert net.run.rows == [4, 6]


def test_a_culprit_in_an_exact_pass_does_not_move_the_others():
    """Halved or not, whoever is exact, and whoever sits beside it, keeps its rows."""

    def net_run(x: Tensor) -> Tensor:
        if (x == 13).any():
            raise ArithmeticError
        seen.append(x.flatten().tolist())
        return x * 2

    seen = list[list[float]]()
    net = Net("picky", net_run, reproducible_rows=8)
    engine = Engine()
    values = {6: 60.0, 1: 10.0, 3: 13.0, 4: 40.0}
    exact = {seat: engine.submit(asking(net, x=torch.full((1, 1), value)), seat) for seat, value in values.items()}
    default = [engine.submit(asking(net, x=torch.full((1, 1), value))) for value in (1.0, 2.0, 13.0)]
    engine.step()
    assert [ticket.done for ticket in (*exact.values(), *default)] == [True] * 7
    assert [type(ticket.error) for ticket in (exact[3], default[2])] == [ArithmeticError] * 2
    assert all(row[seat] == values[seat] for row in seen for seat in (6, 1, 4) if values[seat] in row)
    assert all(len(row) == 8 for row in seen if 60.0 in row or 10.0 in row or 40.0 in row)


# -- what goes wrong


@pytest.mark.parametrize("culprit", [0, 3, 7])
def test_a_failing_pass_is_halved_until_the_culprit_is_alone(culprit: int):
    net = failing_on(13.0)
    values = [float(i) for i in range(8)]
    values[culprit] = 13.0
    tickets = drawn([asking(net, x=torch.full((1, 1), value)) for value in values])
    assert [i for i, ticket in enumerate(tickets) if ticket.error] == [culprit]
    assert [t.result.item() for i, t in enumerate(tickets) if i != culprit] == [
        2 * value for i, value in enumerate(values) if i != culprit
    ]
    assert len(net.run.passes) == 1 + 2 * 3  # the whole, and two halves of each of log2(8) wholes


def test_each_of_several_culprits_gets_an_error_of_its_own():
    net = failing_on(13.0)
    tickets = drawn([asking(net, x=torch.full((1, 1), value)) for value in (13.0, 1.0, 13.0, 13.0)])
    assert [type(ticket.error) for ticket in tickets] == [ArithmeticError, type(None), ArithmeticError, ArithmeticError]
    assert len({id(ticket.error) for ticket in tickets}) == 4


# -- out of memory


def test_a_pass_too_large_for_the_device_is_done_in_smaller_ones():
    net = short_of_memory(4)
    tickets = drawn([asking(net, x=torch.ones(1, 1)) for _ in range(12)])
    assert [ticket.result.item() for ticket in tickets] == [2.0] * 12
    assert net.run.passes == [16, 8, 4, 4, 8, 4, 4]


def test_after_that_passes_are_narrower_for_a_while_and_then_as_wide_as_before(monkeypatch: pytest.MonkeyPatch):
    net = short_of_memory(4)
    engine = Engine()
    tickets = [engine.submit(counting(net, 4)) for _ in range(8)]
    engine.step()
    assert engine.width(net) == 4
    assert net.width == 16
    net.run.passes.clear()
    engine.step()
    assert net.run.passes == [4]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + NARROW_FOR)
    assert engine.width(net) == 16
    run_out(engine)
    assert [ticket.result for ticket in tickets] == [16.0] * 8


def test_a_net_that_is_short_of_memory_does_not_make_others_narrow():
    short, other = short_of_memory(1), recording()
    engine = Engine()
    for net in (short, other):
        for _ in range(4):
            engine.submit(counting(net, 2))
    run_out(engine)
    assert engine.width(short) == 1
    assert engine.width(other) == other.width
    assert other.run.rows == [4, 4]


@pytest.mark.parametrize("seat", [None, 0], ids=["default", "exact"])
def test_what_does_not_fit_alone_fails_with_what_it_needed(seat: int | None):
    net = short_of_memory(1, reproducible_rows=2)
    engine = Engine()
    ticket = engine.submit(asking(net, x=torch.ones(2, 4, 16, 8), t=torch.ones(2)), seat)
    engine.step()
    assert isinstance(ticket.error, OutOfMemory)
    assert str(ticket.error) == "large does not fit into memory with 2 rows of 4×16×8: Tried to allocate 2.00 GiB"
    assert engine.width(net) == net.width  # narrower passes would not let it in


def test_exact_calls_keep_their_seats_however_short_memory_is():
    """An exact pass has always as many rows. That half of its calls fit where all do not is a matter of luck."""
    net = recording(reproducible_rows=8)
    run, tries = net.run, iter([True, False, False])

    def net_run(x: Tensor) -> Tensor:
        if next(tries):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(x=x)

    net.run = net_run
    engine = Engine()
    seats = {6: 60.0, 1: 10.0}
    tickets = [engine.submit(asking(net, x=torch.full((1, 1), value)), seat) for seat, value in seats.items()]
    assert engine.step() == tickets
    assert [ticket.result.item() for ticket in tickets] == [120.0, 20.0]
    assert [args["x"].flatten().tolist() for args in run.seen] == [[0] * 6 + [60.0, 0], [0, 10.0] + [0] * 6]


def test_the_memory_of_a_failed_pass_is_free_before_it_is_tried_again():
    alive, others = weakref.WeakSet[Any](), list[int]()

    def net_run(x: Tensor) -> Tensor:
        others.append(len(alive))
        activations = x + 1
        alive.add(activations)
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return x

    net = Net("large", net_run)
    drawn([asking(net, x=torch.ones(1, 1)) for _ in range(8)])
    assert others == [0] * 15


@pytest.mark.parametrize("bytes", [10**15, 10**17])
def test_the_cpu_has_words_of_its_own_for_it(bytes: int):
    net = Net("large", lambda x: torch.empty(bytes, dtype=torch.uint8))
    (ticket,) = drawn([asking(net, x=X)])
    assert isinstance(ticket.error, OutOfMemory)
    assert str(ticket.error).endswith(f"tried to allocate {bytes} bytes")


def test_pictures_are_the_same_when_memory_is_short(shipped: StableDiffusion):  # noqa: F811
    requests = [asked(num_inference_steps=3, seed=seed, width=64, height=64) for seed in range(4)]
    programs = [shipped.draw(r, r.seed, Inputs()) for r in requests]
    alone = [drawn([shipped.draw(r, r.seed, Inputs())])[0].result for r in requests]
    whole, tries = shipped.denoiser.run, list[int]()

    def net_run(sample: Tensor, **others: Any) -> Any:
        tries.append(len(sample))
        if len(sample) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity")
        return whole(sample=sample, **others)

    shipped.denoiser.run = net_run
    try:
        crowd = drawn(programs)
    finally:
        shipped.denoiser.run = whole
    assert tries[0] == 8
    assert max(tries[-4:]) == 4  # no more than it has room for
    assert all(torch.allclose(a, b.result, atol=1e-4) for a, b in zip(alone, crowd, strict=True))


# -- programs that go wrong


def test_a_program_that_raises_leaves_its_neighbours_running():
    net = recording()

    def raising() -> Iterator[Call]:
        yield Call(net, {"x": X}, 2)
        raise ZeroDivisionError

    bad, good = drawn([raising(), counting(net, 4)])
    assert isinstance(bad.error, ZeroDivisionError)
    assert bad.result is None
    assert good.result == 16.0


def test_a_program_that_raises_before_its_first_call_is_done_at_once():
    def raising() -> Iterator[Call]:
        raise ZeroDivisionError
        yield

    engine = Engine()
    ticket = engine.submit(raising())
    assert ticket.done
    assert isinstance(ticket.error, ZeroDivisionError)
    assert not engine


def test_a_program_may_return_without_a_call():
    def returning() -> Generator[Call, Any, int]:
        return 5
        yield

    assert Engine().submit(returning()).result == 5


def test_what_a_program_yields_must_be_a_call():
    def confused() -> Iterator[Any]:
        yield "a call"

    assert isinstance(Engine().submit(confused()).error, AttributeError)


@pytest.mark.parametrize(
    "output",
    [
        lambda x: x[:1],
        lambda x: torch.cat([x, x]),
        lambda x: x.sum(),
        lambda x: (x, {"more": x.flatten()}),
    ],
    ids=["fewer", "more", "none", "one of several"],
)
def test_a_net_that_returns_other_rows_than_it_got_is_an_error_of_its_call(output: Callable[[Tensor], Any]):
    def net_run(x: Tensor) -> Any:
        return output(x) if (x == 13).any() else x

    net = Net("odd", net_run)
    good, bad = drawn([asking(net, x=X), asking(net, x=torch.full((2, 3), 13.0))])
    assert torch.equal(good.result, X)
    assert isinstance(bad.error, TypeError)
    assert "for 2 rows" in str(bad.error)


def test_rows_that_are_not_numbers_stay_with_their_owner():
    net = recording()
    bad, good = drawn([asking(net, x=torch.full((1, 3), math.nan)), asking(net, x=torch.ones(1, 3))])
    assert bad.result.isnan().all()
    assert good.result.tolist() == [[2.0] * 3]


def test_a_failed_call_is_raised_in_its_program_which_may_clean_up_or_carry_on():
    net, cleaned = failing_on(13.0), list[str]()

    def careful() -> Generator[Call, Any, str]:
        try:
            yield Call(net, {"x": torch.full((1, 1), 13.0)}, 1)
        finally:
            cleaned.append("careful")
        return "never"

    def stubborn() -> Generator[Call, Any, Any]:
        try:
            yield Call(net, {"x": torch.full((1, 1), 13.0)}, 1)
        except ArithmeticError:
            return (yield Call(net, {"x": torch.full((1, 1), 2.0)}, 1))

    first, second = drawn([careful(), stubborn()])
    assert isinstance(first.error, ArithmeticError)
    assert cleaned == ["careful"]
    assert second.result.item() == 4.0


# -- leaving


def test_a_canceled_program_cleans_up_and_its_rows_are_free_for_the_next_pass():
    net, cleaned = recording(), list[str]()

    def program() -> Iterator[Call]:
        try:
            while True:
                yield Call(net, {"x": X}, 2)
        finally:
            cleaned.append("up")

    engine = Engine()
    staying, leaving = engine.submit(counting(net, 3, X)), engine.submit(program())
    engine.step()
    engine.cancel(leaving)
    assert cleaned == ["up"]
    assert isinstance(leaving.error, Canceled)
    engine.cancel(leaving)  # again: nothing to do
    run_out(engine)
    assert net.run.rows == [4, 2, 2]
    assert staying.done
    engine.cancel(staying)  # too late
    assert staying.error is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_program_that_will_not_be_closed_is_gone_all_the_same():
    net = recording()

    def clinging() -> Iterator[Call]:
        for _ in range(3):
            with suppress(GeneratorExit):
                yield Call(net, {"x": X}, 2)

    engine = Engine()
    ticket = engine.submit(clinging())
    engine.cancel(ticket)
    assert ticket.done
    assert not engine


def test_nothing_is_left_waiting_of_a_ticket_that_is_done():
    net = recording()
    (ticket,) = drawn([counting(net, 2)])
    assert ticket.call is None
    assert Engine().step() == []


def test_gradients_are_off_in_programs_and_nets_and_back_on_after_them():
    torch.set_grad_enabled(True)
    modes = list[bool]()

    def net_run(x: Tensor) -> Tensor:
        modes.append(torch.is_grad_enabled())
        return x

    def program() -> Iterator[Call]:
        try:
            with torch.no_grad():  # as stock pipelines have it around all of their calls
                modes.append(torch.is_grad_enabled())
                yield Call(Net("n", net_run), {"x": X}, 2)
                yield Call(Net("n", net_run), {"x": X}, 2)
        finally:
            modes.append(torch.is_grad_enabled())

    engine = Engine()
    ticket = engine.submit(program())
    engine.step()
    engine.cancel(ticket)
    assert modes == [False] * 3
    assert torch.is_grad_enabled()


# -- what comes out


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (x, x + 1),
        lambda x: [x, (x + 1, None)],
        lambda x: {"sample": x, "scale": 3},
        lambda x: DecoderOutput(sample=x),
    ],
    ids=["tuple", "nested", "dict", "diffusers"],
)
def test_each_call_gets_its_rows_of_every_tensor_in_whatever_the_net_returns(make: Callable[[Tensor], Any]):
    net = Net("tree", lambda x: make(x))
    tickets = drawn([asking(net, x=X + i) for i in range(3)])
    for i, ticket in enumerate(tickets):
        assert_equal(ticket.result, make(X + i))


def test_tickets_show_the_last_step_begun_and_the_last_estimate():
    net = recording()

    def estimate() -> Tensor:
        return X

    def program() -> Generator[Call, Any, None]:
        yield Call(net, {"x": X}, 2)
        yield Call(net, {"x": X}, 2, (0, 2))
        yield Call(net, {"x": X}, 2, (1, 2), estimate)
        yield Call(net, {"x": X}, 2)

    engine = Engine()
    ticket = engine.submit(program())
    shown = [(ticket.at, ticket.estimate)]
    while engine:
        engine.step()
        shown.append((ticket.at, ticket.estimate))
    assert shown == [(None, None), ((0, 2), None), ((1, 2), estimate), ((1, 2), estimate), ((1, 2), None)]


def test_each_pass_is_observed_with_what_it_did():
    passes = list[Pass]()
    net = recording(buckets=(4,))
    engine = Engine(passes.append)
    tickets = [engine.submit(asking(net, x=torch.ones(rows, 1))) for rows in (1, 2)]
    engine.step()
    (one,) = passes
    assert (one.net, one.calls, one.rows, one.padded, list(one.tickets)) == (net, 2, 3, 4, tickets)
    assert 0 < one.seconds < 1


def test_columns_can_be_put_back_where_they_were():
    net = recording()
    columns = take_apart(Call(net, {"x": X, "k": {"p": X, "q": 1}}, 2))
    assert_equal(columns.arguments([X + 1, X + 2]), {"x": X + 1, "k": {"p": X + 2, "q": 1}})


# -- small programs and nets


def recording(name: str = "net", **policy: Any) -> Any:
    return Net(name, Recorder(), **policy)


def failing_on(value: float) -> Any:
    """A net that cannot bear a value, and counts its passes."""

    def run(x: Tensor) -> Tensor:
        passes.append(len(x))
        if (x == value).any():
            raise ArithmeticError
        return x * 2

    passes = list[int]()
    run.passes = passes
    return Net("picky", run)


def short_of_memory(rows: int, **policy: Any) -> Any:
    """A net on a device that has no room for more rows."""

    def run(x: Tensor, **_: Any) -> Tensor:
        passes.append(len(x))
        if len(x) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")
        return x * 2

    passes = list[int]()
    run.passes = passes
    return Net("large", run, buckets=(1, 2, 4, 8, 16), **policy)


def asking(net: Net, **args: Any) -> Generator[Call, Any, Any]:
    """One call; its outcome is the program's."""
    return (yield Call(net, args, len(args["x"])))


def counting(net: Net, steps: int, x: Tensor | None = None) -> Generator[Call, Any, Any]:
    """Doubles one so many times."""
    x = torch.ones(1, 1) if x is None else x
    for i in range(steps):
        x = yield Call(net, {"x": x}, len(x), (i, steps))
    return x.flatten()[0].item()


def drawn(programs: list[Any]) -> list[Any]:
    """All of them together, to their ends."""
    engine = Engine()
    tickets: list[Ticket] = [engine.submit(program) for program in programs]
    run_out(engine)
    assert all(ticket.done for ticket in tickets)
    return tickets


def run_out(engine: Engine) -> None:
    for _ in range(10_000):
        if not engine:
            return
        engine.step()
    raise AssertionError("the engine has not come to an end")


def assert_equal(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert_equal(list(ours.items()), list(theirs.items()))
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    elif hasattr(ours, "__dataclass_fields__"):
        assert_equal(vars(SimpleNamespace(**ours)), vars(SimpleNamespace(**theirs)))
    else:
        assert ours == theirs
