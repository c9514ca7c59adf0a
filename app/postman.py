"""The process that delivers webhooks: takes what is due, makes the body, signs it, sends it, and tries again later."""

import json
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import structlog
from redis import Redis
from redis.exceptions import RedisError
from standardwebhooks import Webhook

from app.connection import connect
from app.fronts import desk, fal, replicate
from app.jobs import FIELDS, Jobs, Record, Replies, parse_record
from app.outbound import Forbidden, NoAnswer, send
from app.settings import Settings
from app.storage import open_store
from app.webhooks import Hook, Outbox, event_of, generation_of, key_of, secret_for
from models.catalog import Catalog

log = structlog.get_logger()

LOOK = 0.2  # seconds between two looks at what is due
PAUSES = (5, 30, 120, 600, 1800, 7200, 21600)  # seconds after each try in vain: eight tries in nine hours
JITTER = 0.25  # of a pause, so that receivers that were away are not told everything at once
TAKES = 15.0  # seconds that a receiver has
AT_ONCE = 32  # deliveries of this process
OF_A_HOST = 4  # of those, to one host: who is slow holds up himself
LATER = 600.0  # seconds until what this version cannot read is looked at again
LONGEST_TURN = 600.0  # seconds that one is put off because others for its host are before it
AGENT = f"darkroom/{version('darkroom')}"


class Parcel(NamedTuple):
    """A delivery that is ours for now."""

    id: str  # and its webhook-id
    hook: Hook
    at: int  # seconds since the epoch
    tries: int
    body: str | None  # as it was sent before; what is sent again is the same
    record: Record

    @property
    def host(self) -> str:
        url = urlsplit(self.hook.url)
        return f"{(url.hostname or '').rstrip('.')}:{url.port or url.scheme}"


