"""Samplers as tables: what a request draws with them is what diffusers' own schedulers would have drawn."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from models import samplers
from models.program import generator

LINEAR = sorted(set(samplers.SCHEDULERS) - samplers.NOT_LINEAR)
CONFIGS = {
    "epsilon": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
    "v_prediction": DPMSolverMultistepScheduler(  # as the shipped model has it
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        beta_schedule="squaredcos_cap_v2",
    ),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}
CASES = [(name, kind) for kind in ("epsilon", "v_prediction") for name in LINEAR if name != "flow_match"]
CASES.append(("flow_match", "flow"))

# Of the largest value, for a float32 table and a float64 scheduler. In float32 the schedulers themselves are worse, for
# a zero terminal SNR means a first sigma of 4096: Euler's sample begins that large, so do DEIS's terms; they cancel.
TOLERANCE = 1e-6
OF_LCM = 3e-6  # whose roundings add up over its steps, 1e-7 each, one way on some processors


@pytest.mark.parametrize(("steps", "begin"), [(1, 0), (2, 0), (7, 0), (20, 0), (7, 3), (20, 19)])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_table_steps_as_the_scheduler_it_was_read_off(
    name: str, kind: str, steps: int, begin: int, monkeypatch: pytest.MonkeyPatch
):
    stock = samplers.scheduler(name, config(kind))
    noise_in_float32(stock, generator(1), monkeypatch)
    table = samplers.sampler(name, config(kind), steps, begin)
    assert isinstance(table, samplers.Table)
    for ours, theirs in zip(tabled(table), stepped(stock, steps, begin, torch.float64), strict=True):
        tolerance = OF_LCM if name == "lcm" else TOLERANCE
        assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


@pytest.mark.parametrize("name", sorted(samplers.NOT_LINEAR))
def test_samplers_with_a_longer_memory_are_refused_as_tables_and_step_their_own_scheduler(name: str):
    stock = samplers.scheduler(name, config("v_prediction"))
    with pytest.raises(ValueError, match="remembers more than two steps"):
        samplers.Table(stock, steps=12)
    ours = samplers.sampler(name, config("v_prediction"), 12)
    assert isinstance(ours, samplers.Stepping)
    expected = stepped(samplers.scheduler(name, config("v_prediction")), 12)
    for mine, theirs in zip(tabled(ours), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_a_clipping_scheduler_is_refused_although_ones_and_zeros_are_never_clipped():
    with pytest.raises(ValueError, match="clipping"):
        samplers.Table(DDIMScheduler(clip_sample=True), steps=4)
    with pytest.raises(ValueError, match="clipping"):
        samplers.Table(DDIMScheduler(clip_sample=False, thresholding=True), steps=4)


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde", "euler_a"])
def test_a_seed_draws_the_noise_that_the_scheduler_would_draw(name: str):
    table = samplers.sampler(name, config("v_prediction"), 6)
    rng, same = generator(3), generator(3)
    like = torch.empty(1, 4, 8, 8)
    for i in range(6):
        assert torch.equal(table.noise(i, like, rng), torch.randn(like.shape, generator=same))


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "euler", "heun", "deis"])
def test_a_deterministic_sampler_leaves_the_generator_alone(name: str):
    table, rng = samplers.sampler(name, config("epsilon"), 4), generator(3)
    before = rng.get_state()
    assert table.noise(0, torch.empty(1, 4, 8, 8), rng) is None
    assert torch.equal(rng.get_state(), before)


def test_options_of_other_schedulers_in_a_configuration_are_none_of_a_tables_business():
    assert config("epsilon")["clip_sample"]  # DDIM's default, which Euler does not know
    assert isinstance(samplers.sampler("euler", config("epsilon"), 4), samplers.Table)


def test_drawing_a_table_up_leaves_the_generators_of_torch_alone():
    before = torch.get_rng_state()
    samplers.Table(samplers.scheduler("euler_a", config("epsilon")), 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("steps", [6, 13])
@pytest.mark.parametrize(("name", "kind"), [*CASES, *((name, "v_prediction") for name in sorted(samplers.NOT_LINEAR))])
def test_the_estimate_is_the_picture_that_the_net_believes_in(name: str, kind: str, steps: int):
    """A net that knows the picture and the noise: its estimate is the picture at every step."""
    sampler = samplers.sampler(name, config(kind), steps, begin=1)
    x0, noise = torch.randn(1, 4, 8, 8, generator=generator(1)), torch.randn(1, 4, 8, 8, generator=generator(2))
    x = sampler.add_noise(0, x0, noise)
    signal, spread = proportions(sampler.timesteps[0], name, kind)
    e = {"epsilon": noise, "v_prediction": signal * noise - spread * x0, "flow": noise - x0}[kind]
    torch.testing.assert_close(sampler.estimate(0, x, e), x0, atol=2e-3, rtol=0)  # Euler's timesteps are interpolated


def test_a_table_is_compiled_once_for_the_same_name_configuration_steps_and_beginning():
    samplers.table.cache_clear()
    first = samplers.sampler("dpmpp_2m", config("v_prediction"), 9)
    assert samplers.sampler("dpmpp_2m", dict(config("v_prediction")), 9) is first
    for other in (
        samplers.sampler("ddim", config("v_prediction"), 9),
        samplers.sampler("dpmpp_2m", config("epsilon"), 9),
        samplers.sampler("dpmpp_2m", config("v_prediction"), 8),
        samplers.sampler("dpmpp_2m", config("v_prediction"), 9, 1),
    ):
        assert other is not first
    assert samplers.table.cache_info().misses == 5


def test_a_configuration_with_a_list_in_it_can_be_remembered():
    trained = DDIMScheduler(trained_betas=[0.001 * (i + 1) for i in range(100)], num_train_timesteps=100)
    assert samplers.sampler("ddim", samplers.frozen_config(trained), 5) is samplers.sampler(
        "ddim", samplers.frozen_config(trained), 5
    )


@pytest.mark.parametrize("calls_and_steps", [(8, 8), (15, 8), (9, 8), (1, 1)], ids=["one", "heun", "pndm", "single"])
def test_progress_counts_steps_up_to_all_of_them(calls_and_steps: tuple[int, int]):
    calls, steps = calls_and_steps
    done = [samplers.steps_done(i, calls, steps)[0] for i in range(calls + 1)]
    assert done[0] == 0
    assert done[-1] == steps
    assert set(done) == set(range(steps + 1))
    assert done == sorted(done)
    if calls == 2 * steps - 1:
        assert done[:-1] == [i // 2 for i in range(calls)]


# -- what they are compared with


def config(kind: str) -> Any:
    return samplers.frozen_config(CONFIGS[kind])


def fake_model(dtype: torch.dtype = torch.float32) -> Callable[[Tensor, Tensor], Tensor]:
    """Anything but linear, and different at each timestep."""
    mix = (torch.randn(64, 64, generator=generator(0)) / 8).to(dtype)
    return lambda x, t: torch.tanh((x.to(dtype).reshape(1, 4, 64) @ mix).reshape(x.shape) + float(t) / 1000)


def beginning(sigma: float) -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=generator(5)) * sigma


def noise_in_float32(stock: Any, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float64 draw would be another one."""
    module = sys.modules[type(stock).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: torch.randn(shape, generator=rng))


