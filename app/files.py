"""Bytes that never change, as browsers and proxies like them: ETag, 304, Range, and headers that make them safe."""

import re
from collections.abc import Callable

from fastapi import Request, Response

from app.errors import NotFound, RangeNotSatisfiable


def file_response(request: Request, open_file: Callable[[], bytes], media_type: str, etag: str, name: str) -> Response:
    """The file, a part of it, or the word that the client has it already.

    Raises:
        NotFound: its bytes have gone.
        RangeNotSatisfiable: it is shorter than that.
    """
    headers = {
        "ETag": f'"{etag}"',
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Disposition": f'inline; filename="{name}"',
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Accept-Ranges": "bytes",
    }
    if matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    try:
        data = open_file()
    except FileNotFoundError:
        raise NotFound("the picture has gone: it was kept as long as its generation") from None
    wanted = request.headers.get("range")
    if not wanted or request.headers.get("if-range", f'"{etag}"') != f'"{etag}"':
        return Response(data, media_type=media_type, headers=headers)
    return part(data, wanted, media_type, headers)


def matches(if_none_match: str | None, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    return f'"{etag}"' in tags or "*" in tags


def part(data: bytes, wanted: str, media_type: str, headers: dict[str, str]) -> Response:
    """RFC 9110, 14.2: one range of bytes. Of several, or of another unit, we send the whole, as we may."""
    asked = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", wanted.strip())
    if asked is None or asked.groups() == ("", ""):
        return Response(data, media_type=media_type, headers=headers)
    first, last = asked.groups()
    if first:
        begin, end = int(first), min(int(last), len(data) - 1) if last else len(data) - 1
    else:
        begin, end = max(0, len(data) - int(last)), len(data) - 1
    if begin > end:
        whole = f"bytes */{len(data)}"
        raise RangeNotSatisfiable(f"the picture has {len(data)} bytes", headers={"Content-Range": whole})
    headers |= {"Content-Range": f"bytes {begin}-{end}/{len(data)}"}
    return Response(data[begin : end + 1], 206, headers, media_type)
