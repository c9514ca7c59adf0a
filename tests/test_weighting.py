"""Words of a prompt that weigh more than others: how they are written, and what the shipped model draws of them."""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from app.schemas import GenerationRequest
from models.catalog import Catalog
from models.loading import load_parts, load_pipeline
from models.scoring import Scorer
from models.stable_diffusion import StableDiffusion
from models.weighting import DEEPEST, fragments, words
from tests.test_journal import resumed_with_the_same_bytes
from tests.test_picture_input import examples
from tests.test_stable_diffusion import CARD, IN_COMPANY, NOTHING, alone, as_image, asked, run_out, threads
from workers.engine import Engine, Pass

MARKED = st.text("ab é,.:1\\()[]")
SMALL = {"width": 64, "height": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture(scope="module")
def shipped() -> StableDiffusion:
    return StableDiffusion(CARD, load_pipeline(CARD, "cpu"), load_parts(CARD, "cpu"))


# -- as it is written


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red apple", [("a red apple", 1)]),
        ("", [("", 1)]),
        ("()", [("", 1)]),
        ("a (red) apple", [("a ", 1), ("red", 1.1), (" apple", 1)]),
        ("a ((red)) apple", [("a ", 1), ("red", 1.21), (" apple", 1)]),
        ("a [red] apple", [("a ", 1), ("red", 0.909091), (" apple", 1)]),
        ("(red:1.3) apple", [("red", 1.3), (" apple", 1)]),
        ("(red : 0) (apple:.5)", [("red ", 0), (" ", 1), ("apple", 0.5)]),
        ("((red:2) apple)", [("red", 2.2), (" apple", 1.1)]),
        ("[(red)](apple:1)", [("redapple", 1)]),
        ("(red)(apple)", [("redapple", 1.1)]),
        (r"a \(red\) \[apple\] \\ here", [(r"a (red) [apple] \ here", 1)]),
        (r"(a \(red:1.5\):1.2)", [("a (red:1.5)", 1.2)]),
        ("a b\\c", [("a bc", 1)]),
        ("a (red apple", [("a ", 1), ("red apple", 1.1)]),
        ("a [red apple", [("a ", 1), ("red apple", 0.909091)]),
        ("a) red:1.2) apple]", [("a) red:1.2) apple]", 1)]),
        ("(a [red) apple] here", [("a ", 1.1), ("red", 1), (" apple", 0.909091), (" here", 1)]),
        ("[red:1.5] (1.2.3:x)", [("red:1.5", 0.909091), (" ", 1), ("1.2.3:x", 1.1)]),
    ],
)
def test_brackets_are_weights(prompt: str, expected: list[tuple[str, float]]):
    assert fragments(prompt) == expected


@examples
@given(st.text(st.characters(exclude_characters="\\()[]")))
def test_text_without_marks_stays_as_it_is(text: str):
    assert fragments(text) == [(text, 1.0)]


@examples
@given(st.text())
@example("\\(")
def test_text_with_a_backslash_before_each_mark_is_that_text(text: str):
    assert fragments(re.sub(r"([\\()\[\]])", r"\\\1", text)) == [(text, 1.0)]


@examples
@given(MARKED)
def test_neighbours_differ_in_weight_and_no_letter_is_lost(prompt: str):
    found = fragments(prompt)
    assert all(one.weight != other.weight for one, other in pairwise(found))
    assert re.sub("[^ab é,]", "", prompt) == re.sub("[^ab é,]", "", "".join(one.text for one in found))


def test_brackets_deeper_than_fifty_are_text():
    (only,) = fragments("[" * (DEEPEST + 1) + "a")
    assert only.text == "[a"


# -- as it is read


@examples
@given(MARKED)
@example("super(man)")
def test_the_text_encoder_sees_the_words_alone(shipped: StableDiffusion, prompt: str):
    ids, weights = shipped.weighed([prompt, ""])
    assert torch.equal(ids, shipped.tokens([words(prompt), ""]))
    assert (weights[1] == 1).all()
    assert set(weights[0].tolist()) <= {1.0, *torch.tensor([one.weight for one in fragments(prompt)]).tolist()}