def stepped(stock: Any, steps: int, begin: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The samples after each step of diffusers' own scheduler."""
    model = fake_model(dtype)
    timesteps = samplers.start(stock, steps, begin)
    x = beginning(float(getattr(stock, "init_noise_sigma", 1.0))).to(dtype)
    samples = list[Tensor]()
    for t in timesteps:
        seen = stock.scale_model_input(x, t) if hasattr(stock, "scale_model_input") else x
        x = stock.step(model(seen, t), t, x, return_dict=False)[0]
        samples.append(x)
    return samples


def tabled(sampler: samplers.Sampler) -> list[Tensor]:
    """The same, with the update that `StableDiffusion.denoise` applies."""
    model, rng = fake_model(), generator(1)
    x = beginning(sampler.init_noise_sigma)
    e1 = x1 = e2 = x2 = nothing = torch.zeros_like(x)
    samples = list[Tensor]()
    for i, t in enumerate(sampler.timesteps):
        noise = nothing if (drawn := sampler.noise(i, x, rng)) is None else drawn
        e = model(x * sampler.scales[i], t)
        updated = torch.einsum("k,krchw->rchw", sampler.coefficients[i], torch.stack([x, e, noise, e1, x1, e2, x2]))
        e2, x2, e1, x1 = e1, x1, e, x
        x = sampler.settle(i, x, e, updated, rng)
        samples.append(x)
    return samples


def proportions(t: Tensor, name: str, kind: str) -> tuple[float, float]:
    """Of picture and noise in the variance-preserving sample at timestep t."""
    if kind == "flow":
        return 1 - float(t) / 1000, float(t) / 1000
    alphas = samplers.scheduler(name, config(kind)).alphas_cumprod
    low = int(t)
    alpha_bar = float(torch.lerp(alphas[low], alphas[min(low + 1, len(alphas) - 1)], float(t) - low))
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5
