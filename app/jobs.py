"""The API's side of RQ: submit, fetch, list, cancel.

A generation is an RQ job of the same id. Its request is the job's arguments, what came of it is the job's `meta`, and
both live exactly as long as the job does. The function that RQ names is never imported: workers know what to do.
"""

import hashlib
import itertools
import json
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar, cast

import structlog
from obstore.exceptions import BaseError as BlobStoreError
from redis import Redis
from redis.client import Pipeline
from rq.executions import Execution, ExecutionRegistry
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.utils import utcformat

from app import events, metrics, webhooks
from app.errors import IdempotencyConflict, InvalidRequest, NotCancelable, NotFound, QueueFull
from app.images import png_bytes, read_image, read_mask
from app.outbound import Allowed, Forbidden, read_url
from app.schemas import (
    PICTURES,
    PRIORITIES,
    Failure,
    Generation,
    GenerationList,
    GenerationRequest,
    Image,
    Parameters,
    Priority,
    Progress,
    Status,
    merged,
)
from app.scripts import PEEK, SUBMIT
from app.settings import Settings
from app.storage import BlobStore, generation_folder, input_key
from models.catalog import Catalog, ModelCard

log = structlog.get_logger()

BELL = "darkroom:bell"  # rung when there is something to pick up or to drop, so that workers need not look
REUSED = "this Idempotency-Key came with another request before"
IDEMPOTENCY_TTL = timedelta(days=1)
LISTED_FOR = timedelta(days=7)  # the longest that a generation may wait, `expires_in`
COUNT = itertools.count()
NOBODY = Redis()  # RQ wants a connection where none is used
FIELDS = ("status", "data", "meta", "created_at", "started_at", "ended_at", "attempts")

STATUS: dict[JobStatus, Status] = {
    JobStatus.CREATED: "queued",
    JobStatus.QUEUED: "queued",
    JobStatus.STARTED: "running",
    JobStatus.FINISHED: "succeeded",
    JobStatus.FAILED: "failed",
    JobStatus.STOPPED: "failed",
    JobStatus.CANCELED: "canceled",
}


def new_id(at: float | None = None) -> str:
    """32 hex digits: 12 are the time in milliseconds, 4 count within one. So ids sort by age."""
    return f"{int((at or time.time()) * 1000):012x}{next(COUNT) & 0xFFFF:04x}{secrets.token_hex(8)}"


def age_of(id: str) -> float:
    """Seconds since the epoch at which an id was made."""
    return int(id[:12], 16) / 1000


def is_id(text: str) -> bool:
    return len(text) == 32 and not set(text) - set("0123456789abcdef")


def queue_name(model: str, priority: Priority) -> str:
    return f"{model}.{priority}"


def pace_key(model: str) -> str:
    """A hash: worker's name to its `Pace` for this model."""
    return f"darkroom:pace:{model}"


class Pace(NamedTuple):
    """How fast a worker draws, as it measured: what ETAs are made of."""

    until: float  # seconds since the epoch; a worker that says nothing more is not counted on
    rows_per_second: float  # through the denoiser, at its batch width
    rows_per_job: float  # rows × steps, of the jobs it saw lately


class Outlook(NamedTuple):
    """What is ahead of a queued generation."""

    position: int
    rows_per_second: float  # of all workers that are alive; 0 if there is none
    rows_per_job: float

    def seconds(self, own: float) -> float | None:
        """Until it is likely done, if it takes so many rows itself."""
        if not self.rows_per_second:
            return None
        return round((self.position * self.rows_per_job + own) / self.rows_per_second, 3)


T = TypeVar("T")
Replies = list[
    bytes | None
]  # to HMGET, of a connection that decodes nothing; redis-py's stub allows for all the others


def atomically(connection: "Redis", write: Callable[[Pipeline], T], *watched: str) -> T:
    """`write` reads, calls `multi()` and queues what it writes: all of that happens at once, or it runs again.

    It runs again if what is watched has changed, or the connection broke in between.
    """
    answer = connection.transaction(cast(Callable[[Pipeline], None], write), *watched, value_from_callable=True)
    return cast(T, answer)  # redis-py's stub knows neither


