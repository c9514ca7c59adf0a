"""What every front does: hand a generation in, wait for it, fetch its pictures. Translating is each front's own."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from app import events
from app.auth import Owner, signed
from app.errors import InvalidRequest, Leaving, TooManyListeners
from app.jobs import Jobs
from app.outbound import Forbidden, read_url
from app.routes.generations import polls, submitted, until_ended
from app.schemas import Generation, GenerationRequest, Status, Task, Webhook
from app.webhooks import Shape
from models.catalog import ModelCard

LARGEST = 100_000  # pixels of a side that a client may name: `nearest_size` makes something of it


class Counter:
    """What a generation is shown from: an answer, and a webhook, which nobody asks for."""

    def __init__(self, jobs: Jobs, owner: str, base: str):
        self.jobs, self.owner, self.base = jobs, owner, base.rstrip("/")
        self.settings = jobs.settings

    async def picture(self, generation: Generation, index: int) -> bytes:
        """A picture's file."""

        def read() -> bytes:
            record = self.jobs.record(generation.id, self.owner)
            return self.jobs.blobs.open(record.meta["images"][index]["key"])

        return await run_in_threadpool(read)

    def url(self, path: str) -> str:
        """Where anybody who is given it may fetch a file: clients of other services bring no key for that."""
        query = signed(path, self.owner, self.settings.api_keys)
        return self.absolute(path) + (f"?{query}" if query else "")

    def absolute(self, path: str) -> str:
        return self.base + path


class Desk(Counter):
    """One request of a front, and who made it."""

    def __init__(self, request: Request, owner: Owner):
        super().__init__(request.app.state.jobs, owner, str(request.base_url))
        self.request = request
        self.listeners: events.Listeners = request.app.state.listeners

    async def submit(
        self, asked: GenerationRequest, idempotency_key: str | None = None, shape: Shape = "darkroom"
    ) -> Generation:
        """Queue it; its webhook is told in such words. Raises as `Jobs.submit` does."""
        generation, _ = await submitted(self.request, asked, self.owner, idempotency_key, shape, self.base)
        return generation

    def webhook(self, field: str, url: str, events: Iterable[Status]) -> Webhook:
        """A webhook that came in a field of theirs.

        Raises:
            InvalidRequest: it cannot be told there.
        """
        try:
            read_url(url, self.jobs.may_be_told)
            return Webhook(url=url, events=[*events])
        except Forbidden as error:
            raise InvalidRequest([(field, str(error))]) from None
        except ValidationError as error:
            raise InvalidRequest([(field, error.errors()[0]["msg"])]) from None

    async def ended(self, generation: Generation, seconds: float | None = None) -> Generation:
        """As it stands when it has ended, or so many seconds later; as long as clients may wait if none are given."""
        longest = self.settings.max_wait.total_seconds()
        return await self._wait(generation, longest if seconds is None else min(seconds, longest))

    async def ended_at_last(self, generation: Generation) -> Generation:
        """As it stands when it has ended, however long that takes: for clients that neither poll nor ask again.

        Raises:
            Leaving: this process has to end first.
        """
        longest = self.settings.job_timeout + self.settings.max_queued_seconds
        ended = await self._wait(generation, longest.total_seconds())
        if ended.status not in events.ENDED:
            raise Leaving(f"this server is being restarted; generation {generation.id} goes on, and can be fetched")
        return ended

    async def _wait(self, generation: Generation, seconds: float) -> Generation:
        with self.listeners.place() as free:
            if not free:
                raise TooManyListeners("this server has as many streams open as it may; ask again")
            whole = max(1, round(seconds))
            return await until_ended(self.request, generation, self.owner, whole)

    async def fetch(self, id: str) -> Generation:
        return await polls(self.request).fetch(id, self.owner)

    def card_for(self, task: Task) -> ModelCard:
        """The first model that does such a task; the default if none does, which will then say so."""
        return next((card for card in self.jobs.catalog if task in card.tasks), self.jobs.catalog.default)


DeskDep = Annotated[Desk, Depends(Desk)]


def asked_for(fields: Mapping[str, Any], names: Mapping[str, str] | None = None) -> GenerationRequest:
    """A request of ours, from what a client of another service sent; numbers may be text.

    Args:
        names: what the client calls a field, where that is not our name.

    Raises:
        InvalidRequest: it names the fields as the client does.
    """
    names = names or {}
    try:
        given = {name: value for name, value in fields.items() if value is not None}
        return GenerationRequest.model_validate(given, strict=False)
    except ValidationError as error:
        raise InvalidRequest([(dotted(entry["loc"], names), entry["msg"]) for entry in error.errors()]) from None


def dotted(location: Iterable[int | str], names: Mapping[str, str]) -> str:
    first, *rest = location
    return ".".join(str(part) for part in (names.get(str(first), first), *rest))


def renamed(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """The same, with fields as the client calls them."""
    return InvalidRequest([(dotted(field.split("."), names), what) for field, what in error.errors])


def unsuccessful(generation: Generation) -> str:
    """Why a generation that has ended has no pictures."""
    if generation.error:
        return generation.error.detail
    return "it has expired" if generation.status == "expired" else f"it was {generation.status}"


def nearest_size(card: ModelCard, width: int, height: int) -> tuple[int, int]:
    """What the model draws that is most like it: itself, if it can; else the same shape at the model's own area."""
    size = card.size

    def possible(pixels: int) -> bool:
        return size.minimum <= pixels <= size.maximum and pixels % size.multiple_of == 0

    if possible(width) and possible(height):
        return width, height
    scale = (size.width * size.height / (width * height)) ** 0.5
    low, high = -(-size.minimum // size.multiple_of), size.maximum // size.multiple_of
    wide, tall = (
        max(low, min(high, round(pixels * scale / size.multiple_of))) * size.multiple_of for pixels in (width, height)
    )
    return wide, tall
