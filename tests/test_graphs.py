"""Recorded passes: what a graph does with buffers that stay where they are. Recorded here by one that plays a net's
launches again on the CPU, into the same outputs; where there is a GPU, by CUDA."""

from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as torch_pytree

from models.program import Call, Inputs, Net, Program
from models.stable_diffusion import StableDiffusion
from tests.test_stable_diffusion import asked, shipped  # noqa: F401
from workers import graphs
from workers.engine import Engine, Ticket
from workers.graphs import Graphs
from workers.passes import Eager, Fetched, Stopwatch, take_apart

NOTHING = Inputs()


class Recorded(Graphs):
    """Its recorder counts what is recorded and played."""

    def __init__(self) -> None:
        super().__init__(self.recorder, "cpu")
        self.recorded = self.played = 0

    def stopwatch(self) -> Stopwatch:
        return Stopwatch()

    def recorder(self, run: Callable[[], Any]) -> Callable[[], Any]:
        self.recorded += 1
        output = run()
        there = [leaf for leaf in torch_pytree.tree_leaves(output) if isinstance(leaf, Tensor)]

        def replay() -> Any:
            self.played += 1
            again = [leaf for leaf in torch_pytree.tree_leaves(run()) if isinstance(leaf, Tensor)]
            for old, new in zip(there, again, strict=True):
                old.copy_(new)
            return output

        return replay


def drawn(runner: Any, programs: list[Program], **options: Any) -> list[Ticket]:
    engine = Engine(runner=runner, **options)
    tickets = [engine.submit(program) for program in programs]
    while engine:
        engine.step()
    return tickets


def stepping(net: Net, x: Tensor, steps: int, told: Tensor) -> Generator[Call, Any, Tensor]:
    for i in range(steps):
        x = yield Call(net, {"x": x, "told": told}, len(x), (i, steps))
    return x


def net(**options: Any) -> Net:
    return Net("add", lambda x, told: x + told, buckets=(4, 8), width=8, **{"recordable": True} | options)


def test_a_shape_is_run_once_recorded_once_and_played_from_then_on():
    runner, adding = Recorded(), net()
    (ticket,) = drawn(runner, [stepping(adding, torch.zeros(2, 3), 10, torch.ones(2, 3))])
    assert torch.equal(ticket.result, torch.full((2, 3), 10.0))
    assert (runner.recorded, runner.played) == (1, 9)


def test_programs_that_come_and_go_get_what_they_get_without_graphs():
    def programs(adding: Net) -> list[Program]:
        rng = torch.Generator().manual_seed(0)
        asked = [(steps, torch.randn(rows, 3, generator=rng)) for steps in (3, 9, 1, 5) for rows in (1, 2, 1)]
        return [stepping(adding, x, steps, x.flip(1)) for steps, x in asked]

    runner, plain = Recorded(), Eager()
    recorded, eager = drawn(runner, programs(net())), drawn(plain, programs(net()))
    for one, other in zip(recorded, eager, strict=True):
        assert torch.equal(one.result, other.result)
    assert runner.played


