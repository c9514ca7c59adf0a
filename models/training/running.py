"""What every training run here does: batches for so many minutes, a schedule, averaged weights, and a saved state."""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from models.catalog import WEIGHTS
from models.prepare import computes_in_bfloat16

REPORT_EVERY = 20.0  # seconds
WARM_UP = 0.03  # of the run


def options(about: str | None, *more: argparse.ArgumentParser) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0], parents=more)
    parser.add_argument("work", type=Path, help="encoded scenes, and the state to go on from")
    parser.add_argument("out", type=Path, help="where the trained model goes")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--of", type=float, help="minutes in all, if this is not the only run: the schedule's length")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_default_device(given.device)
    return given


def alphas_of(scheduler: str) -> Tensor:
    """ᾱ of the noise schedule that the shipped models share, [1000]."""
    stock: Any = DDIMScheduler.from_pretrained(WEIGHTS / scheduler)
    return stock.alphas_cumprod.to(torch.get_default_device())


def in_half() -> Any:
    """Arithmetic in bfloat16, where this run's device computes in it: other processors take ten times as long."""
    return torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16, enabled=half() is torch.bfloat16)


def half() -> torch.dtype:
    on_cpu = torch.get_default_device().type == "cpu"
    return torch.float32 if on_cpu and not computes_in_bfloat16() else torch.bfloat16


class Run:
    """AdamW with a cosine schedule over wall-clock time, and an exponential moving average of the weights."""

    def __init__(self, name: str, model: Any, learning_rate: float, given: argparse.Namespace, decay: float = 0.995):
        self.model, self.learning_rate = model.to(given.device), learning_rate
        self.state_path = given.work / f"{name}.state.pt"
        self.minutes, self.planned = given.minutes, given.of or given.minutes
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
        self.average = EMAModel(self.parameters, decay=decay, use_ema_warmup=True)
        self.spent, self.steps, self.began, self.reported = 0.0, 0, time.monotonic(), 0.0
        self.shown: dict[str, float] = {}
        if self.state_path.exists():
            state = torch.load(self.state_path, weights_only=True, map_location=given.device)
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.data.copy_(value)
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.load_state_dict(state["average"])
            self.spent, self.steps = state["spent"], state["steps"]

    @property
    def elapsed(self) -> float:
        """Minutes of this run."""
        return (time.monotonic() - self.began) / 60

    def batches(self, count: int, size: int) -> Iterator[Tensor]:
        """Rows to train on, shuffled anew each time round, until this run's time is up."""
        while True:
            for rows in torch.randperm(count).split(size):
                if self.elapsed >= self.minutes:
                    return
                if len(rows) == size:
                    yield rows

    def step(self, loss: Tensor, **shown: Tensor) -> None:
        done = min(1.0, (self.spent + self.elapsed) / self.planned)
        warm = min(1.0, done / WARM_UP + 0.01)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.average.step(self.parameters)
        self.steps += 1
        for name, value in {"loss": loss.detach(), **shown}.items():
            before = self.shown.get(name, float(value))
            self.shown[name] = before + 0.05 * (float(value) - before)
        if time.monotonic() - self.reported > REPORT_EVERY:
            self.reported = time.monotonic()
            words = " · ".join(f"{name} {value:.4f}" for name, value in self.shown.items())
            print(f"{self.elapsed:5.1f} min · step {self.steps} · {words}", flush=True)

    def save(self, out: Path) -> None:
        """The state to go on from; the averaged weights, in half precision, as the model that ships."""
        state = {
            "parameters": [parameter.data for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "spent": self.spent + self.elapsed,
            "steps": self.steps,
        }
        torch.save(state, self.state_path)
        self.average.copy_to(self.parameters)
        self.model.eval().half().save_pretrained(out)
        print(f"{out}: {sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M parameters, {self.steps} steps")
