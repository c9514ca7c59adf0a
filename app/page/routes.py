"""The playground at `/`: a page of ES modules without a build step, which asks the API that everybody asks.

The page is public; what it shows is what its visitor's key may see.
"""

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response

from app.errors import NotFound
from app.files import matches

STATIC = Path(__file__).parent / "static"
FILES = {path.relative_to(STATIC).as_posix(): path for path in STATIC.rglob("*") if path.is_file()}
MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob:",  # videos
        "connect-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)

router = APIRouter(include_in_schema=False)


@router.get("/")
def playground(request: Request) -> Response:
    """The page itself."""
    return page_file(request, "index.html")


@router.get("/status")
def status(request: Request) -> Response:
    """Workers and queues, live."""
    return page_file(request, "status.html")


@router.get("/page/{name:path}")
def file(name: str, request: Request) -> Response:
    """What the page is made of."""
    if name not in FILES:
        raise NotFound(f"the page has no file {name[:64]!r}")
    return page_file(request, name)


def page_file(request: Request, name: str) -> Response:
    """A file that the next release changes: browsers keep it, and ask whether it is still so."""
    data = FILES[name].read_bytes()
    etag = hashlib.sha256(data).hexdigest()[:32]
    headers = {
        "ETag": f'"{etag}"',
        "Cache-Control": "no-cache",
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
    }
    if matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    media_type = MEDIA_TYPES.get(FILES[name].suffix, "text/plain")
    return Response(data, media_type=media_type, headers=headers)
