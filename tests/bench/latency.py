"""An idle service: from POST to the first step, and from the last to a picture that can be fetched."""

import statistics
import time

import httpx2
from redis import Redis

from app.jobs import age_of
from app.local import LocalService

REQUESTS = 40


def run(service: LocalService) -> None:
    http = httpx2.Client(base_url=service.url, timeout=60)
    ids, firsts, lasts, encodings = [], [], [], []
    for seed in range(REQUESTS):
        posted = time.time()
        body = {"prompt": "a green pear", "num_inference_steps": 2, "seed": seed}
        done = http.post("/v1/generations", json=body, headers={"Prefer": "wait=60"}).json()
        http.get(done["images"][0]["url"])
        fetched = time.time()
        ids.append(done["id"])
        submitted, timings = age_of(done["id"]), done["timings"]
        firsts.append(submitted + timings["first_step"] - posted)
        lasts.append(fetched - submitted - timings["drawn"] - timings["encoding"])
        encodings.append(timings["encoding"])
        time.sleep(0.05)
    print("\n| idle, milliseconds | p50 | p95 |\n|---|---|---|")
    for name, values in (
        ("POST to first step (text encoding included)", firsts),
        ("last step to fetched picture (PNG encoding excluded)", lasts),
        ("both", [a + b for a, b in zip(firsts, lasts, strict=True)]),
        ("PNG encoding", encodings),
    ):
        print(
            f"| {name} | {1000 * statistics.median(values):.1f} | {1000 * statistics.quantiles(values, n=20)[18]:.1f} |"
        )
    with Redis.from_url(service.redis_url) as redis:
        held = sum(redis.memory_usage(key) or 0 for id in ids for key in redis.scan_iter(f"*{id}*", count=10_000))
    print(f"\nRedis holds {held / len(ids):.0f} bytes for each finished generation, until its result is forgotten")