def test_words_that_are_not_seen_are_reported_without_their_marks(shipped: StableDiffusion):
    long = asked(prompt="(apple:1.2) " * 40 + "[with a worm]", prompt_weights=True)
    (warning,) = shipped.warnings(long)
    assert "prompt is cut after 30 tokens" in warning
    assert "with a worm" in warning
    assert "[" not in warning
    assert shipped.warnings(asked(prompt="((((apple:1.1))))" * 8, prompt_weights=True)) == []


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        ({"prompt": "a (red:4) [apple]"}, []),
        ({"prompt": "a (red:4.1) apple"}, ["prompt"]),
        ({"prompt": "a (red:-1) apple"}, ["prompt"]),
        ({"negative_prompt": "((blue:999999999))"}, ["negative_prompt"]),
        ({"prompt": "(a:9)", "prompt_weights": False}, []),
        ({"model": "emoji-glide"}, ["prompt_weights"]),
        ({"model": "emoji-glide", "prompt": "a (red:9) apple", "prompt_weights": False}, []),
    ],
)
def test_weights_that_cannot_be_are_refused(asked: dict[str, Any], wrong: list[str]):
    request = GenerationRequest.model_validate({"prompt": "an apple", "prompt_weights": True, **asked})
    card = Catalog.read(["emoji-sd", "emoji-glide"])[request.model or "emoji-sd"]
    assert [field for field, _ in card.problems(request)] == wrong


# -- as it is drawn


@pytest.mark.parametrize("prompt", ["a red apple on a blue background", "a [(red)] (apple:1) on a blue background"])
def test_weights_of_one_change_no_byte(shipped: StableDiffusion, prompt: str):
    steered = {"guidance": {"clip": 2.0}}
    plain = alone(shipped, asked(negative_prompt="green", **steered, **SMALL))
    weighed = asked(prompt=prompt, negative_prompt="(green:1)", prompt_weights=True, **steered, **SMALL)
    assert torch.equal(alone(shipped, weighed), plain)


def test_without_prompt_weights_brackets_are_text(shipped: StableDiffusion):
    plain, weighed = (asked(prompt="a (red:2) apple", prompt_weights=on, **SMALL) for on in (False, True))
    difference = (alone(shipped, plain) - alone(shipped, weighed)).abs().max()
    assert difference > 0.01
    assert "(red:2)" in shipped.tokenizer.decode(shipped.tokens([plain.prompt])[0]).replace(" ", "")


def test_a_heavier_word_is_drawn_more_and_a_lighter_one_less(shipped: StableDiffusion):
    """How much more its caption agrees than the other thing's: measured -0.03 at 0.5 and 0.05 at 2."""
    scorer = Scorer()
    captions = scorer.captions(["a cat", "a dog"])

    def lead(weight: float) -> float:
        prompt = f"a dog next to a (cat:{weight})"
        pictures = crowd(shipped, [asked(prompt=prompt, seed=i, prompt_weights=True) for i in range(6)])
        agreement = scorer.pictures([as_image(one) for one in pictures]) @ captions.T
        return float((agreement[:, 0] - agreement[:, 1]).mean())

    assert lead(2) - lead(0.5) > 0.03


WEIGHED = asked(prompt="a (red:1.6) [apple]", negative_prompt="(blue)", prompt_weights=True, seed=3, **SMALL)
OTHERS = [
    asked(seed=1, **SMALL),
    asked(prompt="(a cat:0.5) on a (teal:2) background", prompt_weights=True, seed=2, scheduler="euler_a", **SMALL),
    asked(guidance_scale=1.0, seed=4, scheduler="heun", **SMALL),
]


def test_a_weighed_request_draws_the_same_alone_and_in_a_crowd(shipped: StableDiffusion):
    expected = alone(shipped, WEIGHED)
    assert (crowd(shipped, [WEIGHED, *OTHERS])[0] - expected).abs().max() <= IN_COMPANY
    expected = alone(shipped, WEIGHED, exact=True)
    assert torch.equal(crowd(shipped, [WEIGHED, *OTHERS], exact=True)[0], expected)


def test_it_shares_every_pass_with_requests_without_weights(shipped: StableDiffusion):
    passes = list[Pass]()
    crowd(shipped, [WEIGHED, OTHERS[0]], passes=passes)
    assert [(p.net.name, p.calls) for p in passes] == [
        ("encode_text", 2),
        ("denoise", 2),
        ("denoise", 2),
        ("decode", 2),
    ]


def test_it_goes_on_with_the_same_bytes(shipped: StableDiffusion):
    resumed_with_the_same_bytes(shipped, WEIGHED.model_copy(update={"reproducible": True}))


def crowd(
    model: StableDiffusion, requests: list[Any], exact: bool = False, passes: list[Pass] | None = None
) -> list[Any]:
    engine = Engine([].append if passes is None else passes.append)
    tickets = [engine.submit(model.draw(r, r.seed, NOTHING), seat=r.seed if exact else None) for r in requests]
    run_out(engine, *tickets)
    return [ticket.result for ticket in tickets]
