"""Webhooks, as Redis keeps them: what is to be told to whom is decided in the step that changes a generation's status.

A delivery is a copy of the job as it stood then, and its id waits in a sorted set by the time it is due. Whoever takes
it moves that time on: a postman that dies leaves what is due again after a while. So nothing is lost, and what was told
may be told again, under the same `webhook-id`.
"""

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple, cast

from redis import Redis
from redis.client import Pipeline
from rq.job import Job

from app.errors import NotFound
from app.schemas import Status, Webhook
from app.settings import Settings

DUE = "darkroom:webhooks:due"
DEAD = "darkroom:webhooks:dead"
COUNTS = "darkroom:webhooks:counts"
SECRET = "darkroom:webhooks:secret"
EXPIRING = "darkroom:webhooks:expiring"  # generations by the time at which their webhooks are to say so
MOST_PENDING = 50_000  # deliveries of some KB each; beyond it, generations with webhooks are not accepted
MOST_DEAD = 10_000  # dead letters; then the oldest go
KEPT = timedelta(days=7)  # of what nobody delivers, and of dead letters
LEASE = timedelta(minutes=2)  # until what a postman took is due again; more than a try takes

Shape = Literal["darkroom", "replicate", "fal"]

# For scripts that change a status, after they did. Each event is told once, however often a generation begins anew;
# once more if an operator has queued it again.
TELL = f"""
local function tell(job, id, event)
    local webhook = redis.call('HGET', job, 'webhook')
    if not webhook then return end
    local wanted = false
    for _, name in ipairs(cjson.decode(webhook).events) do wanted = wanted or name == event end
    if not wanted or redis.call('HSETNX', job, 'told:' .. event, 1) == 0 then return end
    local requeued = redis.call('HGET', job, 'requeued')
    local delivery = id .. '_' .. event .. (requeued and '_' .. requeued + 1 or '')
    local key, now = 'darkroom:webhook:' .. delivery, redis.call('TIME')[1]
    redis.call('COPY', job, key)
    redis.call('HSET', key, 'at', now)
    redis.call('EXPIRE', key, {KEPT.total_seconds():.0f})
    redis.call('ZREMRANGEBYSCORE', '{DUE}', '-inf', now - {KEPT.total_seconds():.0f})
    redis.call('ZADD', '{DUE}', now, delivery)
end
"""

