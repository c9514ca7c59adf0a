"""What the OpenAPI document shows: an example of each request and answer, made of what the code answers with."""

import base64
import io
import json
from datetime import UTC, datetime
from typing import Any

from PIL import Image as Picture
from pydantic import BaseModel

from app import errors
from app.evaluation import Score
from app.evaluations import Evaluation, Pictures
from app.schemas import (
    Generation,
    GenerationList,
    Image,
    ModelAtWork,
    ModelList,
    ModelStatus,
    Progress,
    ServiceStatus,
    WebhookSecret,
    WorkerStatus,
)
from models.catalog import Catalog

ID = "0197a3b1c2d45e6f7a8b9c0d1e2f3a4b"
AT = datetime(2026, 1, 31, 12, tzinfo=UTC)


def square(colour: str) -> str:
    """In base64."""
    out = io.BytesIO()
    Picture.new("RGB", (16, 16), colour).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


APPLE = {
    "model": "emoji-sd",
    "task": "text-to-image",
    "prompt": "a red apple on a blue background",
    "width": 128,
    "height": 128,
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "scheduler": "dpmpp_2m",
    "seed": 7,
}
QUEUED = Generation.model_validate(
    {
        "id": ID,
        "status": "queued",
        "model": "emoji-sd",
        "created_at": AT,
        "position": 0,
        "eta": 1.2,
        "parameters": APPLE,
    }
)
RUNNING = QUEUED.model_copy(
    update={"status": "running", "position": None, "progress": Progress(step=8, steps=20), "attempts": 1}
)
DRAWN = RUNNING.model_copy(
    update={
        "status": "succeeded",
        "eta": None,
        "progress": Progress(step=20, steps=20),
        "images": [Image(url=f"/v1/generations/{ID}/images/0", seed=7, width=128, height=128, frames=1)],
        "timings": {"queued": 0.01, "running": 0.92, "first_step": 0.03, "drawn": 0.94},
    }
)
CANCELED = RUNNING.model_copy(update={"status": "canceled", "eta": None})
EVENTS = "".join(
    f"id: 1769860800000-{i}\nevent: {name}\ndata: {data}\n\n"
    for i, (name, data) in enumerate(
        [
            ("queued", "{}"),
            ("progress", '{"step": 8, "steps": 20}'),
            (
                "preview",
                json.dumps({"step": 8, "steps": 20, "index": 0, "url": f"/v1/generations/{ID}/previews/0/8"}),
            ),
            ("succeeded", DRAWN.model_dump_json()),
        ]
    )
)
BEGUN = Evaluation(
    id=ID, status="queued", models=["emoji-sd"], created_at=AT, pictures=Pictures(done=0, of=90), scores=[], sheet=None
)
SCORES = [Score(model="emoji-sd", category="all", pictures=90, agreement=0.71, found=0.93, background=1.0)]
SCORED = BEGUN.model_copy(
    update={
        "status": "succeeded",
        "pictures": Pictures(done=90, of=90),
        "scores": SCORES,
        "sheet": f"/v1/evaluations/{ID}/files/index.html",
    }
)
MODELS = ModelList(data=[Catalog.read(["emoji-sd"]).default.public()])
STATUS = ServiceStatus(
    workers=[
        WorkerStatus(
            name="gpu-1.4711",
            device="NVIDIA H100 80GB HBM3",
            uptime_seconds=86400.0,
            stopping=False,
            models=[ModelAtWork(name="emoji-sd", width=16, rows=11.5, running=6, rows_per_second=412.0)],
        )
    ],
    models=[ModelStatus(name="emoji-sd", waiting={"high": 0, "normal": 3, "low": 0}, oldest=0.4, eta=2.1)],
)
METRICS = 'darkroom_queue_depth{queue="emoji-sd.normal"} 0.0\n'

REQUESTS: dict[str, dict[str, Any]] = {
    "create_generation": {
        "A picture": {"prompt": "a red apple on a blue background", "seed": 7},
        "Four, with previews": {
            "prompt": "a dog",
            "n": 4,
            "num_inference_steps": 12,
            "guidance_scale": 3.5,
            "guidance": {"interval": [0.2, 0.8]},
            "preview_every": 3,
        },
        "From a picture": {"prompt": "a green apple", "image": square("red"), "strength": 0.6},
        "Repainted": {"prompt": "a pear", "image": square("red"), "mask": square("white")},
    },
    "create_evaluation": {
        "A suite of ours": {"suite": "emoji", "models": ["emoji-sd", "emoji-unclip"]},
        "Prompts of one's own": {
            "prompts": [{"category": "fruit", "prompt": "a pear"}],
            "models": ["emoji-sd"],
            "num_inference_steps": 8,
        },
    },
}
ANSWERS: dict[str, dict[str, BaseModel | str]] = {
    "create_generation": {"200": DRAWN, "202": QUEUED},
    "list_generations": {"200": GenerationList(data=[DRAWN], next_cursor=ID)},
    "get_generation": {"200": RUNNING},
    "cancel_generation": {"200": CANCELED},
    "watch_generation": {"200": EVENTS},
    "list_models": {"200": MODELS},
    "get_model": {"200": MODELS.data[0]},
    "create_evaluation": {"202": BEGUN},
    "get_evaluation": {"200": SCORED},
    "cancel_evaluation": {"200": BEGUN.model_copy(update={"status": "canceled"})},
    "get_status": {"200": STATUS},
    "get_webhook_secret": {"200": WebhookSecret(secret="whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD")},
    "check_liveness": {"200": "ok"},
    "check_readiness": {"200": "ready"},
    "get_metrics": {"200": METRICS},
}
PROBLEMS = {
    "400": errors.MalformedBody("the body is not JSON: Expecting value"),
    "401": errors.Unauthorized("this API key is not known"),
    "404": errors.NotFound(f"there is none with the id {ID!r}"),
    "408": errors.BodyTooSlow("nothing more of the body has come for 30 s"),
    "409": errors.NotCancelable(f"{ID} has succeeded already"),
    "413": errors.BodyTooLarge("the body is larger than 25 MiB"),
    "415": errors.UnsupportedMediaType("send application/json, not text/plain"),
    "416": errors.RangeNotSatisfiable("the file has 11264 bytes"),
    "422": errors.InvalidRequest([("num_inference_steps", "Input should be greater than or equal to 1")]),
    "503": errors.QueueFull("1000 generations are waiting for emoji-sd; nothing was accepted", 12),
}


def shown(example: BaseModel | str) -> Any:
    return example if isinstance(example, str) else example.model_dump(mode="json")


def put_into(document: dict[str, Any]) -> None:
    """Each operation's examples, but for files; and a title."""
    for operation in (it for methods in document["paths"].values() for it in methods.values()):
        id = operation["operationId"]
        operation["summary"] = id.replace("_", " ").capitalize()
        if id in REQUESTS:
            body = operation["requestBody"]["content"]["application/json"]
            body["examples"] = {name: {"value": value} for name, value in REQUESTS[id].items()}
        for status, answer in operation["responses"].items():
            for media_type, content in answer.get("content", {}).items():
                if media_type == "application/problem+json":
                    content["example"] = json.loads(bytes(errors.problem(PROBLEMS[status]).body))
                elif status in ANSWERS.get(id, {}):
                    content["example"] = shown(ANSWERS[id][status])
