"""Samplers: any diffusers scheduler, and most of them as a table of coefficients.

Every unclipped sampler with a short memory is linear in the sample, the model's outputs and the noise, so running it
once on basis vectors reads its coefficients off exactly:

    x' = c[i] · (x, e, noise, e₁, x₁, e₂, x₂)        subscripts count steps back

The update is then a weighted sum inside the net call, and rows with different samplers and step counts share it.
Those that are not linear (`unipc`, `pndm`: a longer memory) step their own scheduler between two calls.
"""

import contextlib
import inspect
import sys
from collections.abc import Generator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Protocol

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

# A scheduler of diffusers and what it must be told beyond the model's own configuration. Latents are never clipped.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "thresholding": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "thresholding": False}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho"}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),  # of few steps: begin at the last
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "flow_match": ("FlowMatchEulerDiscreteScheduler", {}),
    # Heun averages two slopes, which from the infinite sigma of a zero-SNR schedule is nonsense: begin a step later.
    "heun": ("HeunDiscreteScheduler", {"clip_sample": False, "timestep_spacing": "leading"}),
    # Few steps, of models distilled for them: Luo et al. 2023, Zheng et al. 2024.
    "lcm": ("LCMScheduler", {"clip_sample": False, "thresholding": False}),
    "tcd": ("TCDScheduler", {"clip_sample": False, "thresholding": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
NOT_LINEAR = frozenset({"pndm", "unipc"})
SIGNAL = 0.2
MEMORY = ("e1", "x1", "e2", "x2")  # what a table remembers of earlier steps


class Sampler(Protocol):
    """What a program asks of its sampler; `i` counts from the step that it begins with."""

    timesteps: Tensor  # [N]
    scales: Tensor  # [N], of the sample on its way into the net
    coefficients: Tensor  # [N, 7], of the update inside the net call
    estimates: Tensor  # [N, 2]: x0 is the first times the sample plus the second times the model's output
    pushes: Tensor  # [N], what a gradient of log p is worth in the model's output, see `push_coefficient`
    init_noise_sigma: float

    def noise(
        self, i: int, like: Tensor, rng: torch.Generator
    ) -> Tensor | None: ...  # drawn just when the scheduler would
    def settle(
        self, i: int, x: Tensor, e: Tensor, updated: Tensor, rng: torch.Generator
    ) -> Tensor: ...  # the next sample
    def add_noise(self, i: int, x0: Tensor, noise: Tensor) -> Tensor: ...  # x0 as it looks at timestep i
    def estimate(self, i: int, x: Tensor, e: Tensor) -> Tensor: ...  # x0, judged from timestep i


def scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A fresh diffusers scheduler for a model whose own scheduler has this configuration."""
    kind, overrides = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(dict(config), **overrides)


def sampler(name: str, config: Mapping[str, Any], steps: int, begin: int = 0) -> Sampler:
    """The sampler of one picture: `steps` steps, of which the first `begin` are left out (image-to-image)."""
    if name in NOT_LINEAR:
        return Stepping(scheduler(name, config), steps, begin)
    return table(name, tuple(sorted((key, _frozen(value)) for key, value in config.items())), steps, begin)


@lru_cache(maxsize=512)
def table(name: str, config: tuple[tuple[str, Any], ...], steps: int, begin: int) -> "Table":
    """Compiling takes 2 to 5 ms, and most requests ask for the same few."""
    return Table(scheduler(name, dict(config)), steps, begin)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def start(stock: Any, steps: int, begin: int) -> Tensor:
    """Set the schedule, on the CPU so that no device waits for it, and return its timesteps from `begin` on."""
    stock.set_timesteps(steps, device="cpu")
    if hasattr(stock, "set_begin_index"):
        stock.set_begin_index(begin * stock.order)
    return stock.timesteps[begin * stock.order :]


class Table:
    """A linear sampler, read off from a scheduler.

    Raises:
        ValueError: the scheduler clips, remembers more than two steps, or is not linear.
    """

    def __init__(self, stock: Any, steps: int, begin: int = 0):
        its_own = inspect.signature(
            type(stock).__init__
        ).parameters  # a configuration also keeps what others understand
        if any(stock.config.get(option) for option in ("clip_sample", "thresholding") if option in its_own):
            raise ValueError("clipping is not linear, and a probe of ones and zeros would not notice it")
        self.timesteps = start(stock, steps, begin)
        self.init_noise_sigma = float(getattr(stock, "init_noise_sigma", 1.0))
        count = len(self.timesteps)
        self.scales = torch.ones(count)
        self.coefficients = torch.zeros(count, 3 + len(MEMORY))
        self._signals, self._noises, self._draws = [1.0] * count, [1.0] * count, [False] * count
        self._read_off(stock)
        self.estimates = estimates(stock, self.timesteps, self.scales)
        self.pushes = torch.tensor([push_coefficient(stock, t) for t in self.timesteps])

    def _read_off(self, stock: Any) -> None:
        count = len(self.timesteps)
        rng = {"generator": generator} if (generator := _own_noise(stock)) else {}
        for i, t in enumerate(self.timesteps):
            x, e, noise = (one_hot(3 * count, k * count + i) for k in range(3))
            self._signals[i] = float(noised(stock, torch.ones(1, 1), torch.zeros(1, 1), t))
            self._noises[i] = float(noised(stock, torch.zeros(1, 1), torch.ones(1, 1), t))
            if hasattr(stock, "scale_model_input"):
                self.scales[i] = stock.scale_model_input(x, t)[0, i]
            with probing(stock, noise) as drawn:
                updated = stock.step(e, t, x, return_dict=False, **rng)[0][0].float()
            self._draws[i] = bool(drawn)
            self.coefficients[i] = self._taken(updated, i, count)
            if updated.abs().max() > 1e-6:
                raise ValueError(f"{type(stock).__name__} remembers more than two steps, or is not linear, at step {i}")

    @staticmethod
    def _taken(updated: Tensor, i: int, count: int) -> Tensor:
        """The seven coefficients of step i, moved out of `updated` [3 · count] so that what is left is unexplained."""
        places = ((0, 0), (1, 0), (2, 0), (1, 1), (0, 1), (1, 2), (0, 2))  # (x | e | noise, steps back)
        taken = torch.zeros(len(places))
        for k, (kind, back) in enumerate(places):
            if i >= back:
                taken[k] = updated[kind * count + i - back]
                updated[kind * count + i - back] = 0
        return taken

    def noise(self, i: int, like: Tensor, rng: torch.Generator) -> Tensor | None:
        if not self._draws[i]:
            return None
        drawn = randn_tensor(like.shape, generator=rng, device=rng.device, dtype=like.dtype)
        return drawn.to(like.device, non_blocking=True)  # it must not wait for the pass under way

    def settle(self, i: int, x: Tensor, e: Tensor, updated: Tensor, rng: torch.Generator) -> Tensor:
        return updated

    def add_noise(self, i: int, x0: Tensor, noise: Tensor) -> Tensor:
        return self._signals[i] * x0 + self._noises[i] * noise

    def estimate(self, i: int, x: Tensor, e: Tensor) -> Tensor:
        of_x, of_e = self.estimates[i]
        return of_x * x + of_e * e


class Stepping:
    """A sampler that is no table: it steps its own scheduler with what the net returned."""

    def __init__(self, stock: Any, steps: int, begin: int = 0):
        self.stock = stock
        self.timesteps = start(stock, steps, begin)
        self.init_noise_sigma = float(stock.init_noise_sigma)
        count = len(self.timesteps)
        self.scales = torch.ones(count)  # neither of them scales
        self.coefficients = torch.zeros(count, 3 + len(MEMORY))
        self.estimates = estimates(stock, self.timesteps, self.scales)
        self.pushes = torch.tensor([push_coefficient(stock, t) for t in self.timesteps])

    def noise(self, i: int, like: Tensor, rng: torch.Generator) -> Tensor | None:
        return None

    def settle(self, i: int, x: Tensor, e: Tensor, updated: Tensor, rng: torch.Generator) -> Tensor:
        own = {"generator": rng} if "generator" in inspect.signature(self.stock.step).parameters else {}
        return self.stock.step(e, self.timesteps[i], x, return_dict=False, **own)[0]

    def add_noise(self, i: int, x0: Tensor, noise: Tensor) -> Tensor:
        return noised(self.stock, x0, noise, self.timesteps[i])

    def estimate(self, i: int, x: Tensor, e: Tensor) -> Tensor:
        of_x, of_e = self.estimates[i]
        return of_x * x + of_e * e


def steps_done(calls_done: int, calls: int, steps: int) -> tuple[int, int]:
    """Progress in steps, of samplers that call the model more often: Heun twice a step, PNDM once more at the start."""
    return calls_done * steps // calls, steps


def noised(stock: Any, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x0 as it looks at timestep t."""
    if hasattr(stock, "add_noise"):
        return stock.add_noise(x0, noise, t.reshape(1))
    return stock.scale_noise(x0, t.reshape(1), noise)  # flow matching


def estimates(stock: Any, timesteps: Tensor, scales: Tensor) -> Tensor:
    """For each timestep, how x0 follows from the sample and the model's output."""
    pairs = ((estimate_coefficients(stock, t), float(scale)) for t, scale in zip(timesteps, scales, strict=True))
    return torch.tensor([(of_x * scale, of_e) for (of_x, of_e), scale in pairs])


def signal_and_noise(stock: Any, t: Tensor) -> tuple[float, float]:
    """α and σ of the sample at a timestep: x_t = α x0 + σ noise."""
    if flows(stock):
        sigma = float(t) / stock.config.num_train_timesteps
        return 1 - sigma, sigma
    position = min(max(float(t), 0.0), len(stock.alphas_cumprod) - 1.0)  # Euler's timesteps lie between two
    low = int(position)
    high = min(low + 1, len(stock.alphas_cumprod) - 1)
    alpha_bar = float(torch.lerp(stock.alphas_cumprod[low], stock.alphas_cumprod[high], position - low))
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def flows(stock: Any) -> bool:
    return not hasattr(stock, "alphas_cumprod") or stock.config.prediction_type == "flow_prediction"


def estimate_coefficients(stock: Any, t: Tensor) -> tuple[float, float]:
    """How x0 follows from the variance-preserving sample and the model's output: Salimans & Ho 2022, appendix D."""
    alpha, sigma = signal_and_noise(stock, t)
    if flows(stock):  # e = noise - x0
        return 1.0, -sigma
    match stock.config.prediction_type:
        case "epsilon":
            return 1 / max(alpha, 1e-4), -sigma / max(alpha, 1e-4)
        case "v_prediction":
            return alpha, -sigma
        case "sample":
            return 0.0, 1.0
        case other:
            raise ValueError(f"no estimate for prediction_type {other!r}")


def push_coefficient(stock: Any, t: Tensor) -> float:
    """What the model's output changes by for a gradient of log p(y | x_t), of which x0 moves by σ²/α times as much.

    That is ε - σ ∇ log p of Dhariwal & Nichol 2021, algorithm 2, whatever the model predicts. Where the sample is all
    noise, α is taken to be no less than SIGNAL: nothing can be said of it, and it would be said infinitely loud.
    """
    alpha, sigma = signal_and_noise(stock, t)
    of_e = estimate_coefficients(stock, t)[1]
    return sigma**2 / max(alpha, SIGNAL) / of_e if of_e else 0.0


def one_hot(size: int, at: int) -> Tensor:
    """[1, size]; float64, as some coefficients are small differences of large numbers."""
    vector = torch.zeros(1, size, dtype=torch.float64)
    vector[0, at] = 1
    return vector


def _own_noise(stock: Any) -> torch.Generator | None:
    return torch.Generator() if "generator" in inspect.signature(stock.step).parameters else None


@contextlib.contextmanager
def probing(stock: Any, noise: Tensor) -> Generator[list[bool]]:
    """While it lasts, this scheduler's module draws `noise`; the list notes each draw."""
    module, drawn = vars(sys.modules[type(stock).__module__]), list[bool]()
    if "randn_tensor" not in module:
        yield drawn
        return

    def draw(shape: Any, **_: Any) -> Tensor:
        drawn.append(True)
        return noise.reshape(shape)

    own = module["randn_tensor"]
    module["randn_tensor"] = draw
    try:
        yield drawn
    finally:
        module["randn_tensor"] = own


def frozen_config(stock: Any) -> Mapping[str, Any]:
    """A model's scheduler configuration, as read-only as its weights."""
    return MappingProxyType({key: value for key, value in stock.config.items() if not key.startswith("_")})
