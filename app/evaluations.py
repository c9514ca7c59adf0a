"""The API's side of evaluations: RQ jobs of `app/evaluator.py`, which draws through the queue like any client."""

from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from redis import Redis
from rq.exceptions import NoSuchJobError
from rq.job import Job, Retry
from rq.queue import Queue
from rq.serializers import JSONSerializer

from app.errors import InvalidRequest, NotCancelable, NotFound
from app.evaluation import Prompt, Score, Suite
from app.jobs import STATUS, Jobs, is_id, new_id
from app.schemas import Answer, Failure, GenerationRequest, Name, Status
from app.storage import evaluation_folder

QUEUE = "evaluations"
LASTS = timedelta(days=1)
TRIES = 5  # begun again so often, if its process ends under it
SHEET = "index.html"
CANCELED = "canceled"  # a field of the job's hash, which the evaluator looks at between pictures


class EvaluationRequest(BaseModel, frozen=True):
    """A suite of prompts over some models."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    suite: Name | None = Field(None, description="One of ours, such as `emoji`; or give `prompts`.")
    prompts: list[Prompt] | None = Field(
        None, min_length=1, max_length=2000, validate_default=True, description="Your own, by category."
    )
    models: list[Name] = Field(min_length=1, max_length=16, description="Names from `GET /v1/models`.")
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0)

    @field_validator("prompts")
    @classmethod
    def _or_a_suite(cls, value: list[Prompt] | None, info: ValidationInfo) -> list[Prompt] | None:
        if (value is None) == (info.data.get("suite") is None):
            raise PydanticCustomError("prompts", "give either `suite` or `prompts`")
        return value

    def read(self) -> Suite:
        """The prompts.

        Raises:
            InvalidRequest: there is no such suite.
        """
        if self.prompts is not None:
            return Suite(title="Evaluation", prompts=self.prompts)
        try:
            return Suite.ours(self.suite or "")
        except ValueError as error:
            raise InvalidRequest([("suite", str(error))]) from None

    @property
    def given(self) -> dict[str, Any]:
        """What each of its generations is asked for, beside a model, a prompt and a seed."""
        given = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return {"priority": "low", **{name: value for name, value in given.items() if value is not None}}


class Pictures(BaseModel):
    done: int
    of: int


class Evaluation(Answer):
    """An evaluation as it stands now."""

    id: str
    status: Status
    models: list[str]
    created_at: datetime
    pictures: Pictures
    scores: list[Score] = Field([], description="By model and category, and of `all`; when it has succeeded.")
    sheet: str | None = Field(None, description="A page with all pictures side by side, when it has succeeded.")
    error: Failure | None = None


class Evaluations:
    def __init__(self, connection: "Redis", jobs: Jobs):
        self.connection, self.jobs = connection, jobs
        self.queue = Queue(QUEUE, connection=connection, serializer=JSONSerializer)

    def submit(self, request: EvaluationRequest, owner: str) -> Evaluation:
        """Queue it.

        Raises:
            InvalidRequest: there is no such suite or model, or a model cannot do what is asked.
        """
        suite = request.read()
        self._check(request, suite)
        ttl, id = int(self.jobs.settings.result_ttl.total_seconds()), new_id()
        self.queue.enqueue_call(
            "app.evaluator.run",
            kwargs={"request": request.model_dump(), "owner": owner},
            job_id=id,
            timeout=int(LASTS.total_seconds()),
            result_ttl=ttl,
            failure_ttl=ttl,
            retry=Retry(max=TRIES),
            meta={"of": len(suite.prompts) * len(request.models)},
            description="evaluation",
        )
        return self.fetch(id, owner)

    def _check(self, request: EvaluationRequest, suite: Suite) -> None:
        catalog, problems = self.jobs.catalog, list[tuple[str, str]]()
        for i, model in enumerate(request.models):
            if model not in catalog:
                problems.append((f"models.{i}", f"there is no {model!r}; there are {', '.join(catalog.names)}"))
                continue
            asked = (GenerationRequest(model=model, prompt=one.prompt, **request.given) for one in suite.prompts)
            if found := next((found for one in asked for found in catalog[model].problems(one)), None):
                field, what = found
                problems.append((field if field in request.given else f"models.{i}", what))
        if problems:
            raise InvalidRequest(problems)

    def job(self, id: str, owner: str) -> Job:
        try:
            job = Job.fetch(id if is_id(id) else "none", connection=self.connection, serializer=JSONSerializer)
        except NoSuchJobError:
            job = None
        if job is None or job.origin != QUEUE or job.kwargs["owner"] != owner:
            raise NotFound(f"there is no evaluation {id[:64]!r}; they are kept for {self.jobs.settings.result_ttl}")
        return job

    def fetch(self, id: str, owner: str) -> Evaluation:
        """An evaluation as it stands.

        Raises:
            NotFound: there is none with this id, or it is somebody else's.
        """
        job = self.job(id, owner)
        status = self._status(job)
        done = status == "succeeded"
        return Evaluation(
            id=id,
            status=status,
            models=job.kwargs["request"]["models"],
            created_at=job.created_at.astimezone(UTC),
            pictures=Pictures(done=job.meta.get("done", 0), of=job.meta["of"]),
            scores=job.meta.get("scores", []) if done else [],
            sheet=f"/v1/evaluations/{id}/files/{SHEET}" if done else None,
            error=self._failure(job) if status == "failed" else None,
        )

    def _status(self, job: Job) -> Status:
        if self.connection.hexists(job.key, CANCELED):
            return "canceled"
        if "error" in job.meta:
            return "failed"
        return STATUS.get(job.get_status(refresh=False), "queued")

    @staticmethod
    def _failure(job: Job) -> Failure:
        default = {"type": "error", "detail": "its process ended under it, or met a bug: see the evaluator's log"}
        return Failure(**job.meta.get("error", default))

    def cancel(self, id: str, owner: str) -> Evaluation:
        """Cancel it; what it still draws is canceled as well.

        Raises:
            NotFound: as `fetch`.
            NotCancelable: it has ended.
        """
        job = self.job(id, owner)
        if (status := self._status(job)) in ("succeeded", "failed"):
            raise NotCancelable(f"evaluation {id} has {status} already")
        self.connection.hset(job.key, CANCELED, "1")
        self.queue.remove(job)
        return self.fetch(id, owner)

    def file(self, id: str, owner: str, name: str) -> bytes:
        """A file of its sheet.

        Raises:
            NotFound: as `fetch`.
            FileNotFoundError: there is no such file.
        """
        self.job(id, owner)
        return self.jobs.blobs.open(f"{evaluation_folder(id)}/{name}")
