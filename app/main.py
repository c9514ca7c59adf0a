"""The HTTP front end."""

import importlib.metadata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import redis.asyncio
import structlog
from fastapi import FastAPI
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app import errors, metrics
from app.jobs import Jobs
from app.limits import BodyLimit
from app.routes import generations, health, models
from app.settings import Settings
from app.storage import open_store
from models.catalog import Catalog

log = structlog.get_logger()

VERSION = importlib.metadata.version("darkroom")
DESCRIPTION = """Pictures from guided diffusion models: queued durably, drawn together, fetched by id.

Errors are RFC 9457 problem documents; `errors` names each wrong field."""


def create_app(settings: Settings, redis_url: str) -> FastAPI:
    """The service for these settings; connects to Redis when it is first asked something."""
    timeout = {"socket_timeout": settings.redis_timeout, "socket_connect_timeout": settings.redis_timeout}
    connection = Redis.from_url(redis_url, retry=Retry(NoBackoff(), 1), **timeout)
    catalog = Catalog.read(settings.models, settings.cards_dir)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        log.info("api_starts", models=catalog.names, blobs=settings.blobs.partition("://")[0])
        listening = redis.asyncio.Redis.from_url(
            redis_url, socket_timeout=None, socket_connect_timeout=settings.redis_timeout
        )
        app.state.listening = listening
        yield
        await listening.aclose()
        connection.close()

    app = FastAPI(title="Darkroom", version=VERSION, description=DESCRIPTION, lifespan=lifespan)
    app.state.settings = settings
    app.state.jobs = Jobs(connection, open_store(settings.blobs), catalog, settings)
    app.add_middleware(BodyLimit, largest=int(settings.max_body_mib * 2**20))
    errors.install(app)
    for routes in (generations, models, health):
        app.include_router(routes.router)
    metrics.started(VERSION)
    return app
