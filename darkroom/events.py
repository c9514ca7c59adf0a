"""What is heard of a generation while it is drawn."""

from typing import Any, NamedTuple

import httpx2

from app.schemas import Generation

ENDED = frozenset({"succeeded", "failed", "canceled", "expired"})


class Preview(NamedTuple):
    """What a picture looks like on the way; `client.image` fetches it."""

    url: str
    number: int  # of the picture, where there are several


class Event(NamedTuple):
    """`queued`, `running`, `progress`, `preview`; the last one is how it ended."""

    name: str
    step: int | None = None
    steps: int | None = None
    stage: str | None = None
    preview: Preview | None = None
    generation: Generation | None = None  # of the last one

    @property
    def ends(self) -> bool:
        return self.generation is not None


def read(sent: httpx2.ServerSentEvent) -> Event:
    if sent.event in ENDED:
        return Event(sent.event, generation=Generation.model_validate_json(sent.data, extra="ignore"))
    said: Any = sent.json()
    preview = Preview(said["url"], said["index"]) if sent.event == "preview" else None
    return Event(sent.event, said.get("step"), said.get("steps"), said.get("stage"), preview)