class Record(NamedTuple):
    """What Redis says of a generation."""

    status: Status
    parameters: Parameters
    owner: str
    meta: dict[str, Any]
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    attempts: int
    last: events.Event | None
    outlook: Outlook | None = None  # while it is queued

    @property
    def expires_at(self) -> datetime | None:
        seconds = self.parameters.expires_in
        return None if seconds is None else self.created_at + timedelta(seconds=seconds)


class Jobs:
    def __init__(self, connection: "Redis", blobs: BlobStore, catalog: Catalog, settings: Settings):
        self.connection, self.blobs, self.catalog, self.settings = connection, blobs, catalog, settings
        self.may_be_told = Allowed(settings.webhook_allow)
        self.decoding = threading.BoundedSemaphore(settings.max_decodes)

    # -- in

    def submit(
        self,
        request: GenerationRequest,
        owner: str,
        idempotency_key: str | None = None,
        shape: webhooks.Shape = "darkroom",
        base: str = "",
    ) -> tuple[Generation, bool]:
        """Queue a generation; returns it, and whether this is the replay of an earlier answer.

        Args:
            shape: in whose words its webhook is told, with URLs that begin with `base`.

        Raises:
            InvalidRequest: the model cannot do it, or a picture is none.
            IdempotencyConflict: the key came with another request before.
            QueueFull: nothing was accepted; `Retry-After` says when to come back.
        """
        brings = any(getattr(request, field) is not None for field in PICTURES)
        try:
            submission = self.prepare(request, owner, idempotency_key, shape, base)
        except InvalidRequest:
            if first := self._answered(request, owner, idempotency_key):
                return first, True
            raise
        if brings:
            if first := self._answered(request, owner, idempotency_key):
                return first, True
            pictures = self._pictures(request)
            submission = submission.with_pictures(pictures)
            if first := self.conclude(submission, SUBMIT(self.connection, *submission.call(self.settings, True))):
                return self.fetch(first, owner), True
            self._store(submission.id, pictures)
        answer = SUBMIT(self.connection, *submission.call(self.settings))
        if first := self.conclude(submission, answer):
            return self.fetch(first, owner), True
        return submission.shown(answer), False

    def prepare(
        self,
        request: GenerationRequest,
        owner: str,
        idempotency_key: str | None = None,
        shape: webhooks.Shape = "darkroom",
        base: str = "",
    ) -> "Submission":
        """All that is to be known before Redis is asked; of a request with pictures, without them."""
        card = self._card(request)
        token = Token.of(idempotency_key, owner, request) if idempotency_key else None
        if problems := [*card.problems(request), *self._problems_of_webhook(request)]:
            raise InvalidRequest(problems)
        hook = webhooks.Hook.of(request.webhook, shape, base) if request.webhook else None
        return Submission(new_id(), complete(request, card), owner, hook, token)

    def conclude(self, submission: "Submission", answer: Sequence[Any]) -> str | None:
        """What becomes of it. Returns the id of the generation that had this idempotency key first, if any."""
        word, *said = answer
        model = submission.parameters.model
        match word.decode():
            case "replayed":
                return said[0].decode()
            case "conflict":
                raise IdempotencyConflict(REUSED)
            case "full":
                metrics.REFUSED.labels(model).inc()
                ahead = Outlook(said[0], float(said[1]), float(said[2]))
                too_long = (ahead.seconds(0) or 0.0) - self.settings.max_queued_seconds.total_seconds()
                after = max(too_long, ahead._replace(position=1).seconds(0) or 10.0)
                raise QueueFull(f"{said[0]} generations are waiting for {model}; nothing was accepted", after)
            case "undelivered":
                raise QueueFull(f"{said[0]} webhooks wait to be delivered; nothing was accepted", 60)
            case "queued":
                kind = submission.parameters.kind
                log.info("queued", generation=submission.id, model=model, task=kind, owner=submission.owner)
            case _:  # it would be accepted
                pass
        return None

    def _answered(self, request: GenerationRequest, owner: str, idempotency_key: str | None) -> Generation | None:
        """What the first request with this key was answered."""
        token = Token.of(idempotency_key, owner, request) if idempotency_key else None
        first = token.answered(self.connection) if token else None
        return self.fetch(first, owner) if first else None

    def _card(self, request: GenerationRequest) -> ModelCard:
        if request.model is None:
            return self.catalog.default
        if request.model not in self.catalog:
            raise InvalidRequest(
                [("model", f"there is no {request.model!r}; there are {', '.join(self.catalog.names)}")]
            )
        return self.catalog[request.model]

    def _problems_of_webhook(self, request: GenerationRequest) -> Iterator[tuple[str, str]]:
        if request.webhook is not None:
            try:
                read_url(request.webhook.url, self.may_be_told)
            except Forbidden as error:
                yield "webhook.url", str(error)

    def _pictures(self, request: GenerationRequest) -> dict[str, bytes]:
        """The request's pictures, checked, upright, in eight bits, as PNG."""
        given = {field: data for field in PICTURES if (data := getattr(request, field)) is not None}
        limit, pictures = self.settings.max_image_pixels, dict[str, bytes]()
        with self.decoding:
            for field, data in given.items():
                if field != "mask":
                    image = read_image(field, data, limit)
                    pictures[field] = png_bytes(image)
                    if field == "image" and "mask" in given:
                        pictures["mask"] = png_bytes(read_mask("mask", given["mask"], image, limit))
        return pictures

    def _store(self, id: str, pictures: dict[str, bytes]) -> None:
        try:
            for field, png in pictures.items():
                self.blobs.save(input_key(id, field), png)
        except BlobStoreError:
            with suppress(BlobStoreError):  # away altogether; retention will find what is there
                self.blobs.delete(generation_folder(id))  # or the first of two keeps the room on a full disk
            raise

    def expire(self) -> None:
        """End what nobody wants any more and somebody is to be told of: who waits for a webhook does not look."""
        for id in cast(list[bytes], self.connection.zrangebyscore(webhooks.EXPIRING, "-inf", time.time() - 1, 0, 100)):
            record = next(read_records(self.connection, [id.decode()]))
            if record and overdue(record):
                with suppress(NotCancelable, NotFound):  # it ended just now
                    self.end(id.decode(), "expired")
            self.connection.zrem(webhooks.EXPIRING, id)

    # -- out

    def fetch(self, id: str, owner: str) -> Generation:
        """A generation as it stands, in one round trip.

        Raises:
            NotFound: there is none with this id, or it is somebody else's.
        """
        record = self.record(id, owner)
        if overdue(record):
            with suppress(NotCancelable):  # it ended just now
                self.end(id, "expired")
            record = self.record(id, owner)
        return self.show(id, record)

    def record(self, id: str, owner: str) -> Record:
        return self.owned(id, next(read_records(self.connection, [id])) if is_id(id) else None, owner)

    def owned(self, id: str, record: Record | None, owner: str) -> Record:
        if record is None or record.owner != owner:
            raise NotFound(f"there is no generation {id[:64]!r}; results are kept for {self.settings.result_ttl}")
        return record

    def show(self, id: str, record: Record) -> Generation:
        position, eta = None, remaining(record) if record.status == "running" else None
        if record.outlook:
            position, eta = record.outlook.position, record.outlook.seconds(row_steps(record.parameters))
        return Generation(
            id=id,
            status=record.status,
            model=record.parameters.model,
            created_at=record.created_at,
            position=position,
            eta=eta,
            progress=progress(record),
            images=[
                Image(url=f"/v1/generations/{id}/images/{i}", **{k: image[k] for k in Image.model_fields if k in image})
                for i, image in enumerate(record.meta.get("images", []))
            ],
            parameters=record.parameters,
            error=failure(record),
            attempts=record.attempts,
            resumed_at_step=resumed_at_step(record),
            timings=timings(record),
            warnings=record.meta.get("warnings", []),
        )

    def list(
        self,
        owner: str,
        *,
        cursor: str | None = None,
        limit: int = 20,
        status: str | None = None,
        model: str | None = None,
    ) -> GenerationList:
        """Newest first. Filters apply before the limit."""
        if cursor is not None and not is_id(cursor):
            raise InvalidRequest([("cursor", "not one of ours")])
        found: list[Generation] = []
        for id, record in self._newest(owner, cursor, 100 if status or model else limit + 1):
            if model is not None and record.parameters.model != model:
                continue
            shown = self.fetch(id, owner) if overdue(record) else None
            if status is not None and (shown.status if shown else record.status) != status:
                continue
            if len(found) == limit:
                return GenerationList(data=found, next_cursor=found[-1].id)
            found.append(shown or self.show(id, record))
        return GenerationList(data=found, next_cursor=None)

    def _newest(self, owner: str, before: str | None, at_once: int) -> Iterator[tuple[str, Record]]:
        """What there is of this owner, so many in two round trips; forgets on the way what has gone."""
        key, bound = index_key(owner), f"({before}" if before else "+"
        while ids := self.connection.zrevrangebylex(key, bound, "-", start=0, num=at_once):
            ids = [events.text(id) for id in ids]
            for id, record in zip(ids, read_records(self.connection, ids), strict=True):
                if record is None:
                    self.connection.zrem(key, id)
                else:
                    yield id, record
            bound = f"({ids[-1]}"

    # -- away

    def cancel(self, id: str, owner: str) -> Generation:
        """Cancel it, queued or running; its worker drops it before the next step.

        Raises:
            NotFound: as `fetch`.
            NotCancelable: it has ended otherwise.
        """
        self.record(id, owner)
        self.end(id, "canceled")
        return self.fetch(id, owner)

    def end(self, id: str, outcome: Literal["canceled", "expired"]) -> None:
        """Take a generation out of its queue or away from its worker, in one transaction with its new status.

        Raises:
            NotFound: its result has been forgotten.
            NotCancelable: it has ended otherwise.
        """
        key = Job.key_for(id)

        def write(pipe: Pipeline) -> str | None:
            status, origin, meta = cast(Replies, pipe.hmget(key, "status", "origin", "meta"))
            if status is None or origin is None:
                raise NotFound(f"there is no generation {id!r} any more")
            standing = standing_of(status, json.loads(meta or "{}"))
            if standing == outcome:
                return None
            if standing not in ("queued", "running"):
                raise NotCancelable(f"generation {id} has {standing} already")
            queue = Queue(events.text(origin), connection=self.connection, serializer=JSONSerializer)
            executions = cast(list[bytes], pipe.zrange(ExecutionRegistry(id, self.connection).key, 0, -1))
            pipe.multi()
            pipe.hset(key, "status", JobStatus.CANCELED.value)
            pipe.hset(key, "ended_at", now())
            pipe.hset(key, "meta", json.dumps({"outcome": outcome}))
            pipe.lrem(queue.key, 0, id)
            for execution in executions:
                lease = Execution(execution.decode(), id, self.connection)
                pipe.zrem(StartedJobRegistry(queue=queue).key, lease.composite_key)
                pipe.delete(lease.key)
            pipe.delete(ExecutionRegistry(id, self.connection).key)
            pipe.expire(key, self.settings.result_ttl)
            events.record(pipe, id, outcome, {"status": outcome}, self.settings.result_ttl)
            webhooks.tell(pipe, id, outcome)
            pipe.publish(BELL, f"drop {id}")
            return queue.name

        if queue := atomically(self.connection, write, key):
            metrics.REQUESTS.labels(queue.rpartition(".")[0], outcome).inc()
            log.info(outcome, generation=id)

    def waiting(self) -> dict[str, tuple[int, float]]:
        """For each queue: how many are waiting, and for how many seconds the oldest has been."""
        names = [queue_name(card.name, priority) for card in self.catalog for priority in PRIORITIES]
        with self.connection.pipeline(transaction=False) as pipe:
            for name in names:
                key = Queue(name, connection=self.connection).key
                pipe.llen(key)
                pipe.lindex(key, 0)
            answers = pipe.execute()
        heads = zip(names, answers[::2], answers[1::2], strict=True)
        return {name: (n, max(0.0, time.time() - age_of(head.decode())) if head else 0.0) for name, n, head in heads}


