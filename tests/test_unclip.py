"""The shipped unCLIP model: captions become embeddings, embeddings become pictures, and pictures have neighbours."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from app.schemas import Parameters
from models.catalog import Catalog
from models.loading import load_parts, load_pipeline
from models.program import Inputs
from models.stable_diffusion import StableDiffusion
from models.unclip import UnCLIP, of_variance_one, slerp
from tests.test_journal import resumed_with_the_same_bytes
from tests.test_stable_diffusion import NOTHING, alone, as_image, progress, run_out, threads
from tests.test_stable_diffusion import asked as asked_of_sd
from workers.engine import Engine

CARD = Catalog.read(["emoji-unclip"])["emoji-unclip"]
CAPTIONS = [
    "a red apple on a blue background",
    "a penguin on a yellow background",
    "a rocket on a dark blue background",
    "a pizza on a green background",
    "a dog on a pink background",
    "a tree on a light blue background",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture(scope="module")
def shipped() -> UnCLIP:
    return UnCLIP(CARD, load_pipeline(CARD, "cpu"), load_parts(CARD, "cpu"))


@pytest.fixture(scope="module")
def sources() -> list[Image.Image]:
    """A picture for each caption, of another model."""
    card = Catalog.read(["emoji-sd"])["emoji-sd"]
    model = StableDiffusion(card, load_pipeline(card, "cpu"))
    return [
        as_image(one)
        for one in drawn(model, [(asked_of_sd(prompt=c, num_inference_steps=12), NOTHING) for c in CAPTIONS])
    ]


def asked(**given: Any) -> Parameters:
    return asked_of_sd(**{"model": CARD.name, "num_inference_steps": 10} | given)


def drawn(model: Any, requests: list[tuple[Parameters, Inputs]]) -> list[Tensor]:
    engine = Engine()
    tickets = [engine.submit(model.draw(r, r.seed, inputs)) for r, inputs in requests]
    run_out(engine, *tickets)
    return [ticket.result for ticket in tickets if ticket.result is not None]


def seen(model: UnCLIP, pictures: list[Any]) -> Tensor:
    """[pictures, width]: what CLIP sees in them, of length one."""
    pixels = [model.pixels(one) if isinstance(one, Image.Image) else one[None] * 2 - 1 for one in pictures]
    with torch.no_grad():
        return torch.nn.functional.normalize(model.encode_picture(pixels=torch.cat(pixels)), dim=-1)


def said(model: UnCLIP, captions: list[str]) -> Tensor:
    with torch.no_grad():
        return model.encode_caption(input_ids=model.tokens(captions))


def test_each_caption_finds_its_own_picture(shipped: UnCLIP):
    pictures = drawn(shipped, [(asked(prompt=caption), NOTHING) for caption in CAPTIONS])
    agreement = said(shipped, CAPTIONS) @ seen(shipped, pictures).T
    assert agreement.argmax(1).tolist() == list(range(len(CAPTIONS)))


def test_a_variation_is_nearer_its_source_than_other_pictures_are(shipped: UnCLIP, sources: list[Image.Image]):
    requests = [(asked(task="variation", prompt="", image="given", seed=7), Inputs(image)) for image in sources]
    nearness = seen(shipped, drawn(shipped, requests)) @ seen(shipped, sources).T
    own = nearness.diagonal()
    others = nearness - 2 * torch.eye(len(sources))
    assert bool((own > others.max(1).values + 0.05).all()), nearness


def test_variations_of_one_picture_differ(shipped: UnCLIP, sources: list[Image.Image]):
    ask = {"task": "variation", "prompt": "", "image": "given", "num_inference_steps": 4}
    one, other = drawn(shipped, [(asked(**ask, seed=seed), Inputs(sources[0])) for seed in (1, 2)])
    assert float((one - other).abs().mean()) > 0.01


@pytest.mark.parametrize("ends", ["pictures", "captions"])
def test_interpolation_moves_from_one_end_to_the_other(shipped: UnCLIP, sources: list[Image.Image], ends: str):
    mixes = [0.0, 0.3, 0.5, 0.7, 1.0]
    if ends == "pictures":
        given, inputs = {"prompt": "", "image": "given", "end_image": "given"}, Inputs(sources[0], None, sources[1])
    else:
        given, inputs = {"prompt": CAPTIONS[0], "end_prompt": CAPTIONS[1]}, NOTHING
    requests = [(asked(task="interpolate", mix=mix, seed=3, **given), inputs) for mix in mixes]
    steps = seen(shipped, drawn(shipped, requests))
    moved = steps @ (steps[-1] - steps[0])
    assert moved.tolist() == sorted(moved.tolist())
    assert moved[-1] - moved[0] > 0.2


def test_a_variation_moves_as_one_caption_differs_from_another(shipped: UnCLIP, sources: list[Image.Image]):
    here, there = CAPTIONS[0], "a red apple on a yellow background"
    mixes = [0.0, 0.35]
    ask = {"task": "variation", "prompt": here, "end_prompt": there, "image": "given", "seed": 5}
    kept, moved = drawn(shipped, [(asked(**ask, mix=mix), Inputs(sources[0])) for mix in mixes])

    def yellowness(picture: Tensor) -> float:
        border = torch.cat([picture[:, :6].flatten(1), picture[:, -6:].flatten(1)], 1).median(1).values
        return float(border[:2].mean() - border[2])

    assert yellowness(moved) > yellowness(kept) + 0.3


def test_progress_names_the_stage_and_counts_through_it(shipped: UnCLIP):
    told = progress(shipped, asked(num_inference_steps=3, width=64, height=64))
    prior = CARD.stages["prior"].num_inference_steps
    assert told == [(i, prior + 3) for i in range(prior + 4)]
    engine, stages = Engine(), list[str]()
    ticket = engine.submit(shipped.draw(asked(num_inference_steps=1, width=64, height=64), 0, NOTHING))
    while engine:
        stages.append(ticket.stage)
        engine.step()
    assert stages.count("prior") == prior


def test_a_prior_is_drawn_from_the_seed(shipped: UnCLIP):
    one, same, other = drawn(
        shipped, [(asked(seed=seed, num_inference_steps=2, width=64, height=64), NOTHING) for seed in (1, 1, 2)]
    )
    torch.testing.assert_close(one, same, atol=1e-5, rtol=0)
    assert not torch.allclose(one, other, atol=1e-2)


@pytest.mark.parametrize("task", ["text-to-image", "variation", "interpolate"])
def test_the_exact_lane_keeps_every_bit_in_company(shipped: UnCLIP, sources: list[Image.Image], task: str):
    own = {
        "text-to-image": {"prompt": CAPTIONS[0]},
        "variation": {"prompt": "", "image": "given"},
        "interpolate": {"prompt": CAPTIONS[0], "end_prompt": CAPTIONS[2]},
    }[task]
    r = asked(task=task, **own, seed=11, num_inference_steps=3, reproducible=True)
    inputs = Inputs(sources[0]) if r.image else NOTHING
    by_itself = alone(shipped, r, inputs, exact=True)
    engine = Engine()
    for seed in range(3):
        engine.submit(
            shipped.draw(asked(prompt=CAPTIONS[seed], seed=seed, num_inference_steps=2 + seed), seed, NOTHING)
        )
        engine.step()
    ticket = engine.submit(shipped.draw(r, r.seed, inputs), seat=r.seed)
    run_out(engine, ticket)
    assert torch.equal(ticket.result, by_itself)


def test_it_goes_on_with_the_same_bytes_after_a_kill(shipped: UnCLIP):
    resumed_with_the_same_bytes(shipped, asked(num_inference_steps=4, width=64, height=64, reproducible=True))


def test_a_slerp_keeps_the_length_and_ends_where_it_should():
    a, b = of_variance_one(torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0)))
    assert all(float(slerp(a, b, t).norm()) == pytest.approx(8.0, rel=1e-4) for t in (0.0, 0.25, 0.5, 1.0))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a, 0.5), a)
