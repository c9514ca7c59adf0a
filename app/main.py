"""The HTTP front end."""

import importlib.metadata
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import redis.asyncio
import redis.exceptions
import structlog
from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from starlette.types import ASGIApp, Receive, Scope, Send

from app import errors, events, examples, metrics
from app.auth import KeyCheck
from app.connection import connect, connect_async
from app.evaluations import Evaluations
from app.fronts import a1111, a1111_catalog, fal, openai, replicate
from app.jobs import Jobs
from app.limits import BodyLimit
from app.logs import RequestId
from app.page import routes as page
from app.polls import Polls
from app.routes import evaluations, generations, health, models, status, webhooks
from app.schemas import Problem
from app.settings import Settings
from app.storage import open_store
from models.catalog import Catalog

log = structlog.get_logger()

VERSION = importlib.metadata.version("darkroom")
DESCRIPTION = """Pictures from guided diffusion models: queued durably, drawn together, fetched by id.

Errors are RFC 9457 problem documents; `errors` names each wrong field."""


ROUTES = (  # tried one after another: first what is asked most
    generations,
    health,
    models,
    status,
    evaluations,
    webhooks,
    openai,
    a1111,
    a1111_catalog,
    replicate,
    fal,
    page,
)
DECODERS = 20  # threads for submissions with pictures; AnyIO's 40 are for everything else


class Service(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """With the schema of problem documents: FastAPI knows answers of one media type a route.

        And without its `itemSchema` of a stream's events, which is OpenAPI 3.2 in a document of 3.1; and, where there
        are no API keys, without the word that one is needed.
        """
        document = super().openapi()
        _, problem = models_json_schema([(Problem, "serialization")], ref_template="#/components/schemas/{model}")
        document["components"]["schemas"] |= problem["$defs"]
        watch = document["paths"]["/v1/generations/{id}/events"]["get"]["responses"]["200"]
        watch["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
        if not self.state.settings.api_keys:
            for operation in (it for methods in document["paths"].values() for it in methods.values()):
                operation.pop("security", None)
        examples.put_into(document)
        return document


class HeadAsGet:
    """HEAD wherever there is GET, as RFC 9110 asks: uvicorn leaves the body out. Not of a stream: it may never end."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD" and not scope["path"].endswith("/events"):
            headers = [(name, value) for name, value in scope["headers"] if name != b"range"]  # means nothing to HEAD
            scope = {**scope, "method": "GET", "headers": headers}
        await self.app(scope, receive, send)


def create_app(settings: Settings, redis_url: str) -> FastAPI:
    """The service for these settings; connects to Redis when it is first asked something."""
    connection = connect(redis_url, settings.redis_timeout)
    catalog = Catalog.read(settings.models, settings.cards_dir)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        log.info("api_starts", models=catalog.names, blobs=settings.blobs.partition("://")[0])
        listening = redis.asyncio.Redis.from_url(
            redis_url,
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.exceptions.ConnectionError,)),
            socket_connect_timeout=settings.redis_timeout,
            socket_timeout=events.PATIENCE + settings.redis_timeout,
            max_connections=settings.max_listeners,  # one each; redis-py's own limit is 100
        )
        app.state.listeners = events.Listeners(listening, settings.max_listeners)
        app.state.polls = Polls(polling := connect_async(redis_url, settings.redis_timeout), app.state.jobs)
        yield
        await polling.aclose()
        await listening.aclose()
        connection.close()

    app = Service(title="Darkroom", version=VERSION, description=DESCRIPTION, lifespan=lifespan, redirect_slashes=False)
    app.state.settings = settings
    # Who brings a picture waits for its turn to be decoded in a thread of these, not in one that others poll with.
    app.state.decoders = anyio.CapacityLimiter(DECODERS)
    app.state.jobs = Jobs(connection, open_store(settings.blobs), catalog, settings)
    app.state.evaluations = Evaluations(connection, app.state.jobs)
    silence = settings.client_timeout.total_seconds()
    app.state.shapes = shapes = errors.Shapes(
        {"/v1/images/": openai.error_response, "/sdapi/": a1111.error_response, "/fal/": fal.error_response}
    )
    largest = int(settings.max_body_mib * 2**20)
    app.add_middleware(BodyLimit, largest=largest, silence=silence, shapes=shapes)
    app.add_middleware(KeyCheck, keys=settings.api_keys, shapes=shapes)
    app.add_middleware(HeadAsGet)
    app.add_middleware(RequestId)
    errors.install(app)
    for routes in ROUTES:
        app.include_router(routes.router)
    metrics.started(VERSION, catalog.names)
    return app
