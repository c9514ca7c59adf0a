"""Guidance, as functions of the model's outputs: what each does to a row, and that it does so to that row alone."""

import pytest
import torch
from torch import nn

from models import guidance, samplers

GUIDED = {"unconditional": torch.tensor([0, -1, 0]), "conditional": torch.tensor([1, 0, 0])}  # a pair, and one alone


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_rescaled_guidance_has_the_contrast_of_the_conditional_row():
    e = rows()
    guided = guidance.classifier_free(e, torch.tensor([9.0, 9.0, 1.0]), **GUIDED)
    whole = guidance.rescale(guided, e, GUIDED["conditional"], torch.ones(3))
    assert whole[0].std() == pytest.approx(float(e[1].std()), rel=1e-5)
    assert torch.equal(guidance.rescale(guided, e, GUIDED["conditional"], torch.zeros(3)), guided)
    torch.testing.assert_close(whole[2], e[2])  # not guided, nothing to take back


def test_every_third_guided_call_computes_guidance_and_the_others_use_it_again():
    assert guidance.reused(None, 3, 7) == {1, 2, 4, 5}
    assert guidance.reused([0.3, 1.0], 3, 10) == {4, 5, 7, 8}
    assert guidance.reused([0.3, 1.0], None, 10) == guidance.reused(None, 1, 10) == frozenset()


def test_an_interval_guides_the_steps_within_and_no_others():
    guided = [i for i in range(10) if guidance.in_interval([0.2, 0.5], i, 10)]
    assert guided == [2, 3, 4]
    assert all(guidance.in_interval(None, i, 10) for i in range(10))


@pytest.fixture(scope="module")
def seeing() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 6))


def test_one_backward_gives_each_row_the_gradient_it_has_alone(seeing: nn.Module):
    x, caption = rows(), torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    together = guidance.gradient(lambda x: guidance.clip(seeing(x), caption), x)
    for i in range(3):
        own = guidance.gradient(lambda x, i=i: guidance.clip(seeing(x), caption[i : i + 1]), x[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], own)


def test_along_its_gradient_a_classifier_becomes_surer(seeing: nn.Module):
    x, label, classes = rows(), torch.tensor([0, 1, 2]), torch.eye(6)

    def sure(x: torch.Tensor) -> torch.Tensor:
        return guidance.classifier(seeing(x), classes, label)

    assert bool((sure(x + 0.1 * guidance.gradient(sure, x)) > sure(x)).all())
    assert bool((sure(x) < 0).all())  # log of a probability


def test_a_gradient_is_to_be_had_where_nothing_else_is_recorded(seeing: nn.Module):
    with torch.no_grad():
        x = rows()
        uphill = guidance.gradient(lambda x: guidance.clip(seeing(x), torch.ones(3, 6)), x)
    assert not uphill.requires_grad
    assert float(uphill.abs().sum()) > 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_push_moves_the_estimate_alike_whatever_the_model_predicts(prediction_type: str):
    """By σ²/α of the gradient of log p, which for noise predictions is ε - σ ∇ log p."""
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type, "num_train_timesteps": 1000}
    stock = samplers.scheduler("ddim", config)
    for t in (torch.tensor(200), torch.tensor(600)):
        alpha, sigma = samplers.signal_and_noise(stock, t)
        push = samplers.push_coefficient(stock, t)
        assert push * samplers.estimate_coefficients(stock, t)[1] == pytest.approx(sigma**2 / alpha)
        if prediction_type == "epsilon":
            assert push == pytest.approx(-sigma)
