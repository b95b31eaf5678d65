"""What every request passes before it is answered: key, Host and Origin; and what sees how it ended."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .failures import APIError, as_api_error
from .service import Service, log, report

GONE = 499  # for the log and the metrics: the client left before the answer began


class Gate:
    """ASGI middleware. public: paths open to those without a key; they serve while models load, too."""

    def __init__(self, app: ASGIApp, service: Service, public: Collection[str], known: Collection[str]) -> None:
        self.app, self.service, self.public, self.known = app, service, public, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        start, status, head = time.perf_counter(), 0, scope["method"] == "HEAD"

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif head:
                message = {**message, "body": b""}
            await send(message)

        if head:  # answered as GET, less the body
            scope = {**scope, "method": "GET"}
        try:
            try:
                self.check(Request(scope))
            except APIError as error:
                await JSONResponse(error.body(), error.status, error.headers)(scope, receive, watched)
            else:
                await self.app(scope, receive, watched)
        except Exception as error:
            if not status:  # else it is told and reported already
                report(error)
                failed = as_api_error(error)
                await JSONResponse(failed.body(), failed.status, failed.headers)(scope, receive, watched)
        finally:
            path = scope["path"] if scope["path"] in self.known else "other"
            self.service.metrics.requests.labels(path, str(status or GONE)).inc()
            if self.service.settings.verbose:
                self._log(scope, status, time.perf_counter() - start)

    def check(self, request: Request) -> None:
        """APIError 401 or 403 for those who may not, 503 for those who come too early or too late."""
        service, settings = self.service, self.service.settings
        if settings.api_keys:
            if request.scope["path"] not in self.public and not self._has_key(request):
                raise APIError(
                    401, "the API key is missing or wrong: send Authorization: Bearer KEY",
                    "authentication_error", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        elif not settings.insecure:
            _check_host(request)
            _check_origin(request, settings.cors)
        if request.scope["path"] not in self.public:
            service.check_ready()

    def _has_key(self, request: Request) -> bool:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return self.service.knows(key.strip().encode("latin-1")) and scheme.lower() == "bearer"

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        client = (scope.get("client") or ("-",))[0]
        path = scope.get("raw_path", b"").decode("ascii", "replace")
        log(f"{client} {scope['method']} {path} {status or GONE} {seconds:.3f} s")


def _check_host(request: Request) -> None:
    """A page anywhere may make its own name mean 127.0.0.1 and then read what is served there: not under that name."""
    host = request.headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname or "localhost"
        if name != "localhost" and not name.endswith(".localhost"):
            ipaddress.ip_address(name)
    except ValueError:
        raise APIError(
            403, f"Host: got {host!r:.80}, and without an API key this server answers to localhost and addresses only; "
            "start it with --api-key, or with --insecure", "permission_error", code="unknown_host",
        ) from None  # fmt: skip


def _check_origin(request: Request, allowed: Collection[str]) -> None:
    """A page anywhere may send requests here, though not read the answers: so that it costs no computing time."""
    origin = request.headers.get("origin")
    if origin is None or origin in allowed or "*" in allowed:
        return
    if origin.partition("://")[2] != request.headers.get("host"):
        raise APIError(
            403, f"Origin: got {origin!r:.80}, a page that this server was not told to serve; start it with "
            "--cors ORIGIN, with --api-key, or with --insecure", "permission_error", code="unknown_origin",
        )  # fmt: skip
