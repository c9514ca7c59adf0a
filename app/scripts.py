"""What Redis does for us in one round trip: Lua, atomic, and known to the server by its hash after the first time."""

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import redis.asyncio
from redis import Redis
from redis.exceptions import NoScriptError

from app import events, webhooks
from app.schemas import PRIORITIES

SCRATCH = "darkroom:scratch"  # there only while a script runs

Argument = str | bytes | int | float


class Script:
    """Called with a connection that blocks, or with one that is awaited."""

    def __init__(self, text: str):
        self.text, self.sha = text, hashlib.sha1(text.encode()).hexdigest()

    def __call__(self, connection: "Redis", keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        try:
            return connection.evalsha(self.sha, len(keys), *keys, *arguments)
        except NoScriptError:  # it has begun anew
            return connection.eval(self.text, len(keys), *keys, *arguments)

    async def awaited(
        self, connection: "redis.asyncio.Redis", keys: Sequence[str], arguments: Sequence[Argument]
    ) -> Any:
        try:
            return await cast(Any, connection.evalsha(self.sha, len(keys), *keys, *arguments))
        except NoScriptError:
            return await cast(Any, connection.eval(self.text, len(keys), *keys, *arguments))


# What is ahead of a job, and how fast the workers that are alive get on: rows a second, and rows that a job takes.
# RQ's list is nearly in the order of ids, which begin with their time: halving finds where one must be, and it is there
# or a few places beside (submissions that overtook each other). Only what was queued a second time is searched for.
OUTLOOK = (
    f"local PRIORITIES = {{{', '.join(map(repr, PRIORITIES))}}}"
    + """
local function place(queue, id)
    local low, high = 0, redis.call('LLEN', queue)
    while low < high do
        local middle = math.floor((low + high) / 2)
        if redis.call('LINDEX', queue, middle) < id then low = middle + 1 else high = middle end
    end
    local from = math.max(0, low - 30)
    for i, other in ipairs(redis.call('LRANGE', queue, from, low + 30)) do
        if other == id then return from + i - 1 end
    end
    return redis.call('LPOS', queue, id)
end

local function ahead(model, priority, id)
    local found = place('rq:queue:' .. model .. '.' .. priority, id)
    if not found then return 0 end -- popped a moment ago
    for _, before in ipairs(PRIORITIES) do
        if before == priority then return found end
        found = found + redis.call('LLEN', 'rq:queue:' .. model .. '.' .. before)
    end
end

local function pace(model, now)
    local speed, rows, alive = 0, 0, 0
    for _, told in ipairs(redis.call('HVALS', 'darkroom:pace:' .. model)) do
        local pace = cjson.decode(told)
        if pace[1] > now then speed, rows, alive = speed + pace[2], rows + pace[3], alive + 1 end
    end
    return {string.format('%.17g', speed), string.format('%.17g', alive > 0 and rows / alive or 0)}
end
"""
)

# ARGV: ids. Of each: its job's fields (`jobs.FIELDS`), its last event, how many are ahead of it in the queues, the pace
# there. The last two only while it is queued, when its events say nothing that its status does not.
PEEK = Script(
    OUTLOOK
    + """
local now, paces, answers = tonumber(redis.call('TIME')[1]), {}, {}
for i, id in ipairs(ARGV) do
    local job = redis.call('HMGET', 'rq:job:' .. id, 'status', 'data', 'meta', 'created_at', 'started_at', 'ended_at',
        'attempts', 'origin')
    local model, priority = string.match(job[8] or '', '^(.*)%.(.*)$')
    job[8], job[9], job[10] = false, false, false
    if job[1] == 'queued' and model then
        job[9] = ahead(model, priority, id)
        paces[model] = paces[model] or pace(model, now)
        job[10] = paces[model]
    elseif job[1] then
        job[8] = redis.call('XREVRANGE', 'darkroom:events:' .. id, '+', '-', 'COUNT', 1)[1] or false
    end
    answers[i] = job
end
return answers
"""
)

# At once, and once however often it is asked; an error in its midst would not undo what it has written.
# KEYS: job, idempotency key or ''.
# ARGV: id, model, priority, most that may wait, most seconds of work, owner's index, oldest id that it lists, what the
# idempotency key is to say, its fingerprint, seconds to keep it, webhook or '', seconds until it expires or '', most
# webhooks that may be pending, whether only to ask, fields of the job.
SUBMIT = Script(
    OUTLOOK
    + webhooks.TELL
    + f"""
local id, model, priority = ARGV[1], ARGV[2], ARGV[3]
local queue, events, now = 'rq:queue:' .. model .. '.' .. priority, 'darkroom:events:' .. id, redis.call('TIME')
if redis.call('EXISTS', KEYS[1]) == 1 then -- all was written, and the connection broke before it was answered
    return {{'queued', ahead(model, priority, id), unpack(pace(model, tonumber(now[1])))}}
end
local known = KEYS[2] ~= '' and redis.call('GET', KEYS[2])
if known then
    local first = cjson.decode(known)
    if first[2] ~= ARGV[9] then return {{'conflict'}} end
    if redis.call('EXISTS', 'rq:job:' .. first[1]) == 1 then return {{'replayed', first[1]}} end
end
local waiting, before = 0, 0
for _, one in ipairs(PRIORITIES) do
    waiting = waiting + redis.call('LLEN', 'rq:queue:' .. model .. '.' .. one)
    if one == priority then before = waiting end
end
local speed, rows = unpack(pace(model, tonumber(now[1])))
local seconds = tonumber(speed) > 0 and waiting * tonumber(rows) / tonumber(speed) or 0
if waiting >= tonumber(ARGV[4]) or seconds > tonumber(ARGV[5]) then return {{'full', waiting, speed, rows}} end
if ARGV[11] ~= '' then -- what waits for a receiver takes memory for days: a 202 must not promise what has no room
    local pending = redis.call('ZCARD', '{webhooks.DUE}')
    if pending >= tonumber(ARGV[13]) then return {{'undelivered', pending}} end
end
if ARGV[14] == '1' then return {{'free'}} end
redis.call('HSET', KEYS[1], unpack(ARGV, 15))
redis.call('SADD', 'rq:queues', queue)
redis.call('RPUSH', queue, id)
redis.call('XADD', '{SCRATCH}', '*', 'event', 'queued', 'data', '{{}}') -- it begins with 4 kB; its copy as it needs
redis.call('COPY', '{SCRATCH}', events)
redis.call('DEL', '{SCRATCH}')
redis.call('EXPIRE', events, {events.FORGOTTEN_AFTER.total_seconds():.0f})
if ARGV[11] ~= '' then
    redis.call('HSET', KEYS[1], 'webhook', ARGV[11])
    tell(KEYS[1], id, 'queued')
    if ARGV[12] ~= '' then redis.call('ZADD', '{webhooks.EXPIRING}', now[1] + ARGV[12], id) end
end
redis.call('ZADD', ARGV[6], 0, id)
redis.call('ZREMRANGEBYLEX', ARGV[6], '-', '(' .. ARGV[7])
if KEYS[2] ~= '' then redis.call('SET', KEYS[2], ARGV[8], 'EX', ARGV[10]) end
redis.call('PUBLISH', 'darkroom:bell', 'queued')
return {{'queued', before, speed, rows}}
"""
)
