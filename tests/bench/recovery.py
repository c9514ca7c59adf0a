"""What a kill costs: time until the first new step, steps that were saved, and what others notice of it."""

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from redis import Redis
from rq.job import Job

from app.local import LocalService
from app.parts import Part
from app.settings import Settings

LEASE, KILLS, EVERY, STEPS = 5, 4, 5.0, 60
SECONDS = 30.0
PICTURE = {"prompt": "a red apple", "num_inference_steps": STEPS, "reproducible": True}
SMALL = {"prompt": "a dog", "num_inference_steps": 4, "width": 64, "height": 64}


def run(_: LocalService) -> None:
    with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as directory:
        settings = Settings(
            data_dir=Path(directory),
            port=0,
            log_level="error",
            lease=LEASE,
            journal_interval=0.5,
            torch_threads=1,
            max_attempts=10,
        )
        with LocalService(settings, workers=2) as service:
            http = httpx2.Client(base_url=service.url, timeout=60)
            recovered = [killed(service, http) for _ in range(KILLS)]
            waits, saved, drawn = zip(*recovered, strict=True)
            print("\n| a worker killed in mid-picture | |\n|---|---|")
            each = ", ".join(f"{wait / LEASE:.2f}" for wait in waits)
            print(f"| first new step after, in leases of {LEASE} s | {statistics.median(waits) / LEASE:.2f} ({each}) |")
            print(f"| steps saved of those drawn | {sum(saved)} of {sum(drawn)} |")
            print("\n| GET of a generation, ms | p50 | p99 |\n|---|---|---|")
            calm = polled(service, lambda: time.sleep(EVERY))
            print(f"| calm | {calm[0]:.1f} | {calm[1]:.1f} |")
            hunted = polled(service, lambda: hunt(service))
            print(f"| a worker killed every {EVERY:.0f} s | {hunted[0]:.1f} | {hunted[1]:.1f} |")


def killed(service: LocalService, http: httpx2.Client) -> tuple[float, int, int]:
    """Seconds from the kill to a new step; the steps that were saved, of how many that were drawn."""
    id = http.post("/v1/generations", json=PICTURE).json()["id"]

    def shown() -> dict[str, Any]:
        return http.get(f"/v1/generations/{id}").json()

    while (step := (shown()["progress"] or {"step": 0})["step"]) < 15:
        time.sleep(0.02)
    with Redis.from_url(service.redis_url) as redis:
        name = (redis.hget(Job.key_for(id), "worker_name") or b"").decode()
    part = next(part for part in workers(service) if name.endswith(f".{part.process.pid}"))
    part.process.kill()
    began = time.monotonic()
    while True:
        now = shown()
        if now["attempts"] == 2 and now["status"] == "running" and now["progress"] and now["resumed_at_step"]:
            break
        time.sleep(0.02)
    wait, saved = time.monotonic() - began, now["resumed_at_step"]
    restarted(part)
    while shown()["status"] == "running":
        time.sleep(0.1)
    return wait, saved, step


def polled(service: LocalService, meanwhile: Callable[[], None]) -> tuple[float, float]:
    """(p50, p99) in milliseconds of polling, while pictures are drawn and `meanwhile` happens again and again."""
    over, taken = threading.Event(), list[float]()

    def poll() -> None:
        with httpx2.Client(base_url=service.url, timeout=60) as http:
            while not over.is_set():
                id = http.post("/v1/generations", json=SMALL).json()["id"]
                status = "queued"
                while status in ("queued", "running") and not over.is_set():
                    began = time.perf_counter()
                    answer = http.get(f"/v1/generations/{id}")
                    taken.append(1000 * (time.perf_counter() - began))
                    status = answer.raise_for_status().json()["status"]
                    time.sleep(0.02)

    pollers = [threading.Thread(target=poll) for _ in range(3)]
    for poller in pollers:
        poller.start()
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        meanwhile()
    over.set()
    for poller in pollers:
        poller.join()
    return statistics.median(taken), statistics.quantiles(taken, n=100)[98]


def hunt(service: LocalService) -> None:
    first = workers(service)[0]
    first.process.kill()
    first.process.wait()
    first.start()
    time.sleep(EVERY)


def restarted(part: Part) -> None:
    part.process.wait()
    part.start()
    part.wait(60)


def workers(service: LocalService) -> list[Part]:
    return [part for name, part in service.parts.items() if name.startswith("worker")]
