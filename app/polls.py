"""Polls and submissions, in the event loop.

Polls that come while Redis is asked are asked together, in one round trip.
"""

import asyncio
import time
from contextlib import suppress
from typing import Any

import redis.asyncio
from fastapi.concurrency import run_in_threadpool
from redis.exceptions import TimeoutError

from app.connection import PAUSE
from app.errors import InvalidRequest, NotCancelable
from app.jobs import Jobs, Record, is_id, overdue, peeked
from app.schemas import Generation, GenerationRequest
from app.scripts import PEEK, SUBMIT
from app.webhooks import Shape

MOST = 100  # that Redis is asked for at once; it does nothing else meanwhile
CONNECTIONS = 16  # for submissions


class Polls:
    """Of one event loop: nothing here is for threads."""

    def __init__(self, connection: "redis.asyncio.Redis", jobs: Jobs):
        self.connection, self.jobs = connection, jobs
        self.waiting: list[tuple[str, asyncio.Future[Any]]] = []
        self.asking: asyncio.Task[None] | None = None
        self.submitting = asyncio.Semaphore(CONNECTIONS)
        self.silent_until = 0.0  # time.monotonic(): as in `app/connection.py`, nobody waits for a second silence

    async def submit(
        self, request: GenerationRequest, owner: str, idempotency_key: str | None, shape: Shape, base: str
    ) -> tuple[Generation, bool]:
        """As `Jobs.submit`, of a request without pictures."""
        try:
            submission = self.jobs.prepare(request, owner, idempotency_key, shape, base)
        except InvalidRequest:
            if idempotency_key is None:
                raise
            return await run_in_threadpool(self.jobs.submit, request, owner, idempotency_key, shape, base)
        async with self.submitting:
            self._refuse_if_silent()
            try:
                answer = await SUBMIT.awaited(self.connection, *submission.call(self.jobs.settings))
            except TimeoutError:
                self.silent_until = time.monotonic() + PAUSE
                raise
        if first := self.jobs.conclude(submission, answer):
            return await self.fetch(first, owner), True
        return submission.shown(answer), False

    async def fetch(self, id: str, owner: str) -> Generation:
        """As `Jobs.fetch`."""
        record = await self.record(id, owner)
        if overdue(record):
            with suppress(NotCancelable):  # it ended just now
                await run_in_threadpool(self.jobs.end, id, "expired")
            record = await self.record(id, owner)
        return self.jobs.show(id, record)

    async def record(self, id: str, owner: str) -> Record:
        """As `Jobs.record`."""
        return self.jobs.owned(id, peeked(await self._answer(id)) if is_id(id) else None, owner)

    async def _answer(self, id: str) -> Any:
        self._refuse_if_silent()
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((id, answer))
        if self.asking is None:
            self.asking = asyncio.create_task(self._ask())
        return await answer

    def _refuse_if_silent(self) -> None:
        if time.monotonic() < self.silent_until:
            raise TimeoutError("it was silent a moment ago")

    async def _ask(self) -> None:
        while self.waiting:
            asked, self.waiting = self.waiting[:MOST], self.waiting[MOST:]
            try:
                answers = await PEEK.awaited(self.connection, [], [id for id, _ in asked])
            except Exception as error:
                if isinstance(error, TimeoutError):
                    self.silent_until = time.monotonic() + PAUSE
                    asked, self.waiting = asked + self.waiting, []
                for _, future in asked:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), answer in zip(asked, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)
        self.asking = None