class Postman:
    def __init__(self, connection: "Redis", jobs: Jobs):
        self.connection, self.jobs, self.settings = connection, jobs, jobs.settings
        self.outbox = Outbox(connection)
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.busy = Counter[str]()  # deliveries under way, by host
        self.pace: dict[str, float] = {}  # seconds of a delivery, of busy hosts
        self.turns: dict[str, float] = {}  # time.monotonic() at which the last that was put off comes up again

    def run(self) -> None:
        """Until told to stop; what is under way is finished."""
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="postman") as threads:
            while not self.stopping.wait(LOOK):
                try:
                    self.jobs.expire()
                    while self.send_some(threads):
                        pass
                except RedisError as error:  # what was taken is due again after a while
                    log.warning("redis_unavailable", error=str(error))
                    self.stopping.wait(1)

    def send_some(self, threads: ThreadPoolExecutor) -> bool:
        """What is due, as much as there is room for, here and at each host. Returns whether anything was sent."""
        with self.lock:
            most = AT_ONCE - self.busy.total()
        parcels, later = self.take(most) if most > 0 else [], dict[str, float]()
        for parcel in parcels:
            with self.lock:
                if free := self.busy[parcel.host] < OF_A_HOST:
                    self.busy[parcel.host] += 1
                else:
                    later[parcel.id] = self.turn(parcel.host)
            if free:
                threads.submit(self.deliver, parcel)
        for id, seconds in later.items():
            self.outbox.postpone(id, seconds)
        return len(later) < len(parcels)

    def turn(self, host: str) -> float:
        """Seconds until one more for a busy host comes up again: about when those before it have been sent.

        So that a long queue for one host is not looked through again and again while others wait behind it.
        """
        now, each = time.monotonic(), self.pace.get(host, TAKES) / OF_A_HOST
        self.turns[host] = min(now + LONGEST_TURN, max(now, self.turns.get(host, now)) + each)
        return self.turns[host] - now

    def take(self, most: int) -> list[Parcel]:
        ids = self.outbox.take(most)
        with self.connection.pipeline(transaction=False) as pipe:
            for id in ids:
                pipe.hmget(key_of(id), "webhook", "at", "tries", "body", *FIELDS)
            answers = cast(list[Replies], pipe.execute())
        parcels = list[Parcel]()
        for id, (webhook, at, tries, body, *fields) in zip(ids, answers, strict=True):
            if webhook is None:
                self.outbox.gone(id)  # for a week nobody delivered it
                continue
            try:
                hook, record = Hook(**json.loads(webhook)), parse_record(fields)
                assert record is not None  # it is a copy of a whole job
            except Exception as error:  # a newer version's, say: it must not keep the others from being sent
                log.error("unreadable", delivery=id, exc_info=error)
                self.outbox.failed(id, int(tries or 0), "it cannot be read", LATER)
                continue
            parcels.append(Parcel(id, hook, int(at or 0), int(tries or 0), body.decode() if body else None, record))
        return parcels

    def deliver(self, parcel: Parcel) -> None:
        began = time.monotonic()
        try:
            refused = self.refusal_of(parcel)
            if refused is None:
                self.outbox.delivered(parcel.id)
            else:
                self.come_again(parcel, *refused)
            log.info("told" if refused is None else "not_told", delivery=parcel.id, host=parcel.host, why=refused)
        except RedisError as error:
            log.warning("redis_unavailable", delivery=parcel.id, error=str(error))
        except Exception as error:
            log.error("unhandled_error", delivery=parcel.id, exc_info=error)
            with suppress(RedisError):
                self.come_again(parcel, f"an error of ours: {type(error).__name__}", False)
        finally:
            with self.lock:
                took, before = time.monotonic() - began, self.pace.get(parcel.host)
                self.pace[parcel.host] = took if before is None else (took + before) / 2
                self.busy[parcel.host] -= 1
                if not self.busy[parcel.host]:  # nothing is kept of hosts that are not busy
                    for kept in (self.busy, self.pace, self.turns):
                        kept.pop(parcel.host, None)

    def refusal_of(self, parcel: Parcel) -> tuple[str, bool] | None:
        """Why it was not taken, and whether it is never to be sent again."""
        body = parcel.body or self.written(parcel)
        try:
            answer = send(
                "POST",
                parcel.hook.url,
                headers=self.signed(parcel, body),
                content=body.encode(),
                allowed=self.jobs.may_be_told,
                seconds=TAKES,
            )
        except (Forbidden, NoAnswer) as error:
            return str(error), False
        if 200 <= answer.status < 300:
            return None
        if 300 <= answer.status < 400:
            return f"answered {answer.status}: redirects are not followed", False
        return f"answered {answer.status}", answer.status == 410

    def come_again(self, parcel: Parcel, reason: str, never: bool) -> None:
        last = never or parcel.tries >= len(PAUSES)
        pause = None if last else PAUSES[parcel.tries] * random.uniform(1 - JITTER, 1 + JITTER)
        self.outbox.failed(parcel.id, parcel.tries + 1, reason, pause)

    def written(self, parcel: Parcel) -> str:
        """The body, in the words that were asked for."""
        generation = self.jobs.show(generation_of(parcel.id), parcel.record)
        counter = desk.Counter(self.jobs, parcel.record.owner, parcel.hook.base)
        match parcel.hook.shape:
            case "darkroom":
                body: Any = {
                    "type": f"generation.{event_of(parcel.id)}",
                    "timestamp": datetime.fromtimestamp(parcel.at, UTC).isoformat().replace("+00:00", "Z"),
                    "data": generation.model_dump(mode="json"),
                }
            case "replicate":
                body = replicate.shown(counter, generation)
            case "fal":
                body = fal.told(counter, generation)
        text = json.dumps(body)
        self.connection.hset(key_of(parcel.id), "body", text)
        return text

    def signed(self, parcel: Parcel, body: str) -> dict[str, str]:
        """Standard Webhooks' headers. The time is that of the try: receivers refuse what is old."""
        now = datetime.now(UTC)
        secret = secret_for(self.connection, self.settings, parcel.record.owner)
        return {
            "Content-Type": "application/json",
            "User-Agent": AGENT,
            "webhook-id": parcel.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(secret).sign(parcel.id, now, body),
        }


def serve(settings: Settings, redis_url: str) -> None:
    """Deliver until told to stop."""
    connection = connect(redis_url, settings.redis_timeout)
    catalog = Catalog.read(settings.models, settings.cards_dir)
    postman = Postman(connection, Jobs(connection, open_store(settings.blobs), catalog, settings))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: postman.stopping.set())
    log.info("postman_starts")
    postman.run()
