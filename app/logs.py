"""Structured logs: JSON for machines, colours for people. One line an event, with the generation's id if it has one."""

import logging
import re
import sys

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.settings import Settings


def set_up(settings: Settings) -> None:
    """Route everything, the libraries' own logging included, through one format on standard error."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Tracebacks as plain text: without the values of variables, which are prompts and whole tensors.
    last: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if as_json
        else [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level.upper()),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(handlers=[handler], level=settings.log_level.upper(), force=True)
    for chatty in ("rq", "httpx2", "uvicorn.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Each process that imports diffusers is told that torchvision, which we do not use, is missing.
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)


class RequestId:
    """A request's `X-Request-ID` in every line that is logged for it, unless it could spoil the log."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            id = Headers(scope=scope).get("x-request-id", "")
            if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", id):
                # It stays bound: a bug is logged further out. Each request is a task, with a context of its own.
                structlog.contextvars.bind_contextvars(request_id=id)
        await self.app(scope, receive, send)
