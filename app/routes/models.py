"""What there is to draw with."""

from fastapi import APIRouter, Depends

from app.auth import owner
from app.errors import NotFound
from app.routes.generations import MISSING, PROBLEMS, JobsDep
from app.schemas import Model, ModelList

router = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[Depends(owner)], responses=PROBLEMS)


@router.get("")
def index(jobs: JobsDep) -> ModelList:
    """Every model, the default first: what it can do, its limits, its defaults, its licence."""
    return ModelList(data=[card.public() for card in jobs.catalog])


@router.get("/{name}", responses=MISSING)
def show(name: str, jobs: JobsDep) -> Model:
    """One model."""
    if name not in jobs.catalog:
        raise NotFound(f"there is no model {name[:64]!r}; there are {', '.join(jobs.catalog.names)}")
    return jobs.catalog[name].public()