class Token(NamedTuple):
    """An idempotency key of one caller and what it was first used for."""

    key: str
    fingerprint: str

    @classmethod
    def of(cls, text: str, owner: str, request: GenerationRequest) -> "Token":
        if len(text) > 256:
            raise InvalidRequest([("Idempotency-Key", "longer than 256 characters")])
        digest = hashlib.sha256(text.encode()).hexdigest()
        body = json.dumps(request.model_dump(), sort_keys=True)
        return cls(f"darkroom:idempotency:{owner}:{digest}", hashlib.sha256(body.encode()).hexdigest())

    def answered(self, connection: "Redis | Pipeline") -> str | None:
        """The id that the first request with this key was given, if it still exists."""
        known = connection.get(self.key)
        if known is None:
            return None
        id, fingerprint = json.loads(known)
        if fingerprint != self.fingerprint:
            raise IdempotencyConflict(REUSED)
        return id if connection.exists(Job.key_for(id)) else None


class Submission(NamedTuple):
    """A generation that is about to be queued."""

    id: str
    parameters: Parameters
    owner: str
    hook: webhooks.Hook | None
    token: Token | None

    def with_pictures(self, pictures: dict[str, bytes]) -> "Submission":
        """Named by their hash."""
        named = {field: f"sha256:{hashlib.sha256(png).hexdigest()}" for field, png in pictures.items()}
        return self._replace(parameters=self.parameters.model_copy(update=named))

    def call(self, settings: Settings, only_ask: bool = False) -> tuple[list[str], list[Any]]:
        """The keys and arguments of `SUBMIT`."""
        parameters, ttl = self.parameters, int(settings.result_ttl.total_seconds())
        job = Job.create(
            "generations.draw",
            kwargs={"parameters": parameters.model_dump(exclude_defaults=True), "owner": self.owner},
            id=self.id,
            connection=NOBODY,
            serializer=JSONSerializer,
            description=parameters.model,
            origin=queue_name(parameters.model, parameters.priority),
            status=JobStatus.QUEUED,
            timeout=int(settings.job_timeout.total_seconds()),
            result_ttl=ttl,
            failure_ttl=ttl,
        )
        job.created_at = job.enqueued_at = datetime.fromtimestamp(age_of(self.id), UTC)
        job.retries_left = settings.max_attempts - 1
        job.enqueue_at_front_on_retry = True
        fields = [part for field in job.to_dict().items() if field[1] != "" for part in field]
        token = self.token
        return [job.key, token.key if token else ""], [
            self.id,
            parameters.model,
            parameters.priority,
            settings.max_queued,
            settings.max_queued_seconds.total_seconds(),
            index_key(self.owner),
            new_id(time.time() - LISTED_FOR.total_seconds())[:12],
            json.dumps([self.id, token.fingerprint]) if token else "",
            token.fingerprint if token else "",
            int(IDEMPOTENCY_TTL.total_seconds()),
            json.dumps(self.hook._asdict()) if self.hook else "",
            parameters.expires_in or "",
            webhooks.MOST_PENDING,
            int(only_ask),
            *fields,
        ]

    def shown(self, answer: Sequence[Any]) -> Generation:
        """As it was queued."""
        _, ahead, speed, rows = answer
        outlook = Outlook(ahead, float(speed), float(rows))
        return Generation(
            id=self.id,
            status="queued",
            model=self.parameters.model,
            created_at=datetime.fromtimestamp(age_of(self.id), UTC),
            position=ahead,
            eta=outlook.seconds(row_steps(self.parameters)),
            resumed_at_step=None,
            parameters=self.parameters,
            attempts=0,
            timings={},
        )


