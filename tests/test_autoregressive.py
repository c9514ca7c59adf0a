"""Pictures written code by code: what must hold for any weights, and what the shipped ones can do."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from app.schemas import GenerationRequest, Parameters
from models.autoregressive import Autoregressive, chosen, gumbel
from models.catalog import Catalog
from models.loading import load_parts
from models.program import generator
from models.scoring import Scorer
from tests import tiny
from tests.test_journal import resumed_with_the_same_bytes
from tests.test_stable_diffusion import NOTHING, alone, as_image, progress, run_out, threads
from tests.test_stable_diffusion import asked as asked_of_sd
from workers.engine import Engine, Pass

CARDS = Catalog.read(["emoji-dalle", "emoji-parti"])
DALLE, PARTI = CARDS["emoji-dalle"], CARDS["emoji-parti"]
KINDS = pytest.mark.parametrize("crosses", [False, True], ids=["decoder-only", "encoder-decoder"])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@cache
def small_model(crosses: bool) -> Autoregressive:
    return Autoregressive(PARTI if crosses else DALLE, None, tiny.autoregressive(crosses))


@cache
def shipped(name: str) -> Autoregressive:
    return Autoregressive(CARDS[name], None, load_parts(CARDS[name], "cpu"))


def asked(**given: Any) -> Parameters:
    defaults = {"model": "emoji-parti", "width": 16, "height": 16, "num_inference_steps": 16, "scheduler": "top_p"}
    return asked_of_sd(**defaults | given)


# -- writing


@KINDS
def test_code_by_code_is_what_all_at_once_would_be(crosses: bool):
    writer = small_model(crosses).writer
    codes = torch.randint(16, (3, 16), generator=generator(0))
    words = small_model(crosses).encode_text(input_ids=small_model(crosses).tokens(["a cat", "a red dog", ""]))
    with torch.no_grad():
        whole, kept = writer(codes, torch.arange(16).expand(3, -1), words)
        cache = torch.full((3, *writer.cache_shape), 7.0)  # whatever is there already
        for i in range(16):
            logits, fresh = writer(codes[:, i : i + 1], torch.full((3, 1), i), words, cache)
            cache[:, :, :, :, i] = fresh[:, :, :, :, 0]
            torch.testing.assert_close(logits[:, 0], whole[:, i], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache, kept, rtol=1e-4, atol=1e-4)


@KINDS
def test_a_code_depends_on_the_words_and_on_those_before_it_only(crosses: bool):
    model = small_model(crosses)
    codes, places = torch.randint(16, (1, 16), generator=generator(0)), torch.arange(16)[None]
    cat, dog = (model.encode_text(input_ids=model.tokens([text])) for text in ("a cat", "a dog"))
    other = codes.clone()
    other[0, 9] = (other[0, 9] + 1) % 16
    with torch.no_grad():
        one, changed, of_dog = (model.writer(c, places, w)[0] for c, w in ((codes, cat), (other, cat), (codes, dog)))
    assert torch.equal(one[:, :9], changed[:, :9])
    assert not torch.equal(one[:, 9:], changed[:, 9:])
    assert (one - of_dog).abs().amin(dim=(0, 2)).max() > 0


def test_without_noise_the_likeliest_code_is_chosen():
    logits = torch.randn(5, 16, generator=generator(0))
    picked = chosen(logits, torch.zeros(5, 16), torch.ones(5), torch.ones(5))
    assert torch.equal(picked, logits.argmax(-1))


def test_codes_are_drawn_as_often_as_they_are_likely():
    likely = torch.tensor([0.6, 0.3, 0.1])
    noise = gumbel((20_000, 3), generator(0))
    picked = chosen(likely.log().expand(20_000, -1), noise, torch.ones(20_000), torch.ones(20_000))
    torch.testing.assert_close(picked.bincount(minlength=3) / 20_000, likely, atol=0.015, rtol=0)


def test_a_higher_temperature_evens_the_odds():
    likely, rows = torch.tensor([0.8, 0.2]), 20_000
    picked = chosen(
        likely.log().expand(rows, -1), gumbel((rows, 2), generator(0)), torch.full((rows,), 2.0), torch.ones(rows)
    )
    assert float((picked == 1).float().mean()) == pytest.approx(1 / 3, abs=0.015)  # √0.2 : √0.8


def test_of_each_row_only_the_likeliest_that_make_up_its_own_top_p_are_chosen():
    likely = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, -1)
    top_p = torch.tensor([0.4, 0.6, 0.9, 1.0]).repeat_interleave(1000)
    picked = chosen(likely, gumbel((4000, 4), generator(0)), torch.ones(4000), top_p).view(4, 1000)
    assert [sorted(set(row.tolist())) for row in picked] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


# -- as a program among others


@KINDS
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_in_a_crowd_the_same_codes_are_written(crosses: bool, guidance_scale: float):
    model, r = small_model(crosses), asked(seed=5, guidance_scale=guidance_scale)
    by_itself = alone(model, r)
    passes = list[Pass]()
    engine = Engine(passes.append)
    others = [engine.submit(model.draw(asked(seed=i, prompt="a dog"), i, NOTHING)) for i in range(3)]
    for _ in range(4):
        engine.step()
    ticket = engine.submit(model.draw(r, r.seed, NOTHING))  # in the midst of their pictures
    run_out(engine, ticket, *others)
    assert any(len(one.tickets) == 4 for one in passes if one.net is model.denoiser), "nothing was shared"
    assert (ticket.result - by_itself).abs().max() < 1e-4


@KINDS
def test_reproducible_pictures_have_the_same_bytes_in_any_company(crosses: bool):
    model, r = small_model(crosses), asked(seed=5, reproducible=True)
    by_itself = alone(model, r, exact=True)
    engine = Engine()
    for i in range(5):
        engine.submit(model.draw(asked(seed=i, guidance_scale=1.0 + i % 2), i, NOTHING), seat=i if i % 2 else None)
    engine.step()
    ticket = engine.submit(model.draw(r, r.seed, NOTHING), seat=r.seed)
    run_out(engine, ticket)
    assert torch.equal(ticket.result, by_itself)


@KINDS
def test_a_picture_goes_on_at_the_code_where_its_worker_died(crosses: bool):
    resumed_with_the_same_bytes(small_model(crosses), asked(reproducible=True))


def test_each_code_is_a_step():
    assert progress(small_model(True), asked()) == [(i, 16) for i in range(16)]


def test_a_seed_and_a_prompt_decide_the_picture():
    model = small_model(True)
    one = alone(model, asked())
    assert torch.equal(one, alone(model, asked()))
    assert not torch.equal(one, alone(model, asked(seed=1)))
    assert not torch.equal(one, alone(model, asked(prompt="a dog")))


def test_the_negative_prompt_steers_where_there_is_guidance():
    model, away = small_model(True), "two dogs, a drum and a fish in the sea"
    guided = asked(guidance_scale=20.0)
    assert not torch.equal(alone(model, guided), alone(model, guided.model_copy(update={"negative_prompt": away})))
    unguided = asked(guidance_scale=1.0)
    assert torch.equal(alone(model, unguided), alone(model, unguided.model_copy(update={"negative_prompt": away})))


# -- what is refused


@pytest.mark.parametrize(
    ("given", "field", "detail"),
    [
        ({"num_inference_steps": 20}, "num_inference_steps", "emoji-parti always takes 256"),
        ({"best_of": 9}, "best_of", "9 is more than emoji-parti allows (8)"),
        ({"image": "given", "strength": 0.5}, "image", "emoji-parti does not do image-to-image"),
        ({"scheduler": "ddim"}, "scheduler", "emoji-parti has no 'ddim'; it has top_p"),
    ],
)
def test_what_it_cannot_do_is_said(given: Any, field: str, detail: str):
    assert (field, detail) in list(PARTI.problems(GenerationRequest(prompt="a cat", **given)))


def test_the_number_of_codes_may_be_named():
    assert list(PARTI.problems(GenerationRequest(prompt="a cat", num_inference_steps=256))) == []


def test_a_model_without_clip_draws_one_candidate():
    card = Catalog.read(["emoji-sd"])["emoji-sd"]
    problems = list(card.problems(GenerationRequest(prompt="a cat", best_of=2)))
    assert problems == [("best_of", "2 is more than emoji-sd allows (1)")]


# -- what the shipped weights can do

CAPTIONS = [
    f"a {thing} on a {colour} background"
    for thing, colour in (("red apple", "blue"), ("penguin", "yellow"), ("lemon", "pink"), ("owl", "blue"))
]


@cache
def scorer() -> Scorer:
    return Scorer()


def agreement(name: str, captions: list[str], **given: Any) -> float:
    model, engine = shipped(name), Engine()
    size = {"width": 128, "height": 128, "num_inference_steps": 256}
    requests = [asked(prompt=one, seed=i, **size | given) for i, one in enumerate(captions)]
    tickets = [engine.submit(model.draw(r, r.seed, NOTHING)) for r in requests]
    run_out(engine, *tickets)
    drawn: list[Tensor] = [ticket.result for ticket in tickets]
    pictures = scorer().pictures([as_image(one) for one in drawn])
    return float((pictures * scorer().captions(captions)).sum(-1).mean())


def test_the_best_of_four_agrees_better_than_the_first():
    assert agreement("emoji-dalle", CAPTIONS, best_of=4) > agreement("emoji-dalle", CAPTIONS) + 0.03


def test_guided_logits_agree_better():
    captions = [*CAPTIONS[:2], "a cactus", "a pizza on a green background", "a lemon next to a strawberry", "a car",
                "an owl", "a rocket on a dark blue background"]  # fmt: skip
    unguided, guided = (agreement("emoji-parti", captions, guidance_scale=scale) for scale in (1.0, 3.0))
    assert guided > unguided + 0.03
