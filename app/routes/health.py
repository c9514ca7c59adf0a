"""For orchestrators and Prometheus."""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from app import metrics
from app.routes.generations import PROBLEM, JobsDep

router = APIRouter(tags=["health"])


@router.get("/livez", response_class=PlainTextResponse)
def livez() -> str:
    """The process answers. It asks nobody else: a restart would not mend Redis."""
    return "ok"


@router.get("/readyz", response_class=PlainTextResponse, responses={503: {"description": "Not ready", **PROBLEM}})
def readyz(jobs: JobsDep) -> str:
    """Redis and the image store answer."""
    jobs.connection.ping()
    jobs.blobs.check()
    return "ready"


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def scrape(jobs: JobsDep) -> Response:
    """Prometheus metrics, of all processes that share this one's directory."""
    return Response(metrics.render(metrics.Waiting(jobs.waiting)), media_type="text/plain; version=0.0.4")