def index_key(owner: str) -> str:
    """A sorted set of an owner's ids, all of score 0: ids sort by age."""
    return f"darkroom:generations:{owner}"


def complete(request: GenerationRequest, card: ModelCard) -> Parameters:
    """The request with the card's defaults."""
    defaults, video, kind = card.defaults, card.video, card.kind(request)
    strength = {"image-to-image": defaults.strength, "inpaint": 1.0}.get(kind)

    def chosen(value: Any, default: Any) -> Any:
        return default if value is None else value

    return merged(
        request,
        model=card.name,
        task=kind,
        prompt=request.prompt or "",
        width=chosen(request.width, card.size.width),
        height=chosen(request.height, card.size.height),
        num_inference_steps=chosen(request.num_inference_steps, defaults.num_inference_steps),
        guidance_scale=float(chosen(request.guidance_scale, defaults.guidance_scale)),
        scheduler=chosen(request.scheduler, defaults.scheduler),
        seed=chosen(request.seed, secrets.randbelow(2**32)),
        strength=chosen(request.strength, strength),
        num_frames=chosen(request.num_frames, video and video.num_frames),
        fps=chosen(request.fps, video and video.fps),
        output_format=request.output_format or ("mp4" if video else "png"),
    )


def read_records(connection: "Redis", ids: Sequence[str]) -> Iterator[Record | None]:
    """The record of each, or None where there is none any more."""
    return map(peeked, PEEK(connection, [], ids))


