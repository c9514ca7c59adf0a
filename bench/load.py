"""The load generator, in a process of its own: a plan comes in by stdin, what happened goes out by stdout, both JSON.

Open loop: requests are sent when they are due, whatever has become of the others, and a latency begins when its request
was due. A client that waits for answers before it asks again would hide just the waits that matter.
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

import httpx2

PREVIEWED = 8  # every how manieth of an open loop is asked for previews, where there are some, and followed
PREVIEWS = 4  # of each of these
BIAS = 0.05  # seconds by which plans begin later than they are read: nothing is due before all is ready


@dataclass
class Plan:
    url: str
    protocol: str  # "darkroom" or "peer"
    requests: list[dict[str, Any]]
    due: list[float] | None = None  # seconds from the beginning; none: closed loop
    in_flight: int = 1  # of a closed loop


@dataclass
class Sent:
    """Seconds from the beginning."""

    due: float
    ended: float = 0.0
    first: float | None = None  # when something could be seen of it
    status: int = 0  # 0: no answer at all
    steps: int = 0


Ask = Callable[[httpx2.AsyncClient, dict[str, Any], bool], Awaitable[tuple[int, float | None]]]


async def ask_peer(http: httpx2.AsyncClient, body: dict[str, Any], previewed: bool) -> tuple[int, float | None]:
    answer = await http.post("/predict", json=body)
    return answer.status_code, None


async def ask_darkroom(http: httpx2.AsyncClient, body: dict[str, Any], previewed: bool) -> tuple[int, float | None]:
    if previewed:
        return await follow_darkroom(http, body)
    answer = await http.post("/v1/generations", json=body, headers={"Prefer": "wait=600"})
    if answer.status_code != 200:
        return answer.status_code, None
    return (await http.get(answer.json()["images"][0]["url"])).status_code, None


async def follow_darkroom(http: httpx2.AsyncClient, body: dict[str, Any]) -> tuple[int, float | None]:
    every = max(1, body["num_inference_steps"] // PREVIEWS)
    answer = await http.post("/v1/generations", json=body | {"preview_every": every})
    if answer.status_code != 202:
        return answer.status_code, None
    generation, first, event = answer.json(), None, ""
    async with http.stream("GET", f"/v1/generations/{generation['id']}/events") as events:
        async for line in events.aiter_lines():
            if line.startswith("event:"):
                event = line.removeprefix("event:").strip()
            elif line.startswith("data:") and event == "preview" and first is None:
                url = json.loads(line.removeprefix("data:"))["url"]
                if (await http.get(url)).status_code == 200:
                    first = time.perf_counter()
            elif line.startswith("data:") and event in ("succeeded", "failed", "canceled", "expired"):
                generation = json.loads(line.removeprefix("data:"))
    if event != "succeeded":
        return 500, first
    generation = (await http.get(f"/v1/generations/{generation['id']}")).json()
    return (await http.get(generation["images"][0]["url"])).status_code, first


ASK: dict[str, Ask] = {"darkroom": ask_darkroom, "peer": ask_peer}


async def run(plan: Plan) -> list[Sent]:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=plan.url, timeout=900, limits=limits) as http:
        began = time.perf_counter() + BIAS

        async def one(number: int, due: float | None) -> Sent:
            if due is not None:
                await asyncio.sleep(began + due - time.perf_counter())
            body = plan.requests[number]
            sent = Sent(time.perf_counter() - began if due is None else due, steps=body["num_inference_steps"])
            try:
                previewed = due is not None and number % PREVIEWED == PREVIEWED - 1
                sent.status, first = await ASK[plan.protocol](http, body, previewed)
                sent.first = None if first is None else first - began
            except httpx2.HTTPError as error:
                print(f"no answer: {error!r}", file=sys.stderr)
            sent.ended = time.perf_counter() - began
            return sent

        if plan.due is not None:
            return list(await asyncio.gather(*(one(i, due) for i, due in enumerate(plan.due))))
        numbers, done = iter(range(len(plan.requests))), list[Sent]()

        async def client() -> None:
            for number in numbers:
                done.append(await one(number, None))

        await asyncio.gather(*(client() for _ in range(plan.in_flight)))
        return done


if __name__ == "__main__":
    json.dump([asdict(sent) for sent in asyncio.run(run(Plan(**json.load(sys.stdin))))], sys.stdout)
