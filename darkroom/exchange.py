"""What is asked, how often, and what is made of the answer: everything but the sending, which is sync or async.

An exchange is a generator. It yields what is to be sent next, is resumed with the answer (or the error that came
instead), and returns its result.
"""

import random
import secrets
import time
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from app.schemas import Generation, GenerationList, Image, Model, ModelList
from darkroom import events
from darkroom.errors import NotDrawn, Refused, Unreachable
from darkroom.events import Event, Preview
from darkroom.fields import Fields, as_json

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

GENERATIONS = "/v1/generations"
PAGE = 100  # the most there is
AGAIN = frozenset({429, 502, 503, 504})  # not at this moment
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0  # seconds; each time twice as long
TIMEOUT = 30.0  # seconds of silence
SILENCE = 60.0  # of a stream, which says something every 15


class Ask(NamedTuple):
    request: httpx2.Request
    stream: bool = False
    after: float = 0.0  # seconds to wait before it is sent


Exchange = Generator[Ask, httpx2.Response, T]


def pause(tries: int) -> float:
    """Seconds until the next try, spread so that many clients do not come at once."""
    return random.uniform(0.5, 1) * min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(tries, 10))


def id_of(generation: Generation | str) -> str:
    return generation if isinstance(generation, str) else generation.id


class Exchanges:
    """Of one service. `patience`: for how many seconds a request is tried while nobody can answer it."""

    def __init__(self, http: httpx2.Client | httpx2.AsyncClient, patience: float):
        self.http, self.patience = http, patience

    def submit(self, prompt: str | None, fields: Fields, key: str | None) -> Exchange[Generation]:
        headers = {"Idempotency-Key": key or secrets.token_hex(16)}  # however often it is sent, it is drawn once
        return self._of(Generation, "POST", GENERATIONS, json=as_json(prompt, fields), headers=headers)

    def get(self, generation: Generation | str) -> Exchange[Generation]:
        return self._of(Generation, "GET", f"{GENERATIONS}/{id_of(generation)}")

    def cancel(self, generation: Generation | str) -> Exchange[Generation]:
        return self._of(Generation, "DELETE", f"{GENERATIONS}/{id_of(generation)}")

    def page(self, cursor: str | None, status: str | None, model: str | None) -> Exchange[GenerationList]:
        wanted = {"cursor": cursor, "status": status, "model": model, "limit": PAGE}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        return self._of(GenerationList, "GET", GENERATIONS, params=wanted)

    def models(self) -> Exchange[list[Model]]:
        return (yield from self._of(ModelList, "GET", "/v1/models")).data

    def image(self, image: Image | Preview) -> Exchange[bytes]:
        return (yield from self.asked("GET", image.url)).content

    def _of(self, kind: type[M], method: str, url: str, **given: Any) -> Exchange[M]:
        answer = yield from self.asked(method, url, **given)
        # A newer service may say more than this client knows.
        try:
            return kind.model_validate_json(expected(answer, "application/json").content, extra="ignore")
        except ValidationError as error:
            raise Unreachable(f"{answer.url} does not answer as Darkroom does: {error}") from None

    def asked(
        self, method: str, url: str, *, stream: bool = False, after: float = 0.0, **given: Any
    ) -> Exchange[httpx2.Response]:
        """The answer, once there is one; what is asked must be safe to ask again.

        Raises:
            Refused: whatever one does, or still when the patience is over.
            Unreachable: the patience is over.
        """
        began, tries = time.monotonic() + after, 0
        while True:
            try:
                answer = yield Ask(self.http.build_request(method, url, **given), stream, after)
                if answer.is_success:
                    return answer
                error = Refused.by(answer)
                if error.status not in AGAIN:
                    raise error
            except httpx2.UnsupportedProtocol as wrong:
                raise Unreachable(f"{self.http.base_url}: {wrong}") from None
            except (httpx2.TransportError, httpx2.DecodingError) as broken:
                error = Unreachable(f"{self.http.base_url} does not answer: {broken or type(broken).__name__}")
            told = error.retry_after if isinstance(error, Refused) else None
            after, tries = (told or 0.0) + pause(tries), tries + 1
            if time.monotonic() - began + after > self.patience:
                raise error


class Watch:
    """Where somebody is in a generation's events."""

    def __init__(self, exchanges: Exchanges, generation: Generation | str):
        self.exchanges, self.url = exchanges, f"{GENERATIONS}/{id_of(generation)}/events"
        self.last, self.in_vain, self.ended = "", 0, False

    def connect(self) -> Exchange[httpx2.Response]:
        """To go on where the stream broke; in a while, if nothing was heard of it the last time."""
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": self.last} if self.last else {})
        timeout = httpx2.Timeout(TIMEOUT, read=SILENCE)
        after, self.in_vain = pause(self.in_vain) if self.in_vain else 0.0, self.in_vain + 1
        given: dict[str, Any] = {"headers": headers, "timeout": timeout}
        return (yield from self.exchanges.asked("GET", self.url, stream=True, after=after, **given))

    def heard(self, sent: httpx2.ServerSentEvent) -> Event:
        event = events.read(sent)
        self.last, self.in_vain, self.ended = sent.id, 0, event.ends
        return event


def expected(answer: httpx2.Response, media_type: str) -> httpx2.Response:
    if not answer.headers.get("content-type", "").startswith(media_type):
        raise Unreachable(f"{answer.url} does not answer as Darkroom does")
    return answer


def ended(heard: Sequence[Event]) -> Generation:
    """What the last of a generation's events holds."""
    generation = heard[-1].generation
    assert generation is not None
    return generation


def drawn(generation: Generation) -> Generation:
    """It, if there are pictures.

    Raises:
        NotDrawn: there are none.
    """
    if generation.status != "succeeded":
        raise NotDrawn(generation)
    return generation
