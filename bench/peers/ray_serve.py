"""Ray Serve, whose `@serve.batch` gathers batches."""

import asyncio
import os
import signal

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from bench.peers.drawing import drawing
from bench.peers.plan import Plan

PLAN = Plan.read()
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))  # or Ray lets an actor have one thread


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
class Pictures:
    def __init__(self):
        self.draw = drawing(PLAN)

    @serve.batch(max_batch_size=PLAN.batch, batch_wait_timeout_s=PLAN.wait)
    async def batched(self, bodies):
        return await asyncio.to_thread(self.draw, bodies)

    async def __call__(self, request: Request) -> Response:
        return Response(await self.batched(await request.json()), media_type="image/png")


if __name__ == "__main__":
    serve.start(http_options={"host": "127.0.0.1", "port": PLAN.port})
    serve.run(Pictures.bind(), route_prefix="/predict")
    signal.pause()
