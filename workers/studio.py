"""Generations on their way through the engine: from their inputs to their stored pictures.

The worker's half that knows pictures. `EngineWorker`, the half that knows RQ, asks it for room, lets generations join
and leave, and takes outcomes.
"""

import hashlib
import io
import os
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any, TypeVar, cast

import structlog
from obstore.exceptions import BaseError as BlobStoreError
from PIL import Image

from app import metrics
from app.images import encode, parameters_text
from app.jobs import PRIORITIES, age_of
from app.schemas import PICTURES, ModelAtWork, Parameters
from app.storage import BlobStore, image_key, input_key, preview_key
from models.families import Resident
from models.program import Inputs
from workers import journal
from workers.engine import Engine, Pass, Ticket
from workers.journal import Journal, Outputs, Record
from workers.leases import Clock
from workers.outcomes import ModelUnavailable, NotFinite, NotStored
from workers.passes import Fetched, Runner
from workers.reporter import Reporter
from workers.residency import Residency, Warm
from workers.threads import beside_the_engine
from workers.videos import encode_video
from workers.watchdog import Watchdog

log = structlog.get_logger()

FILES = max(2, (os.cpu_count() or 2) // 2)  # threads that encode and store: a PNG of 512 × 512 takes one 40 ms
REMEMBERED = 0.05  # weight of the newest measurement in a running average


@dataclass(eq=False)
class Drawing:
    """One generation being drawn. `folder` is where its pictures go: another worker's attempt has another."""

    id: str
    folder: str
    parameters: Parameters
    warm: Warm
    inputs: Future[tuple[Inputs, list[Outputs]]]  # and what earlier attempts left of each picture
    records: list[Record]  # the journal of each picture
    tickets: list[Ticket] = field(default_factory=list)
    stored: dict[int, Future[dict[str, Any]]] = field(default_factory=dict)
    step: int = 0
    first_step: float | None = None  # when it began, in seconds since the epoch, as all times here
    drawn: float | None = None  # when its latest pass ended
    encoding: float = 0.0  # seconds, of all its pictures

    @cached_property
    def slowest_pass(self) -> float:
        """Seconds, as measured; more for a larger picture. Attention takes the square of its pixels, the rest less."""
        card, r = self.resident.card, self.parameters
        larger = r.width * r.height / (card.size.width * card.size.height)
        if card.video and r.num_frames:
            larger *= r.num_frames / card.video.num_frames
        return self.warm.slowest_pass * max(1.0, larger) ** 2

    @property
    def resumed_at_step(self) -> int | None:
        """Where its pictures went on, by the one that is furthest behind. None if all were begun anew."""
        return min((ticket.resumed_at for ticket in self.tickets), default=0) or None

    @property
    def stage(self) -> str:
        """Of the picture that is furthest behind."""
        waiting = [ticket for ticket in self.tickets if ticket.call and ticket.at]
        return min(waiting, key=lambda ticket: ticket.at or (0, 0)).stage if waiting else ""

    @property
    def resident(self) -> Resident:
        return self.warm.resident

    @property
    def rows(self) -> int:
        """Rows it still wants of every pass of the denoiser."""
        if not self.tickets:
            return self.parameters.rows
        denoising = sum(1 for t in self.tickets if t.call and t.call.net is not self.resident.decoder)
        return denoising * self.parameters.rows // self.parameters.n

    @property
    def error(self) -> Exception | None:
        return next((ticket.error for ticket in self.tickets if ticket.error), None)


class Studio:
    def __init__(
        self,
        residency: Residency,
        blobs: BlobStore,
        journal: Journal | None,
        reporter: Reporter,
        clock: Clock,
        preview_size: int,
        watchdog: Watchdog,
        overbooking: float = 1.0,
        runner: Runner | None = None,
    ):
        self.residency, self.blobs, self.journal = residency, blobs, journal
        self.reporter, self.clock, self.preview_size, self.watchdog = reporter, clock, preview_size, watchdog
        self.overbooking = overbooking
        self.engine = Engine(self._observe, self._note, runner=runner)
        self.drawings: dict[str, Drawing] = {}
        self.files = ThreadPoolExecutor(FILES, thread_name_prefix="files", initializer=beside_the_engine)
        self.touched: set[Drawing] = set()
        self.of_ticket: dict[Ticket, Drawing] = {}
        self.speeds: dict[str, float] = {}  # rows a second, per model
        self.costs: dict[str, float] = {}  # row steps a job, per model
        self.lately: dict[str, list[int]] = {}  # rows of the denoiser's passes since we were last asked, per model

    # -- what the worker asks

    def admits(self, model: str) -> bool:
        """Whether a generation of this model could join now; if its model is cold, bring that in."""
        self.residency.arrived()
        if warm := self.residency.get(model):
            return self._rows(model) < self.overbooking * self.engine.width(warm.resident.denoiser)
        if self.residency.failure(model):
            return True  # to be told so
        self.residency.want(model, busy={drawing.parameters.model for drawing in self.drawings.values()})
        return False

    def is_warm(self, model: str) -> bool:
        return model in self.residency.warm

    def ready(self, models: tuple[str, ...]) -> bool:
        """Whether the first model is warm, or known not to be had."""
        return self.is_warm(models[0]) or self.residency.failure(models[0]) is not None

    def join(self, id: str, attempt: int, folder: str, parameters: Parameters) -> None:
        """Take a generation in; go on with what earlier attempts left in its journal.

        Raises:
            ModelUnavailable: its model cannot be loaded here.
        """
        warm = self.residency.get(parameters.model)
        if warm is None:
            raise self.residency.failure(parameters.model) or ModelUnavailable(f"{parameters.model} is not loaded")
        keys = [journal.identity(warm.identity, parameters, i) for i in range(parameters.n)]
        records = [Record(id, i, attempt, key) for i, key in enumerate(keys)]
        needs_files = any(getattr(parameters, field) for field in PICTURES) or attempt > 1
        inputs = self.files.submit(self._read, id, parameters, records) if needs_files else done((Inputs(), []))
        self.drawings[id] = drawing = Drawing(id, folder, parameters, warm, inputs, records)
        cost = parameters.rows * parameters.num_inference_steps
        self.costs[parameters.model] = averaged(self.costs.get(parameters.model), cost)
        if not needs_files:
            self._begin(drawing)

    def leave(self, id: str, ended: bool) -> None:
        """It no longer takes part here; its rows are free for the next pass. Has it ended, so has its journal."""
        if drawing := self.drawings.pop(id, None):
            for ticket in drawing.tickets:
                self.of_ticket.pop(ticket, None)
                self.engine.cancel(ticket)
            if self.journal and ended:
                self.files.submit(self.journal.drop, drawing.records).add_done_callback(log_failure)
            elif self.journal:
                self.journal.stop(drawing.records)

    def keep(self) -> None:
        """Store all that another worker needs in order to go on from here."""
        if self.journal:
            self.journal.write()

    def step(self) -> Mapping[str, Any]:
        """One pass of the engine or, if it has nothing to run, a wait for files. Returns what ended, and how."""
        for drawing in self.drawings.values():
            if not drawing.tickets and drawing.inputs.done() and drawing.inputs.exception() is None:
                self._begin(drawing)
        if self.engine:
            for ticket in self.watchdog.die_if_it_hangs(self.engine.step, self._slowest_pass()):
                self._drawn(ticket)
            self._report()
        else:
            self._await_files()
        ended = {
            drawing.id: outcome for drawing in self.drawings.values() if (outcome := self._outcome(drawing)) is not None
        }
        if ended:
            self.reporter.catch_up()  # whoever listens hears of the last step before the end
        return ended

    def paces(self) -> dict[str, tuple[float, float]]:
        """For each warm model: rows a second through the denoiser, and what a job costs in rows."""
        return {
            model: (self.speeds.get(model, warm.rows_per_second), self.costs.get(model, typical_cost(warm)))
            for model, warm in self.residency.warm.items()
        }

    def at_work(self) -> list[ModelAtWork]:
        """Each warm model, since we were last asked."""
        lately, self.lately = self.lately, {}
        running = Counter(drawing.parameters.model for drawing in self.drawings.values())
        paces = self.paces()
        return [
            ModelAtWork(
                name=model,
                width=self.engine.width(warm.resident.denoiser),
                rows=round(fmean(lately.get(model, [0])), 2),
                running=running[model],
                rows_per_second=round(paces[model][0], 2),
            )
            for model, warm in self.residency.warm.items()
        ]

    def close(self) -> None:
        self.files.shutdown(wait=True)
        if self.journal:
            self.journal.close()
        self.residency.close()

    # -- a generation's way

    def _read(self, id: str, parameters: Parameters, records: list[Record]) -> tuple[Inputs, list[Outputs]]:
        def picture(field: str) -> Image.Image | None:
            if getattr(parameters, field) is None:
                return None
            image = Image.open(io.BytesIO(self.blobs.open(input_key(id, field))))
            if field == "ip_adapter_image":  # seen as a whole, by an encoder with a size of its own
                return image
            return image.resize((parameters.width, parameters.height), Image.Resampling.LANCZOS)

        past = [self.journal.read(record) for record in records] if self.journal and records[0].attempt > 1 else []
        return Inputs(*(picture(field) for field in PICTURES)), past

    def _begin(self, drawing: Drawing) -> None:
        r = drawing.parameters
        inputs, past = drawing.inputs.result()
        for i in range(r.n):
            seed = r.seed + i
            program = drawing.resident.draw(r, seed, inputs)
            ticket = self.engine.submit(
                program,
                seed if r.reproducible else None,
                past[i] if past else None,
                account=r.model,
                rank=PRIORITIES.index(r.priority),
            )
            drawing.tickets.append(ticket)
            self.of_ticket[ticket] = drawing
            if ticket.done:
                self._drawn(ticket)

    def _note(self, ticket: Ticket, outputs: Any) -> None:
        """What a call of the denoiser returned: worth keeping."""
        if self.journal and (drawing := self.of_ticket.get(ticket)):
            self.journal.note(drawing.records[drawing.tickets.index(ticket)], ticket.calls, outputs)

    def _drawn(self, ticket: Ticket) -> None:
        drawing = self.of_ticket[ticket]
        drawing.drawn = self.clock.time()  # or a little later: its last pass may be under way
        self.touched.add(drawing)
        index = drawing.tickets.index(ticket)
        if ticket.replayed:
            metrics.STEPS_SAVED.labels(drawing.parameters.model).inc(ticket.replayed)
            log.info("resumed", generation=drawing.id, step=ticket.resumed_at, passes_saved=ticket.replayed)
        if ticket.result is not None:
            drawing.stored[index] = self.files.submit(self._store, drawing, index, Fetched(ticket.result))

    def _store(self, drawing: Drawing, index: int, fetched: Fetched) -> dict[str, Any]:
        """Encode and save one picture; what is kept of it in Redis."""
        r, seed, picture = drawing.parameters, drawing.parameters.seed + index, fetched.tensor()
        if not picture.isfinite().all():
            raise NotFinite("the model returned pixels that are no numbers")
        pixels = (picture.movedim(-3, -1) * 255).round().byte().numpy()
        began, text = time.perf_counter(), parameters_text(r, seed)
        if pixels.ndim == 4:
            data = encode_video(pixels, r.output_format, r.fps or 1, text)
        else:
            data = encode(pixels, r.output_format, text)
        drawing.encoding += (encoding := time.perf_counter() - began)
        metrics.STAGE.labels("encode_file").observe(encoding)
        key = image_key(drawing.folder, index, r.output_format)
        with metrics.STAGE.labels("store_file").time():
            self.blobs.save(key, data)
        metrics.IMAGES.labels(r.output_format).inc()
        *frames, height, width, _ = pixels.shape
        etag = hashlib.sha256(data).hexdigest()
        shape = {"width": width, "height": height, **({"frames": frames[0]} if frames else {})}
        return {"key": key, "seed": seed, **shape, "format": r.output_format, "etag": etag}

    def _outcome(self, drawing: Drawing) -> Any:
        if not drawing.tickets:
            return not_stored(drawing.inputs.exception()) if drawing.inputs.done() else None
        if drawing.error:
            return drawing.error
        if not all(t.done for t in drawing.tickets) or not all(f.done() for f in drawing.stored.values()):
            return None
        if failed := next((e for f in drawing.stored.values() if (e := f.exception())), None):
            return not_stored(failed)
        return {
            "images": [drawing.stored[i].result() for i in range(drawing.parameters.n)],
            "steps": drawing.tickets[0].at[1] if drawing.tickets[0].at else None,
            "resumed_at_step": drawing.resumed_at_step,
            "timings": timings(drawing),
            "warnings": drawing.resident.warnings(drawing.parameters),
        }

    def _await_files(self) -> None:
        pending: list[Future[Any]] = [
            f for d in self.drawings.values() for f in (d.inputs, *d.stored.values()) if not f.done()
        ]
        wait(pending, timeout=1, return_when=FIRST_COMPLETED)

    # -- what others see of it

    def _report(self) -> None:
        for drawing in self.touched:
            step, steps = min((ticket.at for ticket in drawing.tickets if ticket.at), default=(0, 0))
            if step > drawing.step and drawing.id in self.drawings:
                drawing.step = step
                resumed = {"resumed_at_step": at} if (at := drawing.resumed_at_step) else {}
                stage = {"stage": name} if (name := drawing.stage) else {}
                self.reporter.report(drawing.id, "progress", {"step": step, "steps": steps, **stage, **resumed})
                every = drawing.parameters.preview_every
                if every and step % every == 0 and step < steps:
                    self._preview(drawing, step, steps)
        self.touched.clear()

    def _preview(self, drawing: Drawing, step: int, steps: int) -> None:
        for index, ticket in enumerate(drawing.tickets):
            if ticket.estimate and (estimate := ticket.estimate()) is not None:
                shown = self.files.submit(self._show, drawing, index, Fetched(estimate), step, steps)
                shown.add_done_callback(log_failure)

    def _show(self, drawing: Drawing, index: int, fetched: Fetched, step: int, steps: int) -> None:
        picture = Image.fromarray(drawing.resident.colours.paint(fetched.tensor()).numpy())
        r = drawing.parameters
        scale = min(1.0, self.preview_size / max(r.width, r.height))
        picture = picture.resize((round(r.width * scale), round(r.height * scale)), Image.Resampling.BICUBIC)
        self.blobs.save(preview_key(drawing.id, index, step), encode(picture, "webp", ""))
        url = f"/v1/generations/{drawing.id}/previews/{index}/{step}"
        self.reporter.report(drawing.id, "preview", {"step": step, "steps": steps, "index": index, "url": url})

    def _observe(self, done: Pass) -> None:
        """After each pass: whom it moved on, and how fast."""
        metrics.STAGE.labels(done.net.name).observe(done.seconds)
        drawings = {self.of_ticket[t] for t in done.tickets if t in self.of_ticket}
        self.touched |= drawings
        for drawing in drawings:
            drawing.drawn = self.clock.time()
        if not drawings:
            return
        resident = next(iter(drawings)).resident
        if done.net.name == resident.denoiser.name:  # one with an adapter on is another net
            for drawing in drawings:
                drawing.first_step = drawing.first_step or self.clock.time() - done.seconds
            model = resident.card.name
            metrics.BATCH_ROWS.labels(model).observe(done.rows)
            metrics.STEPS.labels(model).inc(done.calls)
            self.lately.setdefault(model, []).append(done.rows)
            metrics.BATCH_WIDTH.labels(model).set(width := self.engine.width(done.net))
            if self._rows(model) >= width:  # what the pace of a busy worker is made of
                self.speeds[model] = averaged(self.speeds.get(model), done.rows / done.seconds)

    def _slowest_pass(self) -> float:
        return max(drawing.slowest_pass for drawing in self.drawings.values())

    def _rows(self, model: str) -> int:
        return sum(drawing.rows for drawing in self.drawings.values() if drawing.parameters.model == model)


T = TypeVar("T")


def done(result: T) -> Future[T]:
    future = Future[T]()
    future.set_result(result)
    return future


def log_failure(future: Future[None]) -> None:
    """A preview that fails is missing, and the picture goes on; a journal that stays is swept with its generation."""
    if error := future.exception():
        log.warning("file_failed", exc_info=error)


def not_stored(error: BaseException | None) -> Exception | None:
    """A file that could not be read or written may be another time; what else goes wrong there is a bug."""
    if isinstance(error, BlobStoreError | OSError):
        return NotStored(f"{type(error).__name__}: {error}")
    return cast(Exception | None, error)


def timings(drawing: Drawing) -> dict[str, float]:
    """Seconds from submission, which the id tells, to the first step and the end of the last pass; and of encoding."""
    submitted, drawn = age_of(drawing.id), drawing.drawn or 0.0
    first_step = (drawing.first_step or drawn) - submitted
    return {"first_step": first_step, "drawn": drawn - submitted, "encoding": drawing.encoding}


def averaged(before: float | None, now: float) -> float:
    return now if before is None else before + REMEMBERED * (now - before)


def typical_cost(warm: Warm) -> float:
    """Row steps of a job with the card's defaults."""
    defaults = warm.resident.card.defaults
    return defaults.num_inference_steps * (2 if defaults.guidance_scale > 1 else 1)
