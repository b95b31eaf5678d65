"""Errors as HTTP: one table from hotcold's exceptions to a status, and OpenAI's shape for all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from ...formats import errors

RETRY_S = 1  # said with a 503 that may pass: a model that loads, a server that restarts


class APIError(Exception):
    """An answer that is an error: status, OpenAI's type and code, the parameter at fault, headers."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


# The first row whose class fits: (exception, status, OpenAI's type, code).
TABLE: tuple[tuple[type[BaseException], int, str, str | None], ...] = (
    (errors.ContextLengthError, 400, "invalid_request_error", "context_length_exceeded"),
    (errors.ParameterError, 400, "invalid_request_error", None),
    (errors.UnsupportedError, 400, "invalid_request_error", "unsupported"),
    (errors.TemplateError, 400, "invalid_request_error", "template_error"),
    (errors.ModelNotFoundError, 404, "invalid_request_error", "model_not_found"),
    (errors.BusyError, 429, "rate_limit_error", "queue_full"),
    (errors.ClosedError, 503, "server_error", "shutting_down"),
    (errors.HotcoldError, 500, "server_error", None),
    (MemoryError, 503, "server_error", "out_of_memory"),
)
_PARAM = re.compile(r"([a-z_]+(?:\[\d+\]|\.[a-z_]+)*):")


def shutting_down() -> APIError:
    """What those hear whom a server that ends can no longer serve."""
    return APIError(
        503, "the server is shutting down", "server_error", code="shutting_down", headers={"Retry-After": str(RETRY_S)}
    )


def unknown_model(name: str, known: list[str]) -> APIError:
    """OpenAI's answer to a model that is not there."""
    return APIError(
        404, f"model: got {name!r:.80}, served here: {', '.join(known)}", param="model", code="model_not_found"
    )


def as_api_error(error: BaseException) -> APIError:
    """What a client is told about an exception; nothing about the inside of those that are bugs."""
    if isinstance(error, APIError):
        return error
    for kind, status, name, code in TABLE:
        if isinstance(error, kind):
            text = " ".join(str(error).split()) or HTTPStatus(status).phrase
            found = _PARAM.match(text) if status == 400 else None
            wait = getattr(error, "retry_after", RETRY_S)
            headers = {"Retry-After": str(wait)} if status in (429, 503) else {}
            return APIError(status, text, name, found[1] if found else None, code, headers)
    return APIError(500, "an error inside the server; its log says more", "server_error", code="internal_error")