def peeked(answer: Sequence[Any]) -> Record | None:
    """What `PEEK` says of one."""
    *fields, last, ahead, pace = answer
    record = parse_record(fields, events.flat(*last) if last else None)
    if record is None or pace is None:
        return record
    return record._replace(outlook=Outlook(ahead, float(pace[0]), float(pace[1])))


def parse_record(fields: Replies, last: events.Event | None = None) -> Record | None:
    """None if the job has gone (RQ may still write a field or two of it), or is of another kind."""
    status, data, meta, created_at, started_at, ended_at, attempts = fields
    if status is None or data is None or created_at is None or (asked := asked_in(data)) is None:
        return None
    kept = json.loads(meta) if meta else {}
    return Record(
        status=standing_of(status, kept),
        parameters=asked[0],
        owner=asked[1],
        meta=kept,
        created_at=read_time(created_at),
        started_at=read_time(started_at) if started_at else None,
        ended_at=read_time(ended_at) if ended_at else None,
        attempts=int(attempts or 0),
        last=last,
    )


def read_time(written: bytes) -> datetime:
    """As `rq.utils.utcparse`, which takes forty times as long, 10 µs."""
    return datetime.fromisoformat(written.decode())


@lru_cache(4096)  # a generation is asked for many times, and what it is to be never changes
def asked_in(data: bytes) -> tuple[Parameters, str] | None:
    """The parameters and the owner of a job; None if it is no generation."""
    _, _, _, kwargs = json.loads(zlib.decompress(data))
    return (Parameters.model_validate(kwargs["parameters"]), kwargs["owner"]) if "parameters" in kwargs else None


