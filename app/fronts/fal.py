"""fal's queue and its synchronous calls, for their unmodified client: https://docs.fal.ai/model-apis/model-endpoints/queue.

`FAL_QUEUE_RUN_HOST=host/fal/queue` and `FAL_RUN_HOST=host/fal/run`; their client speaks HTTPS only. A request is a
generation, under the same id. Applications are called `owner/name`, of which the name is our model's.
"""

import base64
import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Depends, Header, Response
from fastapi.responses import JSONResponse

from app import events
from app.errors import InvalidRequest, NotFound, ServiceError, Unfinished
from app.fronts.desk import LARGEST, Counter, Desk, DeskDep, asked_for, nearest_size, renamed, unsuccessful
from app.images import MEDIA_TYPES
from app.routes.generations import json_only
from app.schemas import Generation, GenerationRequest, Status
from models.catalog import ModelCard

router = APIRouter(prefix="/fal", include_in_schema=False)  # the document of this API is fal's

OURS = {"num_images": "n", "image_url": "image", "mask_url": "mask", "mask_image_url": "mask"}  # by their names
UNHEEDED = ("enable_safety_checker", "safety_tolerance", "acceleration", "expand_prompt", "format")
SHAPES = {  # of their `image_size`, width to height
    "square_hd": (1, 1),
    "square": (1, 1),
    "portrait_4_3": (3, 4),
    "portrait_16_9": (9, 16),
    "landscape_4_3": (4, 3),
    "landscape_16_9": (16, 9),
}


TOLD: tuple[Status, ...] = ("succeeded", "failed", "canceled", "expired")  # their webhooks: of the end


class Failed(ServiceError):
    """A generation that has ended without its pictures."""

    status, kind = 422, "generation_failed"

    def __init__(self, generation: Generation):
        super().__init__(unsuccessful(generation), headers={"x-fal-error-type": self.kind})


def error_response(error: ServiceError) -> JSONResponse:
    return JSONResponse(error_body(error), error.status, error.headers)


def error_body(error: ServiceError) -> dict[str, Any]:
    """As fal's clients read it: `detail` is a list where fields are wrong."""
    detail: Any = error.detail
    if error.errors:
        detail = [
            {"loc": ["body", *field.split(".")], "msg": what, "type": "value_error"} for field, what in error.errors
        ]
    return {"detail": detail, "error_type": error.kind.replace("-", "_")}


class Application(NamedTuple):
    card: ModelCard
    path: str  # as the client called it: where its requests are


def application(owner: str, app: str, desk: DeskDep, path: str = "") -> Application:
    """`owner/app` or `owner/app/path`: a model of ours of that name, or of `app-path`."""
    for name in (app, f"{app}-{path.replace('/', '-')}"):
        if name in desk.jobs.catalog:
            return Application(desk.jobs.catalog[name], f"{owner}/{app}")
    raise NotFound(f"there is no application {owner[:64]}/{app[:64]}; there are {', '.join(desk.jobs.catalog.names)}")


ApplicationDep = Annotated[Application, Depends(application)]
PriorityHeader = Annotated[str | None, Header(alias="x-fal-queue-priority")]


@router.get("/queue/{owner}/{app}/requests/{id}/status")
def status(owner: str, app: str, id: str, desk: DeskDep, logs: bool = False) -> dict[str, Any]:
    """Where a request is."""
    generation = desk.jobs.fetch(id, desk.owner)
    told = addresses(desk, f"{owner}/{app}", id)
    if generation.status == "queued":
        return {"status": "IN_QUEUE", "queue_position": generation.position or 0, **told}
    lines = logged(generation) if logs else []
    if generation.status == "running":
        return {"status": "IN_PROGRESS", "logs": lines, **told}
    metrics = {"inference_time": generation.timings.get("running")}
    failed = {"error": unsuccessful(generation), "error_type": Failed.kind} if generation.status != "succeeded" else {}
    return {"status": "COMPLETED", "logs": lines, "metrics": metrics, **failed, **told}


@router.get("/queue/{owner}/{app}/requests/{id}")
async def result(owner: str, app: str, id: str, desk: DeskDep) -> dict[str, Any]:
    """Its pictures."""
    generation = await desk.fetch(id)
    if generation.status not in events.ENDED:
        raise Unfinished(f"request {id} is not done yet")
    return await whole(desk, generation)


@router.put("/queue/{owner}/{app}/requests/{id}/cancel", status_code=202)
def cancel(owner: str, app: str, id: str, response: Response, desk: DeskDep) -> dict[str, str]:
    """Cancel it, queued or running."""
    if desk.jobs.fetch(id, desk.owner).status in events.ENDED:
        response.status_code = 400
        return {"status": "ALREADY_COMPLETED"}
    desk.jobs.cancel(id, desk.owner)
    return {"status": "CANCELLATION_REQUESTED"}


@router.post("/queue/{owner}/{app}", dependencies=[Depends(json_only)])
@router.post("/queue/{owner}/{app}/{path:path}", dependencies=[Depends(json_only)])
async def submit(
    body: dict[str, Any],
    application: ApplicationDep,
    desk: DeskDep,
    fal_webhook: str | None = None,
    priority: PriorityHeader = None,
) -> dict[str, Any]:
    """Queue a request."""
    generation = await begun(desk, application.card, body, priority, fal_webhook)
    return {"request_id": generation.id, **addresses(desk, application.path, generation.id), "queue_position": 0}


