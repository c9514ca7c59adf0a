"""Who takes part in which pass, and what the simulator says of it."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from app.cli import cli
from models.program import Call, Net, Program
from workers.engine import Engine, Pass
from workers.policy import Policy, fitting, widest, worthwhile
from workers.simulation import CURVES, MIXES, POLICIES, Outcome, Request, arrivals, averaged, passes, run


@dataclass(eq=False)
class One:
    name: str
    left: int = 10
    number: int = 0
    key: str = "denoise"
    account: str = "model"
    rank: int = 1
    rows: int = 1


def names(policy: Policy, *waiting: One) -> list[str]:
    return [one.name for one in policy.turn(waiting)]


# -- the policy


def test_whoever_has_waited_longest_leads_and_the_others_follow_by_what_they_have_left():
    waiting = One("long", 50), One("middle", 8), One("short", 2), One("other", 5)
    assert names(Policy(), *waiting) == ["long", "short", "other", "middle"]


def test_a_higher_priority_goes_before_what_is_nearly_done():
    assert names(Policy(), One("first"), One("short", 2), One("urgent", 50, rank=0)) == ["first", "urgent", "short"]


def test_passes_of_different_kinds_are_for_whoever_is_nearly_done_and_whoever_came_first_in_turns():
    waiting = One("b", 9, 3), One("large", 50, 1, key="large"), One("a", 7, 2), One("larger", 30, 4, key="larger")
    policy = Policy()
    assert [names(policy, *waiting) for _ in range(4)] == [["b", "a"], ["large"], ["b", "a"], ["large"]]


def test_what_is_no_step_waits_for_one_at_most():
    text, policy = One("text", 0, 5, key="encode"), Policy()
    assert names(policy, One("a", 9, 1), text) == ["text"]
    assert names(policy, One("a", 9, 1), text) == ["a"]
    assert names(policy, One("a", 9, 1), text) == ["text"]


def test_models_get_the_same_time_whatever_their_passes_take():
    policy, seconds = Policy(), Counter[str]()
    for _ in range(1000):
        (one,) = policy.turn([One("slow", account="slow"), One("quick", account="quick")])
        took = {"slow": 1.0, "quick": 0.02}[one.name]
        policy.charge(one.account, took)
        seconds[one.name] += took
    assert seconds["slow"] == pytest.approx(seconds["quick"], abs=1)


@pytest.mark.parametrize(("took", "turns"), [(0.01, "aaaabbbbaaaa"), (0.3, "aabbaabbaabb"), (2.0, "abababababab")])
def test_a_model_keeps_its_turn_for_four_passes_or_half_a_second(took: float, turns: str):
    policy, seen = Policy(), ""
    for _ in turns:
        (one,) = policy.turn([One("a", account="a"), One("b", account="b")])
        policy.charge(one.account, took)
        seen += one.name
    assert seen == turns


def test_a_model_that_comes_back_has_saved_up_nothing():
    policy, turns = Policy(), list[str]()
    for _ in range(50):
        policy.turn([One("busy", account="busy")])
        policy.charge("busy", 1.0)
    for _ in range(10):
        (one,) = policy.turn([One("busy", account="busy"), One("back", account="back")])
        policy.charge(one.account, 1.0)
        turns.append(one.name)
    assert Counter(turns) == {"busy": 5, "back": 5}


def test_nobody_is_put_off_for_good():
    """However many short ones come in."""
    policy, waiting, passes = Policy(), [One("long", 1000), *(One(f"crowd {i}") for i in range(9))], Counter[str]()
    for i in range(300):
        chosen = fitting(policy.turn(waiting), 4)
        passes.update(one.name for one in chosen)
        waiting = [one for one in waiting if one not in chosen]
        waiting += [one if one.name == "long" else One(f"newcomer {i}", 2) for one in chosen]
    assert passes["long"] >= 300 // 10


# -- how wide

LINE = {rows: 0.004 + 0.003 * rows for rows in (1, 2, 4, 6, 8, 12, 16, 24, 32)}


def test_a_pass_is_the_wider_the_more_rows_wait():
    widths = [worthwhile(LINE, waiting) for waiting in (1, 4, 8, 16, 32, 64, 128)]
    assert widths == sorted(widths)
    assert widths[0] < 6
    assert widths[-1] == 32
    assert 12 <= worthwhile(LINE, 24) <= 16  # the root of 8 · 4/3 · 24 is 16


def test_where_rows_cost_nothing_a_pass_is_as_wide_as_it_may_be():
    assert worthwhile(dict.fromkeys((2, 4, 8, 16), 0.01), 2) == 16


def test_where_a_row_costs_as_much_as_any_other_the_narrowest_is_best_however_many_wait():
    assert worthwhile({rows: 0.01 * rows for rows in (2, 4, 8)}, 1000) == 2


def test_a_cliff_in_the_curve_is_not_gone_over():
    cliff = LINE | {24: 3 * LINE[24], 32: 3 * LINE[32]}
    assert widest(cliff) == worthwhile(cliff, 1000) == 16


# -- the simulator


def counting(net: Net, request: Request) -> Program:
    for i in range(request.steps):
        yield Call(net, {"x": torch.zeros(request.rows, int(4 * request.size))}, request.rows, (i, request.steps))
    return torch.zeros(1)


class Timed(Policy):
    """Charges what the curve says instead of what this machine took."""

    def charge(self, account: str, seconds: float) -> None:
        super().charge(account, TOOK[account])


TOOK = {"sd15": 0.03, "sdxl": 0.15}


@pytest.mark.parametrize("mix", ["b", "c", "d"])
def test_it_lets_in_the_same_requests_as_the_engine_pass_by_pass(mix: str):
    requests = arrivals(MIXES[mix], "sd15", CURVES, load=1e9, count=30, seed=1)  # all at once
    curves = {model: {rows: took * (1 + rows / 8) for rows in range(1, 17)} for model, took in TOOK.items()}
    for request in requests:
        request.arrives = 0.0
    simulated = [[requests.index(one) for one in chosen] for chosen in passes(requests, curves, Timed(), 30)]

    nets = {model: Net(model, lambda x: x, seconds=curve, width=widest(curve)) for model, curve in curves.items()}
    seen = list[list[int]]()

    def observe(done: Pass) -> None:
        seen.append([tickets.index(ticket) for ticket in done.tickets])

    engine = Engine(observe, policy=Timed())
    tickets = list[object]()
    for request in requests:
        request.done = 0
        tickets.append(engine.submit(counting(nets[request.account], request), account=request.account))
    while engine:
        engine.step()
    assert seen == simulated
    assert len({sum(requests[i].rows for i in chosen) for chosen in seen}) > 2  # some wide, some narrow


def test_every_request_ends_and_none_before_it_could():
    requests = arrivals(MIXES["b"], "sd15", CURVES, load=0.9, count=300, seed=0)
    for _ in passes(requests, CURVES, Policy(), 2.0):
        pass
    fastest = min(CURVES["sd15"].values())
    assert all(one.done == one.steps and one.latency >= one.steps * fastest for one in requests)


def test_short_requests_overtake_long_ones_that_are_held_with_them():
    def p99_short(policy: str) -> float:
        return averaged([run(policy, "b", "sd15", 1.0, 600, seed) for seed in range(3)]).p99_short

    assert p99_short("holding 2") < 0.6 * p99_short("holding 1")


def test_passes_that_are_only_as_wide_as_is_worth_it_end_sooner_unless_there_is_too_much_to_do():
    def outcome(policy: str, load: float) -> Outcome:
        return averaged([run(policy, "a", "sd15", load, 600, seed) for seed in range(3)])

    assert outcome("holding 2", 0.8).p50 < 0.5 * outcome("full width", 0.8).p50
    assert outcome("holding 2", 0.8).p99 < 0.8 * outcome("full width", 0.8).p99
    assert outcome("holding 2", 1.2).throughput > 0.97 * outcome("full width", 1.2).throughput


def test_the_command_prints_a_row_a_load_and_policy_and_draws_them(tmp_path: Path):
    asked = ["simulate", "--mix", "a", "--requests", "100", "--seeds", "1", "--plot", str(tmp_path / "plot.png")]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 0, result.output
    assert all(policy in result.output for policy in POLICIES)
    assert Image.open(tmp_path / "plot.png").width > 500
    assert CliRunner().invoke(cli, ["simulate", "--mix", "z"]).exit_code == 1
