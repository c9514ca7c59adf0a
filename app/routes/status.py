"""What the service is doing now, for people: `/status` shows it."""

from fastapi import APIRouter, Depends, Response

from app import status
from app.auth import owner
from app.routes.generations import PROBLEMS, JobsDep
from app.schemas import ServiceStatus

router = APIRouter(prefix="/v1/status", tags=["health"], dependencies=[Depends(owner)], responses=PROBLEMS)


@router.get("", operation_id="get_status")
def show(response: Response, jobs: JobsDep) -> ServiceStatus:
    """Workers, the models that they hold, how full their passes are, and what waits for each model."""
    response.headers["Cache-Control"] = "no-store"
    return status.status(jobs)