def standing_of(status: bytes, meta: dict[str, Any]) -> Status:
    """How a generation stands: RQ's status, or, of what has ended, the word that RQ does not have."""
    standing = STATUS[JobStatus(status.decode())]
    return meta.get("outcome", standing) if standing in ("failed", "canceled") else standing


def overdue(record: Record) -> bool:
    return (
        record.status in ("queued", "running")
        and record.expires_at is not None
        and datetime.now(UTC) > record.expires_at
    )


def progress(record: Record) -> Progress | None:
    if record.status == "running" and record.last and "step" in record.last.data:
        return Progress.model_validate(record.last.data)
    if record.status == "succeeded" and (steps := record.meta.get("steps")):
        return Progress(step=steps, steps=steps)
    return None


def resumed_at_step(record: Record) -> int | None:
    """Where its present attempt went on, by its own word while it runs; then its last one."""
    told = record.last.data if record.status == "running" and record.last else record.meta
    return told.get("resumed_at_step")


def remaining(record: Record) -> float | None:
    """Seconds a running generation still takes, if its next steps take as long as its last."""
    done = progress(record)
    if not done or not done.step or record.started_at is None or record.last is None:
        return None
    took = int(record.last.id.partition("-")[0]) / 1000 - record.started_at.timestamp()
    return round(max(0.0, took / done.step * (done.steps - done.step)), 3)


def failure(record: Record) -> Failure | None:
    if record.status != "failed":
        return None
    return Failure(**record.meta.get("error", {"type": "abandoned", "detail": "its workers died under it"}))


def timings(record: Record) -> dict[str, float]:
    """Seconds. An API's clock wrote when it was created, the server's when it was started: they may differ a little."""
    taken = dict(record.meta.get("timings", {}))
    if record.started_at and record.status != "queued":
        taken["queued"] = (record.started_at - record.created_at).total_seconds()
        if record.ended_at and record.ended_at > record.started_at:
            taken["running"] = (record.ended_at - record.started_at).total_seconds()
    return {name: round(max(0.0, seconds), 4) for name, seconds in taken.items()}


def row_steps(parameters: Parameters) -> float:
    """What a generation costs: rows through the denoiser."""
    return parameters.rows * parameters.num_inference_steps


def seconds_for(ahead: int, paces: list[bytes], own: float = 0.0) -> float | None:
    """Seconds until `ahead` average jobs and `own` rows are through, at the pace of all workers that are alive."""
    alive = [pace for pace in (Pace(*json.loads(text)) for text in paces) if pace.until > time.time()]
    speed = sum(pace.rows_per_second for pace in alive)
    if not speed:
        return None
    typical = sum(pace.rows_per_job for pace in alive) / len(alive)
    return round((ahead * typical + own) / speed, 3)


def now() -> str:
    return moment(time.time())


def moment(seconds: float) -> str:
    """A time since the epoch as RQ writes it."""
    return utcformat(datetime.fromtimestamp(seconds, UTC))
