"""For people who run the service."""

from fastapi import APIRouter, Depends

from app import status
from app.auth import owner
from app.routes.generations import PROBLEMS, JobsDep
from app.schemas import ServiceStatus

router = APIRouter(prefix="/v1/status", tags=["health"], dependencies=[Depends(owner)], responses=PROBLEMS)


@router.get("", operation_id="get_status")
def show(jobs: JobsDep) -> ServiceStatus:
    """Workers, the models that they hold, how full their passes are, and how much waits."""
    return status.status(jobs)
