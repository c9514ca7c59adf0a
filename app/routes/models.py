"""What there is to draw with."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path

from app.auth import owner
from app.errors import NotFound
from app.routes.generations import MISSING, PROBLEMS, JobsDep
from app.schemas import Model, ModelList

router = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[Depends(owner)], responses=PROBLEMS)


@router.get("", operation_id="list_models")
def index(jobs: JobsDep) -> ModelList:
    """Every model, the default first: what it can do, its limits, its defaults, its licence."""
    return ModelList(data=[card.public() for card in jobs.catalog])


@router.get("/{name}", operation_id="get_model", responses=MISSING)
def show(name: Annotated[str, Path(description="Of a model")], jobs: JobsDep) -> Model:
    """One model."""
    if name not in jobs.catalog:
        raise NotFound(f"there is no model {name[:64]!r}; there are {', '.join(jobs.catalog.names)}")
    return jobs.catalog[name].public()
