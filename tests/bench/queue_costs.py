"""What a generation costs the API and Redis before and after it is drawn, against RQ's and Redis' own calls."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from app.jobs import FIELDS
from app.local import LocalService

BODY = {"prompt": "a red apple on a blue background", "num_inference_steps": 20, "seed": 1}
SECONDS = 4.0
CLIENTS = 4


def run(service: LocalService) -> None:
    connection = Redis.from_url(service.redis_url)
    api = service.parts["api"].process.pid
    queue = Queue("bench", connection=connection, serializer=JSONSerializer)
    http = httpx2.Client(base_url=service.url, timeout=30)
    id = http.post("/v1/generations", json=BODY).json()["id"]
    rows = [
        ("`POST /v1/generations`", *served(api, lambda http: http.post("/v1/generations", json=BODY), service.url)),
        ("bare `Queue.enqueue`", *alone(lambda: queue.enqueue("x.y", kwargs=BODY))),
        ("`GET /v1/generations/{id}`", *served(api, lambda http: http.get(f"/v1/generations/{id}"), service.url)),
        ("bare `HMGET`", *alone(lambda: connection.hmget(Job.key_for(id), FIELDS))),
    ]
    print("\n| one process | a second | CPU µs each |\n|---|---|---|")
    for name, rate, cpu in rows:
        print(f"| {name} | {rate:.0f} | {cpu * 1e6:.0f} |")
    print(f"\nRedis holds {bytes_per_queued(connection, http):.0f} bytes for each queued generation")


def served(pid: int, ask: Callable[[httpx2.Client], httpx2.Response], url: str) -> tuple[float, float]:
    """(requests a second from several clients on this machine, the API's CPU seconds for each)"""

    def client(_: int) -> int:
        done = 0
        with httpx2.Client(base_url=url, timeout=30) as http:
            until = time.perf_counter() + SECONDS
            while time.perf_counter() < until:
                assert not ask(http).is_error
                done += 1
        return done

    before, began = cpu_seconds(pid), time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        done = sum(clients.map(client, range(CLIENTS)))
    return done / (time.perf_counter() - began), (cpu_seconds(pid) - before) / done


def alone(call: Callable[[], object]) -> tuple[float, float]:
    began, before, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < SECONDS / 2:
        call()
        done += 1
    return done / (time.perf_counter() - began), (time.process_time() - before) / done


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bytes_per_queued(connection: "Redis", http: httpx2.Client, count: int = 300) -> float:
    connection.flushall()
    for _ in range(count):
        http.post("/v1/generations", json=BODY)
    return sum(connection.memory_usage(key) or 0 for key in connection.scan_iter(count=1000)) / count
