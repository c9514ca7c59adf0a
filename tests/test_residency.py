"""Which models stay in memory: with real tiny pipelines, loaded for real."""

import time
from collections.abc import Callable

import pytest

from models.catalog import Catalog, ModelCard
from models.families import StableDiffusion
from tests import tiny
from workers.residency import Residency

MIB_EACH = 100


def card(name: str) -> ModelCard:
    emoji = Catalog.read(["emoji-sd"]).default
    size = emoji.size.model_copy(update={"width": 32, "height": 32, "minimum": 16, "maximum": 64, "multiple_of": 8})
    return emoji.model_copy(update={"name": name, "memory_mib": MIB_EACH, "max_rows": 2, "size": size})


def tiny_model(card: ModelCard) -> StableDiffusion:
    return StableDiffusion(card, tiny.stable_diffusion())


@pytest.fixture
def residency() -> Callable[..., Residency]:
    def build(names: str = "abc", room_for: float = 2, pinned: str = "", load=tiny_model) -> Residency:
        return Residency(Catalog(card(name) for name in names), load, room_for * MIB_EACH, tuple(pinned))

    return build


def bring_in(residency: Residency, model: str, busy: str = "") -> bool:
    if not residency.want(model, busy=tuple(busy)):
        return False
    while residency.loading:
        residency.arrived()
        time.sleep(0.01)
    return model in residency.warm


def test_the_least_recently_used_model_leaves(residency):
    models = residency()
    assert bring_in(models, "a")
    assert bring_in(models, "b")
    models.get("a")
    assert bring_in(models, "c")
    assert set(models.warm) == {"a", "c"}


def test_a_pinned_model_stays(residency):
    models = residency(pinned="a")
    for name in "abc":
        assert bring_in(models, name)
    assert set(models.warm) == {"a", "c"}


def test_a_model_in_use_stays_and_the_other_waits(residency):
    models = residency(room_for=1)
    assert bring_in(models, "a")
    assert not bring_in(models, "b", busy="a")
    assert bring_in(models, "b")
    assert set(models.warm) == {"b"}


def test_a_model_larger_than_the_budget_is_refused_with_both_figures(residency):
    models = residency(room_for=0.5)
    assert not bring_in(models, "a")
    assert "100 MiB" in str(models.failure("a"))
    assert "50" in str(models.failure("a"))


def test_a_model_that_cannot_be_loaded_leaves_the_others_as_they_are(residency):
    def load(card: ModelCard) -> StableDiffusion:
        if card.name == "b":
            raise OSError("no such file")
        return tiny_model(card)

    models = residency(load=load)
    assert bring_in(models, "a")
    assert not bring_in(models, "b")
    assert "no such file" in str(models.failure("b"))
    assert set(models.warm) == {"a"}


def test_a_warm_model_has_a_measured_width_and_a_speed(residency):
    models = residency()
    bring_in(models, "a")
    warm = models.warm["a"]
    assert warm.width in warm.curves[warm.resident.denoiser].seconds
    assert warm.rows_per_second > 0
