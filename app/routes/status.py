"""What the service is doing now, for people: `/status` shows it."""

from fastapi import APIRouter, Depends, Response

from app.auth import owner
from app.routes.generations import PROBLEMS, JobsDep
from app.schemas import ServiceStatus

router = APIRouter(prefix="/v1/status", tags=["health"], dependencies=[Depends(owner)], responses=PROBLEMS)


@router.get("")
def show(response: Response, jobs: JobsDep) -> ServiceStatus:
    """Workers, the models that they have in memory, queues and what is being drawn."""
    response.headers["Cache-Control"] = "no-store"
    return jobs.status()
