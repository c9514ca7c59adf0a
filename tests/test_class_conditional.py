"""Classifier and CLIP guidance on shipped weights: the gradient of a net that knows noise pulls pictures its way."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from app.schemas import Parameters
from models.catalog import Catalog
from models.class_conditional import ClassConditional
from models.loading import load_parts, load_pipeline
from models.scoring import Judge
from models.training.classes import begin
from tests.test_journal import resumed_with_the_same_bytes
from tests.test_stable_diffusion import NOTHING, alone, as_image, run_out, threads
from tests.test_stable_diffusion import asked as asked_of_sd
from tests.test_unclip import drawn
from workers.engine import Engine, Pass

CARD = Catalog.read(["emoji-classes"])["emoji-classes"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture(scope="module")
def shipped() -> ClassConditional:
    return ClassConditional(CARD, load_pipeline(CARD, "cpu"), load_parts(CARD, "cpu"))


def asked(**given: Any) -> Parameters:
    return asked_of_sd(**{"model": CARD.name, "prompt": "dog", "guidance_scale": 1.0, "num_inference_steps": 8} | given)


def certainty(model: ClassConditional, guidance: dict[str, float]) -> float:
    """Mean log p(class | picture), by a classifier that has no part in drawing."""
    labels = range(0, len(CARD.classes), 2)
    requests = [(asked(prompt=CARD.classes[i], seed=i, guidance=guidance), NOTHING) for i in labels]
    found = Judge()([as_image(picture) for picture in drawn(model, requests)])
    return float(found[range(len(labels)), labels].mean())


@pytest.fixture(scope="module")
def unguided(shipped: ClassConditional) -> float:
    return certainty(shipped, {})


@pytest.mark.parametrize("kind", ["classifier", "clip"])
def test_the_harder_it_pulls_the_surer_an_independent_classifier_is(
    shipped: ClassConditional, unguided: float, kind: str
):
    pulled = certainty(shipped, {kind: 3.0})
    assert pulled > unguided + 0.05, (unguided, pulled)


def test_gradients_of_many_requests_share_their_passes(shipped: ClassConditional):
    passes = list[Pass]()
    engine = Engine(passes.append)
    tickets = [
        engine.submit(shipped.draw(r, r.seed, NOTHING))
        for r in (
            asked(prompt=name, seed=i, num_inference_steps=3, width=64, height=64, guidance={"classifier": 2.0})
            for i, name in enumerate(CARD.classes[:16:4])
        )
    ]
    run_out(engine, *tickets)
    assert [done.calls for done in passes if done.net is shipped.classifying] == [4, 4, 4]


def test_a_pulled_request_and_another_do_not_touch_each_other(shipped: ClassConditional):
    pulled = asked(seed=1, guidance={"classifier": 3.0}, width=64, height=64)
    plain = asked(seed=1, width=64, height=64)
    together = drawn(shipped, [(pulled, NOTHING), (plain, NOTHING)])
    for r, one in zip((pulled, plain), together, strict=True):
        torch.testing.assert_close(one, alone(shipped, r), atol=1e-5, rtol=0)
    assert not torch.allclose(*together, atol=1e-2)


def test_the_exact_lane_keeps_every_bit_of_a_pulled_picture(shipped: ClassConditional):
    r = asked(seed=9, num_inference_steps=3, guidance={"classifier": 2.0}, reproducible=True)
    by_itself = alone(shipped, r, exact=True)
    engine = Engine()
    for seed in range(3):
        engine.submit(
            shipped.draw(asked(seed=seed, num_inference_steps=4, guidance={"classifier": 1.0}), seed, NOTHING)
        )
        engine.step()
    ticket = engine.submit(shipped.draw(r, r.seed, NOTHING), seat=r.seed)
    run_out(engine, ticket)
    assert torch.equal(ticket.result, by_itself)


def test_a_pulled_picture_goes_on_with_the_same_bytes(shipped: ClassConditional):
    r = asked(num_inference_steps=4, guidance={"classifier": 2.0}, width=64, height=64, reproducible=True)
    resumed_with_the_same_bytes(shipped, r)


def test_outside_of_its_interval_guidance_costs_nothing(shipped: ClassConditional):
    rows = list[int]()
    engine = Engine(lambda done: rows.append(sum([done.rows])) if done.net is shipped.denoiser else None)
    r = asked(num_inference_steps=4, guidance_scale=3.0, guidance={"interval": [0.25, 0.75]}, width=64, height=64)
    run_out(engine, engine.submit(shipped.draw(r, 0, NOTHING)))
    assert rows == [1, 2, 2, 1]


def test_a_denoiser_of_its_own_is_told_the_number_of_the_class():
    torch.manual_seed(0)
    parts = load_parts(CARD, "cpu") | {"denoiser": begin(len(CARD.classes)).eval()}
    own = ClassConditional(CARD, load_pipeline(CARD, "cpu"), parts)
    told = list[torch.Tensor]()
    parts["denoiser"].class_embedding.register_forward_hook(lambda _, given, __: told.append(given[0]))
    brief = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 64, "height": 64}
    requests = [asked(prompt=name, **brief) for name in ("dog", "cat")]
    together = drawn(own, [(r, NOTHING) for r in requests])
    assert told[0].tolist() == [0, 1 + CARD.classes.index("dog"), 0, 1 + CARD.classes.index("cat")]
    for r, one in zip(requests, together, strict=True):
        torch.testing.assert_close(one, alone(own, r), atol=1e-5, rtol=0)


def test_half_precision_weights_steer_full_precision_samples(shipped: ClassConditional):
    """As on a GPU, where a card's weights are float16 and what a sampler steps is not."""
    pipeline, parts = load_pipeline(CARD, "cpu").to(torch.bfloat16), load_parts(CARD, "cpu")
    half = ClassConditional(CARD, pipeline, {name: part.to(torch.bfloat16) for name, part in parts.items()})
    x, t = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0, 600.0])
    told = {"sample": x, "timestep": t, "label": torch.tensor([3, 4])}
    alike = torch.nn.functional.cosine_similarity(half.classify(**told).flatten(1), shipped.classify(**told).flatten(1))
    assert bool((alike > 0.9).all()), alike
