"""Which models are warm, and which must leave for another."""

import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import structlog

from app import metrics
from models.catalog import Catalog, ModelCard
from models.families import Resident
from models.loading import resident_bytes
from models.program import Net
from workers import memory
from workers.curve import Curve, warm_up
from workers.journal import model_identity
from workers.outcomes import ModelUnavailable
from workers.passes import Runner
from workers.threads import beside_the_engine

log = structlog.get_logger()

MIB = 2**20
TRY_AGAIN_AFTER = 60.0  # seconds until a model that could not be loaded is tried again


@dataclass(eq=False)
class Warm:
    """A model that is ready to draw."""

    resident: Resident
    curves: dict[Net, Curve]
    identity: bytes  # of its weights and of the code that draws with them
    used: float = field(default_factory=time.monotonic)

    @property
    def width(self) -> int:
        return self.resident.denoiser.width

    @cached_property
    def slowest_pass(self) -> float:
        """Seconds, of all that were measured."""
        return max(seconds for curve in self.curves.values() for seconds in curve.seconds.values())

    @property
    def rows_per_second(self) -> float:
        return self.curves[self.resident.denoiser].rows_per_second(self.width)


class Residency:
    """At most `budget_mib` of models; the least recently used one leaves, pinned ones stay.

    Weights are read by a thread of its own while others draw; the curve is measured by the caller, between two steps,
    when nothing else is running on the device.
    """

    def __init__(
        self,
        catalog: Catalog,
        load: Callable[[ModelCard], Resident],
        budget_mib: float,
        pinned: Collection[str] = (),
        max_rows: int = 0,
        runner: Runner | None = None,
    ):
        self.catalog, self.load, self.budget_mib, self.pinned, self.max_rows = (
            catalog,
            load,
            budget_mib,
            pinned,
            max_rows,
        )
        self.runner = runner
        self.warm: dict[str, Warm] = {}
        self.failed: dict[str, tuple[float, ModelUnavailable]] = {}
        self.loading: tuple[str, Future[Resident], float] | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="load", initializer=beside_the_engine)

    def get(self, model: str) -> Warm | None:
        """The model if it is warm; marks it as used."""
        if warm := self.warm.get(model):
            warm.used = time.monotonic()
        return warm

    def failure(self, model: str) -> ModelUnavailable | None:
        """Why the model cannot be had at present, if so."""
        when, error = self.failed.get(model, (0.0, None))
        return error if error and time.monotonic() - when < TRY_AGAIN_AFTER else None

    def want(self, model: str, busy: Collection[str]) -> bool:
        """Bring a model in, if room can be made: models in `busy` are in use. Returns whether it is under way."""
        if self.loading or model in self.warm:
            return True
        card = self.catalog[model]
        if card.memory_mib > self.budget_mib:
            needs = f"{model} needs {card.memory_mib} MiB, this worker may use {self.budget_mib:.0f}"
            self.failed[model] = time.monotonic(), ModelUnavailable(needs)
            return False
        if not self._make_room(card, busy):
            return False
        log.info("loading", model=model)
        self.loading = model, self.thread.submit(self.load, card), time.perf_counter()
        return True

    def _make_room(self, card: ModelCard, busy: Collection[str]) -> bool:
        idle = [name for name in self.warm if name not in busy and name not in self.pinned]
        leaving: list[str] = []
        free = self.budget_mib - sum(self.catalog[name].memory_mib for name in self.warm)
        for name in sorted(idle, key=lambda name: self.warm[name].used):
            if free >= card.memory_mib:
                break
            leaving.append(name)
            free += self.catalog[name].memory_mib
        if free < card.memory_mib:
            return False
        for name in leaving:
            log.info("unloading", model=name, for_model=card.name)
            del self.warm[name]
        if leaving:
            memory.give_back()
        self._show_memory()
        return True

    def arrived(self) -> str | None:
        """Take in a model whose weights have been read: measure it, and let it draw. Returns its name."""
        if self.loading is None or not self.loading[1].done():
            return None
        model, future, began = self.loading
        self.loading = None
        try:
            resident, measuring = future.result(), time.perf_counter()
            curves = warm_up(resident, self.max_rows or self.catalog[model].max_rows, self.runner)
        except Exception as error:  # whatever a checkpoint does wrong must not take the other models down
            log.error("model_unavailable", model=model, exc_info=error)
            self.failed[model] = time.monotonic(), ModelUnavailable(f"{model} cannot be loaded: {error}")
            return None
        self.warm[model] = warm = Warm(resident, curves, model_identity(resident.card, resident.modules))
        self._show_memory()
        took, measured = time.perf_counter() - began, time.perf_counter() - measuring
        metrics.MODEL_LOAD.labels(model).set(took)
        metrics.STEPS_SAVED.labels(model)  # an alert on an increase needs the zero before it
        for net in curves:
            metrics.OUT_OF_MEMORY.labels(net.name)
        metrics.BATCH_WIDTH.labels(model).set(warm.width)
        for net, curve in curves.items():
            for rows, seconds in curve.seconds.items():
                metrics.PASS.labels(model, net.name, rows).set(seconds)
        milliseconds = {rows: round(s * 1000, 1) for rows, s in curves[resident.denoiser].seconds.items()}
        seconds = {"seconds": round(took, 2), "measured": round(measured, 2)}
        log.info("warm", model=model, **seconds, width=warm.width, milliseconds_by_rows=milliseconds)
        return model

    def _show_memory(self) -> None:
        metrics.MEMORY.set(sum(resident_bytes(warm.resident.modules) for warm in self.warm.values()))

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)
