"""For orchestrators and Prometheus."""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from app import metrics
from app.routes.generations import JobsDep, Responses, problem
from app.webhooks import Outbox

NOT_READY: Responses = {503: problem("Redis or the image store does not answer", "Retry-After")}

router = APIRouter(tags=["health"])


@router.get("/livez", operation_id="check_liveness", response_class=PlainTextResponse)
async def livez() -> str:
    """The process answers. It asks nobody else, threads neither: a restart would not mend Redis."""
    return "ok"


@router.get("/readyz", operation_id="check_readiness", response_class=PlainTextResponse, responses=NOT_READY)
def readyz(jobs: JobsDep) -> str:
    """Redis and the image store answer."""
    jobs.connection.ping()
    jobs.blobs.check()
    return "ready"


@router.get("/metrics", operation_id="get_metrics", response_class=PlainTextResponse)
def scrape(jobs: JobsDep) -> Response:
    """Prometheus metrics, of all processes that share this one's directory; also while Redis is away."""
    outbox = Outbox(jobs.connection)
    text = metrics.render(metrics.Waiting(jobs.waiting), metrics.Webhooks(outbox.standing))
    return Response(text, media_type="text/plain; version=0.0.4")
