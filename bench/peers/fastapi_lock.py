"""FastAPI around the pipeline, one request after another: what most people write first."""

from threading import Lock
from typing import Any

import uvicorn
from fastapi import FastAPI, Response

from bench.peers.drawing import drawing
from bench.peers.plan import Plan

if __name__ == "__main__":
    plan = Plan.read()
    app, lock, draw = FastAPI(), Lock(), drawing(plan)

    @app.post("/predict")
    def predict(body: dict[str, Any]) -> Response:
        with lock:
            (file,) = draw([body])
        return Response(file, media_type="image/png")

    uvicorn.run(app, host="127.0.0.1", port=plan.port, log_level="warning")