def test_rows_that_nobody_took_over_are_zeros_again():
    seen = list[Tensor]()

    def run(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x + 1

    def program(steps: int) -> Program:
        x = torch.ones(1, 1)
        for _ in range(steps):
            x = yield Call(watched, {"x": x}, 1)
        return x

    watched = Net("watched", run, buckets=(4,), width=4, recordable=True)
    drawn(Recorded(), [program(4), program(8)])
    assert seen[-1].flatten().tolist() == [8, 0, 0, 0]


def test_what_a_request_is_told_at_each_step_is_copied_once(monkeypatch: pytest.MonkeyPatch):
    copies = list[int]()

    def counted(there: list[Tensor], columns: list[Tensor]) -> None:
        copies.append(len(columns))
        for one, column in zip(there, columns, strict=True):
            one.copy_(column)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    adding = net()
    drawn(Recorded(), [stepping(adding, torch.zeros(1, 3), 5, torch.ones(1, 3)) for _ in range(2)])
    told_and_x, x_alone = 4, 2
    assert copies[0] == told_and_x
    assert set(copies[1:]) == {x_alone}


def test_what_was_written_to_is_copied_again():
    runner, adding = Recorded(), net()
    told = torch.ones(1, 1)

    def program() -> Program:
        x = torch.zeros(1, 1)
        for _ in range(5):
            x = yield Call(adding, {"x": x, "told": told}, 1)
            told.add_(1)
        return x

    (ticket,) = drawn(runner, [program()])
    assert ticket.result.item() == 1 + 2 + 3 + 4 + 5


def test_a_tensor_that_is_gone_is_not_taken_for_one_that_got_its_address():
    tensor = torch.ones(2)
    held = graphs.identity(tensor)
    assert graphs.same(held, graphs.identity(tensor))
    del tensor
    assert not graphs.same(held, held)


def test_what_all_calls_share_is_the_graphs_own():
    shared = Net("shared", lambda x, told: x + told.sum(), frozenset({"told"}), (4,), recordable=True)
    runner, told = Recorded(), torch.ones(3)
    (first,) = drawn(runner, [stepping(shared, torch.zeros(1, 1), 4, told)])
    told.zero_()
    (second,) = drawn(runner, [stepping(shared, torch.zeros(1, 1), 4, torch.ones(3))])
    assert first.result.item() == second.result.item() == 12
    assert runner.recorded == 1


def test_what_lies_elsewhere_is_not_recorded():
    runner = Recorded()
    runner.device = "cuda"
    drawn(runner, [stepping(net(), torch.zeros(1, 3), 5, torch.ones(1, 3))])
    assert (runner.recorded, runner.played) == (0, 0)


def test_views_of_the_same_rows_are_the_same_and_of_others_are_not():
    table = torch.arange(12.0).view(4, 3)
    assert graphs.same(graphs.identity(table[1].expand(2, -1)), graphs.identity(table[1].expand(2, -1)))
    assert not graphs.same(graphs.identity(table[1].expand(2, -1)), graphs.identity(table[2].expand(2, -1)))


def test_a_net_that_cannot_be_recorded_is_run_as_it_is_written():
    def refuse(run: Callable[[], Any]) -> Callable[[], Any]:
        raise RuntimeError("operation not permitted when stream is capturing")

    runner, adding = Recorded(), net()
    runner.record = refuse
    (ticket,) = drawn(runner, [stepping(adding, torch.zeros(1, 3), 5, torch.ones(1, 3))])
    assert torch.equal(ticket.result, torch.full((1, 3), 5.0))
    assert not adding.recordable


def test_a_net_that_says_so_is_never_recorded():
    runner = Recorded()
    drawn(runner, [stepping(net(recordable=False), torch.zeros(1, 3), 5, torch.ones(1, 3))])
    assert (runner.recorded, runner.played) == (0, 0)


def test_shapes_that_did_not_come_back_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graphs, "KEPT", 3)
    runner, adding = Recorded(), net()
    for size in range(1, 8):
        drawn(runner, [stepping(adding, torch.zeros(1, size), 4, torch.ones(1, size))])
    assert len(runner.nets[adding]) == 3


def test_graphs_go_with_their_net():
    runner = Recorded()
    drawn(runner, [stepping(net(), torch.zeros(1, 3), 5, torch.ones(1, 3))])
    assert not runner.nets


def test_a_program_goes_on_while_its_pass_is_under_way_and_the_pass_before_is_waited_for():
    """With a stopwatch that knows when it was asked."""
    order = list[str]()

    class Asked(Stopwatch):
        def seconds(self) -> float:
            order.append("waited")
            return 0.0

    class Runner(Recorded):
        def stopwatch(self) -> Stopwatch:
            order.append("launched")
            return Asked()

    (ticket,) = drawn(Runner(), [stepping(net(), torch.zeros(1, 3), 3, torch.ones(1, 3))])
    assert ticket.done
    assert order == ["launched", "launched", "waited", "launched", "waited", "waited"]


def test_the_shipped_model_draws_the_same_pictures_from_graphs(shipped: StableDiffusion):  # noqa: F811
    def programs() -> list[Program]:
        requests = [
            asked(scheduler=s, num_inference_steps=n) for s, n in (("euler_a", 4), ("dpmpp_2m", 5), ("ddim", 3))
        ]
        return [shipped.draw(r, seed, NOTHING) for seed, r in enumerate(requests)]

    runner = Recorded()
    for one, other in zip(drawn(runner, programs()), drawn(Eager(), programs()), strict=True):
        assert one.error is None
        torch.testing.assert_close(one.result, other.result, atol=1e-5, rtol=0)
    assert runner.played


def test_what_is_fetched_is_what_it_was():
    x = torch.ones(3)
    kept, seen = Fetched(x, copy=True), Fetched(x)
    x.add_(1)
    assert kept.tensor().tolist() == [1, 1, 1]
    assert seen.tensor() is x


def test_a_tensor_that_must_be_equal_is_read_once_until_it_is_written_to():
    told = torch.ones(3)
    shared = Net("shared", lambda x, told: x, frozenset({"told"}))

    def key() -> Any:
        return take_apart(Call(shared, {"x": torch.zeros(1, 1), "told": told}, 1)).key

    before = key()
    assert key() == before
    told.add_(1)
    assert key() != before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_graphs_return_what_eager_passes_do():
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64)).cuda()
    told = torch.ones(2, 64, device="cuda")

    def programs() -> list[Program]:
        deep = Net("deep", lambda x, told: layer(x) + told, buckets=(4, 8), width=8, recordable=True)
        return [stepping(deep, torch.randn(2, 64).cuda() * 0 + i, 6 + i, told) for i in range(5)]

    for one, other in zip(drawn(Graphs(), programs()), drawn(Eager(torch.device("cuda")), programs()), strict=True):
        assert one.error is None
        torch.testing.assert_close(one.result, other.result)