# ARGV: how many, seconds until they are due again.
TAKE = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local ids = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])
for _, id in ipairs(ids) do redis.call('ZADD', KEYS[1], now + ARGV[2], id) end
return ids
"""

# ARGV: id, seconds. Not of what another has delivered meanwhile.
POSTPONE = """
local time = redis.call('TIME')
return redis.call('ZADD', KEYS[1], 'XX', time[1] + time[2] / 1e6 + ARGV[2], ARGV[1])
"""

# KEYS: dead, due, delivery. ARGV: id.
RESEND = f"""
if redis.call('ZREM', KEYS[1], ARGV[1]) == 0 or redis.call('EXISTS', KEYS[3]) == 0 then return 0 end
redis.call('HSET', KEYS[3], 'tries', 0)
redis.call('EXPIRE', KEYS[3], {KEPT.total_seconds():.0f})
redis.call('ZADD', KEYS[2], redis.call('TIME')[1], ARGV[1])
return 1
"""


class Hook(NamedTuple):
    """A webhook as the job has it: in whose words it is told, and where the URLs in them begin."""

    url: str
    events: list[Status]
    shape: Shape = "darkroom"
    base: str = ""

    @classmethod
    def of(cls, webhook: Webhook, shape: Shape = "darkroom", base: str = "") -> "Hook":
        return cls(webhook.url, list(webhook.events), shape, base)


def tell(pipe: Pipeline, generation: str, event: Status) -> None:
    """Have it delivered, if its job asks for that; the caller has changed the status in the same transaction."""
    pipe.eval(TELL + "tell(KEYS[1], ARGV[1], ARGV[2])", 1, Job.key_for(generation), generation, event)


def tell_again(pipe: Pipeline, generation: str) -> None:
    """Each event may be told once more: an operator has queued it again."""
    pipe.hincrby(Job.key_for(generation), "requeued", 1)
    pipe.hdel(Job.key_for(generation), *(f"told:{event}" for event in ("queued", "running", "failed")))


def key_of(delivery: str) -> str:
    return f"darkroom:webhook:{delivery}"


def generation_of(delivery: str) -> str:
    return delivery.partition("_")[0]


def event_of(delivery: str) -> str:
    return delivery.split("_")[1]


class Dead(NamedTuple):
    """A delivery that is not tried any more."""

    id: str
    url: str
    tries: int
    reason: str
    since: datetime


class Standing(NamedTuple):
    pending: int
    overdue: float  # seconds, of the one that waits longest for a postman
    dead: int
    delivered: int
    failed: int  # tries


class Outbox:
    """All that is to be delivered, and what could not be."""

    def __init__(self, connection: "Redis"):
        self.connection = connection
        self._take = connection.register_script(TAKE)
        self._postpone = connection.register_script(POSTPONE)
        self._resend = connection.register_script(RESEND)

    def take(self, most: int) -> list[str]:
        """What is due; ours for the length of a lease."""
        found = self._take([DUE], [most, int(LEASE.total_seconds())])
        return [id.decode() for id in cast(list[bytes], found)]

    def postpone(self, id: str, seconds: float) -> None:
        self._postpone([DUE], [id, seconds])

    def delivered(self, id: str) -> None:
        with self.connection.pipeline() as pipe:
            pipe.zrem(DUE, id)
            pipe.zrem(DEAD, id)
            pipe.delete(key_of(id))
            pipe.hincrby(COUNTS, "delivered", 1)
            pipe.execute()

    def gone(self, id: str) -> None:
        """Nobody delivered it in time, and there is nothing left to say."""
        self.connection.zrem(DUE, id)

    def failed(self, id: str, tries: int, reason: str, again_in: float | None) -> None:
        """A try was in vain; there is another, or it is a dead letter."""
        key, (seconds, microseconds) = key_of(id), self.connection.time()
        with self.connection.pipeline() as pipe:
            pipe.hset(key, mapping={"tries": tries, "reason": reason[:500]})
            pipe.expire(key, KEPT)
            pipe.hincrby(COUNTS, "failed", 1)
            if again_in is None:
                pipe.zrem(DUE, id)
                pipe.zadd(DEAD, {id: seconds})
                pipe.zremrangebyscore(DEAD, "-inf", seconds - KEPT.total_seconds())
                pipe.zrange(DEAD, 0, -MOST_DEAD - 1)
            else:
                pipe.zadd(DUE, {id: seconds + microseconds / 1e6 + again_in}, xx=True)
            *_, last = pipe.execute()
        for old in cast(list[bytes], last) if again_in is None else ():
            self.connection.zrem(DEAD, old)
            self.connection.delete(key_of(old.decode()))

    def dead(self) -> Iterator[Dead]:
        """Those that nobody took, the oldest first."""
        for id, since in cast(list[tuple[bytes, float]], self.connection.zrange(DEAD, 0, -1, withscores=True)):
            webhook, tries, reason = self.connection.hmget(key_of(id.decode()), "webhook", "tries", "reason")
            if webhook is not None:
                url = json.loads(webhook)["url"]
                said = cast(bytes, reason or b"").decode()
                yield Dead(id.decode(), url, int(tries or 0), said, datetime.fromtimestamp(since, UTC))

    def resend(self, id: str) -> None:
        """Deliver a dead letter after all, with as many tries as a new one.

        Raises:
            NotFound: there is none with this id.
        """
        if not self._resend([DEAD, DUE, key_of(id)], [id]):
            raise NotFound(f"there is no dead letter {id[:64]!r}")

    def standing(self) -> Standing:
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.zcard(DUE)
            pipe.zrange(DUE, 0, 0, withscores=True)
            pipe.zcard(DEAD)
            pipe.hmget(COUNTS, "delivered", "failed")
            pipe.time()
            pending, first, dead, (delivered, failed), (now, _) = pipe.execute()
        overdue = max(0.0, now - first[0][1]) if first else 0.0
        return Standing(pending, overdue, dead, int(delivered or 0), int(failed or 0))


def secret_for(connection: "Redis", settings: Settings, owner: str) -> str:
    """What this owner's webhooks are signed with: where there are API keys, nobody can sign for another."""
    secret = settings.webhook_secret or kept_secret(connection)
    if not settings.api_keys:
        return secret
    own = hmac.new(base64.b64decode(secret.removeprefix("whsec_")), owner.encode(), hashlib.sha256).digest()
    return f"whsec_{base64.b64encode(own).decode()}"


def kept_secret(connection: "Redis") -> str:
    """Made by whoever asks first."""
    made = f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"
    connection.set(SECRET, made, nx=True)
    return cast(bytes, connection.get(SECRET)).decode()
