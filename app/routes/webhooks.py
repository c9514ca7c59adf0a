"""What webhooks are signed with."""

from fastapi import APIRouter, Response

from app.auth import Owner
from app.routes.generations import PROBLEMS, JobsDep
from app.schemas import WebhookSecret
from app.webhooks import secret_for

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], responses=PROBLEMS)


@router.get("/secret", operation_id="get_webhook_secret")
def secret(response: Response, jobs: JobsDep, owner: Owner) -> WebhookSecret:
    """The secret that your webhooks are signed with: for Standard Webhooks' libraries."""
    response.headers["Cache-Control"] = "no-store"
    return WebhookSecret(secret=secret_for(jobs.connection, jobs.settings, owner))
