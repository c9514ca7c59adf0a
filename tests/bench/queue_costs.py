"""What a generation costs the API and Redis before and after it is drawn, against RQ's and Redis' own calls.

Everything that is compared is measured in turns, several times over; medians are shown.
"""

import asyncio
import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from app.jobs import FIELDS
from app.local import LocalService

BODY = {"prompt": "a red apple on a blue background", "num_inference_steps": 20, "seed": 1}
SECONDS = 1.0
ROUNDS = 5
CLIENTS = 4
DEPTHS = (0, 1_000, 10_000, 100_000)
LISTENERS = 1_000

Cost = tuple[float, float]  # a second, CPU seconds each


def run(service: LocalService) -> None:
    connection = Redis.from_url(service.redis_url)
    http = httpx2.Client(base_url=service.url, timeout=30)
    rates(service, connection, http)
    depths(connection, http)
    held, states = bytes_held(connection, http)
    print(f"\nRedis holds {held:.0f} bytes for each queued generation: {states}")
    asyncio.run(fan_out(service, http))


def rates(service: LocalService, connection: "Redis", http: httpx2.Client) -> None:
    api = service.parts["api"].process.pid
    queue = Queue("bench", connection=connection, serializer=JSONSerializer)
    id = http.post("/v1/generations", json=BODY).json()["id"]
    get = partial(served, api, service.url, "GET")
    measures: dict[str, Callable[[], Cost]] = {
        "`POST /v1/generations`": lambda: served(api, service.url, "POST", "/v1/generations", json.dumps(BODY)),
        "bare `Queue.enqueue`": lambda: alone(lambda: queue.enqueue("x.y", kwargs=BODY)),
        "`GET /v1/generations/{id}`": lambda: get(f"/v1/generations/{id}"),
        "bare `HMGET`": lambda: alone(lambda: connection.hmget(Job.key_for(id), FIELDS)),
        "`GET /livez`, which does nothing": lambda: get("/livez"),
    }
    rounds = [{name: measure() for name, measure in measures.items()} for _ in range(ROUNDS)]
    middle = {name: [statistics.median(one[name][i] for one in rounds) for i in (0, 1)] for name in measures}
    print("\n| one process | a second | CPU µs each |\n|---|---|---|")
    for name, (rate, cpu) in middle.items():
        print(f"| {name} | {rate:.0f} | {cpu * 1e6:.0f} |")
    names = list(measures)
    for ours, bare in ((names[0], names[1]), (names[2], names[3])):
        of_rate = statistics.median(one[ours][0] / one[bare][0] for one in rounds)
        print(f"\n{ours} ÷ {bare}: {of_rate:.2f}")


def depths(connection: "Redis", http: httpx2.Client) -> None:
    """What one client waits for, at the end of a queue that is so long."""
    print("\n| queued before | POST ms | poll ms | page of 20 ms |\n|---|---|---|---|")
    connection.flushall()
    first = 0
    for depth in DEPTHS:
        fill(connection, http, depth - first)
        first = depth
        last = http.post("/v1/generations", json=BODY).headers["location"]
        post = middle_of(lambda: http.post("/v1/generations", json=BODY))
        poll = middle_of(partial(http.get, last))
        page = middle_of(lambda: http.get("/v1/generations"))
        print(f"| {depth:,} | {post * 1e3:.2f} | {poll * 1e3:.2f} | {page * 1e3:.1f} |")


def fill(connection: "Redis", http: httpx2.Client, count: int) -> None:
    """Copies of one that was submitted, with ids of their own."""
    if count <= 0:
        return
    made = http.post("/v1/generations", json=BODY).json()["id"]
    for begin in range(0, count, 1_000):
        with connection.pipeline(transaction=False) as pipe:
            for i in range(begin, min(begin + 1_000, count)):
                id = f"{made[:12]}{i:020x}"
                pipe.copy(Job.key_for(made), Job.key_for(id))
                pipe.rpush("rq:queue:emoji-sd.normal", id)
                pipe.zadd("darkroom:generations:everybody", {id: 0})
            pipe.execute()


def middle_of(call: Callable[[], object], times: int = 100) -> float:
    took = list[float]()
    for _ in range(times):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def served(pid: int, url: str, method: str, path: str, body: str = "") -> Cost:
    """(requests a second, the API's CPU seconds for each): connections that are kept, and clients that only count."""
    at = urlsplit(url)
    kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    request = f"{method} {path} HTTP/1.1\r\nHost: {at.netloc}\r\n{kind}\r\n{body}".encode()

    def client(_: int) -> int:
        done = 0
        with socket.create_connection((at.hostname, at.port), 30) as there, there.makefile("rb") as answers:
            until = time.perf_counter() + SECONDS
            while time.perf_counter() < until:
                there.sendall(request)
                status, headers = answers.readline(), iter(answers.readline, b"\r\n")
                length = next(int(line[15:]) for line in list(headers) if line.lower().startswith(b"content-length:"))
                answers.read(length)
                assert status.startswith(b"HTTP/1.1 2"), status
                done += 1
        return done

    before, began = cpu_seconds(pid), time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        done = sum(clients.map(client, range(CLIENTS)))
    return done / (time.perf_counter() - began), (cpu_seconds(pid) - before) / done


def alone(call: Callable[[], object]) -> Cost:
    began, before, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < SECONDS / 2:
        call()
        done += 1
    return done / (time.perf_counter() - began), (time.process_time() - before) / done


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bytes_held(connection: "Redis", http: httpx2.Client, count: int = 300) -> tuple[float, str]:
    connection.flushall()
    for _ in range(count):
        http.post("/v1/generations", json=BODY)
    by_kind: dict[str, float] = {}
    for key in connection.scan_iter(count=1000):
        kind = ":".join(key.decode().split(":")[:2])
        by_kind[kind] = by_kind.get(kind, 0) + (connection.memory_usage(key, samples=0) or 0) / count
    return sum(by_kind.values()), ", ".join(f"{kind} {each:.0f}" for kind, each in by_kind.items() if each >= 1)


async def fan_out(service: LocalService, http: httpx2.Client) -> None:
    """From the end of a generation until the first, the middle and the last of its listeners know."""
    at = urlsplit(service.url)
    id = http.post("/v1/generations", json=BODY).json()["id"]
    heard = list[float]()

    async def listen(listening: asyncio.Semaphore) -> None:
        async with listening:
            reader, writer = await asyncio.open_connection(at.hostname, at.port)
            writer.write(f"GET /v1/generations/{id}/events HTTP/1.1\r\nHost: {at.netloc}\r\n\r\n".encode())
            await reader.readuntil(b"event: queued")
        await reader.readuntil(b"event: canceled")
        heard.append(time.perf_counter())
        writer.close()

    few = asyncio.Semaphore(20)
    listeners = [asyncio.create_task(listen(few)) for _ in range(LISTENERS)]
    await asyncio.sleep(1)
    while few.locked():
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)
    began = time.perf_counter()
    await asyncio.to_thread(http.delete, f"/v1/generations/{id}")
    await asyncio.wait(listeners, timeout=60)
    took = sorted(moment - began for moment in heard)
    print(f"\n{len(took)} of {LISTENERS} listeners knew of the end after {took[0]:.2f} s (the first), ", end="")
    print(f"{statistics.median(took):.2f} s (the middle), {took[-1]:.2f} s (the last)")
