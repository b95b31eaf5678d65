"""The chat page: the files of the folder page/, each under its own name; no other path leads to a file."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
# not left to the machine's own table, which on some calls JavaScript text/plain
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def add_page(app: FastAPI) -> frozenset[str]:
    """Serve every file of the folder, index.html as /; the paths."""
    files = sorted(path for path in FOLDER.rglob("*") if path.is_file())
    paths = {f"/{path.relative_to(FOLDER).as_posix()}": path for path in files}
    paths["/"] = paths.pop("/index.html")
    for name, path in paths.items():
        app.get(name, include_in_schema=False)(_sender(path))
    return frozenset(paths)


def _sender(path: Path) -> Callable[[Request], Awaitable[Response]]:
    data = path.read_bytes()
    kind = TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    headers = {**HEADERS, "ETag": f'"{hashlib.sha256(data).hexdigest()[:32]}"'}

    async def send(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers, media_type=kind)

    return send