@router.post("/run/{owner}/{app}", dependencies=[Depends(json_only)])
@router.post("/run/{owner}/{app}/{path:path}", dependencies=[Depends(json_only)])
async def run(
    body: dict[str, Any], application: ApplicationDep, desk: DeskDep, priority: PriorityHeader = None
) -> dict[str, Any]:
    """Queue a request, and answer when it has ended."""
    return await whole(desk, await desk.ended_at_last(await begun(desk, application.card, body, priority)))


async def begun(
    desk: Desk, card: ModelCard, body: Mapping[str, Any], priority: str | None, webhook: str | None = None
) -> Generation:
    asked = translate(card, body)
    if webhook is not None:
        if asked.webhook is not None:
            raise InvalidRequest([("fal_webhook", "there is a `webhook` in the body already")])
        asked = asked.model_copy(update={"webhook": desk.webhook("fal_webhook", webhook, TOLD)})
    if priority == "low":
        asked = asked.model_copy(update={"priority": "low"})
    try:
        return await desk.submit(asked, shape="darkroom" if webhook is None else "fal")
    except InvalidRequest as error:
        raise renamed(error, names_in(body)) from None


def translate(card: ModelCard, given: Mapping[str, Any]) -> GenerationRequest:
    """Their input as a request of ours.

    Raises:
        InvalidRequest: a field is wrong or unknown.
    """
    fields = {OURS.get(name, name): value for name, value in given.items() if name not in UNHEEDED}
    fields["model"] = card.name
    if (size := fields.pop("image_size", None)) is not None:
        fields |= sized(card, size)
    marks = {"sync_mode": "true"} if fields.pop("sync_mode", False) else {}
    if unheeded := [name for name in UNHEEDED if name in given]:
        marks["unheeded"] = ", ".join(unheeded)
    for name in ("image", "mask"):
        if isinstance(fields.get(name), str) and fields[name].startswith(("http://", "https://")):
            raise InvalidRequest([(names_in(given).get(name, name), "send a data: URL; others are not fetched")])
    asked = asked_for(fields, names_in(given))
    return asked.model_copy(update={"metadata": asked.metadata | marks})


def names_in(given: Mapping[str, Any]) -> dict[str, str]:
    """What the client calls our fields."""
    return {ours: theirs for theirs, ours in OURS.items() if theirs in given} | {
        "width": "image_size",
        "height": "image_size",
    }


def sized(card: ModelCard, size: Any) -> dict[str, int]:
    if (
        isinstance(size, dict)
        and set(size) == {"width", "height"}
        and all(type(n) is int and 0 < n <= LARGEST for n in size.values())
    ):
        width, height = nearest_size(card, size["width"], size["height"])
    elif isinstance(size, str) and size in SHAPES:
        wide, tall = SHAPES[size]
        scale = math.sqrt(card.size.width * card.size.height / (wide * tall))
        width, height = nearest_size(card, round(wide * scale), round(tall * scale))
    else:
        raise InvalidRequest([("image_size", f"is width and height, or one of {', '.join(SHAPES)}")])
    return {"width": width, "height": height}


def addresses(desk: Desk, path: str, id: str) -> dict[str, str]:
    here = desk.absolute(f"/fal/queue/{path}/requests/{id}")
    return {"response_url": here, "status_url": f"{here}/status", "cancel_url": f"{here}/cancel"}


def logged(generation: Generation) -> list[dict[str, Any]]:
    """What there is to say of how it goes."""
    lines = [f"{name} is not heeded" for name in generation.parameters.metadata.get("unheeded", "").split(", ") if name]
    if generation.progress:
        lines.append(f"step {generation.progress.step} of {generation.progress.steps}")
    at = generation.created_at.isoformat()
    return [
        {"message": line, "level": "INFO", "source": "USER", "timestamp": at} for line in (*lines, *generation.warnings)
    ]


def told(desk: Counter, generation: Generation) -> dict[str, Any]:
    """What their webhook is sent: that, and the answer that the request has, with URLs in any case."""
    ids = {"request_id": generation.id, "gateway_request_id": generation.id}
    try:
        return {**ids, "status": "OK", "payload": shown(desk, generation), "error": None}
    except Failed as error:
        return {**ids, "status": "ERROR", "payload": error_body(error), "error": error.detail}


async def whole(desk: Counter, generation: Generation) -> dict[str, Any]:
    """The answer, with the pictures in it if the request was for that."""
    answer = shown(desk, generation)
    if generation.parameters.metadata.get("sync_mode"):
        for i, image in enumerate(answer["images"]):
            picture = base64.b64encode(await desk.picture(generation, i)).decode()
            image["url"] = f"data:{image['content_type']};base64,{picture}"
    return answer


def shown(desk: Counter, generation: Generation) -> dict[str, Any]:
    if generation.status != "succeeded":
        raise Failed(generation)
    r, kind = generation.parameters, MEDIA_TYPES[generation.parameters.output_format]
    images = [
        {"url": desk.url(image.url), "width": image.width, "height": image.height, "content_type": kind}
        for image in generation.images
    ]
    return {
        "images": images,
        "seed": r.seed,
        "prompt": r.prompt,
        "timings": {"inference": generation.timings.get("running")},
    }
