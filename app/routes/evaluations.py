"""Evaluations: a suite of prompts over several models, side by side, scored."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response

from app.auth import Owner
from app.errors import NotFound
from app.evaluations import Evaluation, EvaluationRequest, Evaluations
from app.routes.generations import MISSING, PROBLEMS, SUBMITTED, always, json_only, problem

router = APIRouter(prefix="/v1/evaluations", tags=["evaluations"], responses=PROBLEMS)

# Its own pictures and its own style, and nothing that runs.
SHEET_MAY = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; sandbox"
MEDIA_TYPES = {"html": "text/html; charset=utf-8", "json": "application/json", "png": "image/png"}


def evaluations(request: Request) -> Evaluations:
    return request.app.state.evaluations


EvaluationsDep = Annotated[Evaluations, Depends(evaluations)]
Id = Annotated[str, Path(description="Of an evaluation")]
Filename = Annotated[
    str, Path(description="`index.html`, or a file that it names", pattern=r"^[a-z0-9_-]{1,80}\.(html|json|png)$")
]


@router.post(
    "",
    operation_id="create_evaluation",
    status_code=202,
    dependencies=[Depends(json_only)],
    responses={**{code: SUBMITTED[code] for code in (400, 408, 413, 415)}, 202: {"headers": always("Location")}},
)
def create(body: EvaluationRequest, response: Response, evaluations: EvaluationsDep, owner: Owner) -> Evaluation:
    """Draw each prompt with each model, at low priority, and let CLIP and the pixels judge."""
    evaluation = evaluations.submit(body, owner)
    response.headers["Location"] = f"/v1/evaluations/{evaluation.id}"
    return evaluation


@router.get("/{id}", operation_id="get_evaluation", responses=MISSING)
def show(id: Id, response: Response, evaluations: EvaluationsDep, owner: Owner) -> Evaluation:
    """An evaluation as it stands: how many pictures are drawn, then scores and the sheet."""
    response.headers["Cache-Control"] = "no-store"
    return evaluations.fetch(id, owner)


@router.delete("/{id}", operation_id="cancel_evaluation", responses={**MISSING, 409: problem("It has ended already")})
def cancel(id: Id, evaluations: EvaluationsDep, owner: Owner) -> Evaluation:
    """Cancel an evaluation, with what it still draws."""
    return evaluations.cancel(id, owner)


@router.get(
    "/{id}/files/{name}",
    operation_id="get_evaluation_file",
    response_class=Response,
    responses={
        200: {
            "description": "`index.html`, the sheet; `scores.json`; or a picture that the sheet shows",
            "content": {
                kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("text/html", "image/png")
            },
        },
        **MISSING,
    },
)
def file(id: Id, name: Filename, evaluations: EvaluationsDep, owner: Owner) -> Response:
    """A file of an evaluation's sheet."""
    try:
        data = evaluations.file(id, owner, name)
    except FileNotFoundError:
        raise NotFound(f"evaluation {id} has no file {name}") from None
    headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
    return Response(
        data,
        media_type=MEDIA_TYPES[name.rpartition(".")[2]],
        headers=headers | {"Content-Security-Policy": SHEET_MAY},
    )
