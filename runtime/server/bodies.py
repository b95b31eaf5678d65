"""The body of a request: read with bounds, parsed with bounds, checked against a schema."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from .failures import RETRY_S, APIError

MAX_DEPTH = 64  # of lists and objects within each other: templates and schemas walk them by recursion
MAX_VALUES = 1 << 20  # one byte of JSON may cost a hundred of Python's
IDLE_S, TOTAL_S = 30.0, 600.0  # between two pieces of a body, and for all of it
LINGER = 8  # times the limit are read and thrown away, so that a client that writes first reads the refusal
THREAD_BYTES = 1 << 14  # bodies above are parsed beside the event loop

M = TypeVar("M", bound=BaseModel)


class Room:
    """Memory for all bodies that are being read and parsed, in bytes."""

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """A function that takes so many bytes more, until the block ends; APIError 429 where they are not there."""
        taken = 0

        def take(n: int) -> None:
            nonlocal taken
            if self.used + n > self.size:
                raise APIError(
                    429, f"body: those that are coming now have {self.size} bytes, which is the most; ask again later",
                    "rate_limit_error", code="too_many_bodies",
                    headers={"Retry-After": str(RETRY_S), "Connection": "close"},
                )  # fmt: skip
            self.used += n
            taken += n

        try:
            yield take
        finally:
            self.used -= taken


async def read(request: Request, limit: int, take: Callable[[int], None] = lambda n: None) -> bytes:
    """All of the body; APIError 413 past `limit` bytes, 408 where it does not come. take: asked before more is kept."""
    announced = request.headers.get("content-length", "")
    length = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
    too_large = APIError(
        413, f"body: got more than {limit} bytes, which is the limit", code="request_too_large",
        headers={"Connection": "close"},
    )  # fmt: skip
    if length > limit and (length > LINGER * limit or "expect" in request.headers):
        raise too_large
    parts, size, end = bytearray(), 0, time.monotonic() + TOTAL_S
    while True:
        try:
            message = await asyncio.wait_for(request.receive(), min(IDLE_S, end - time.monotonic()))
        except asyncio.TimeoutError:
            raise APIError(
                408, f"body: got {size} bytes, and then nothing for {IDLE_S:g} s, or not all in {TOTAL_S:g} s",
                code="request_timeout", headers={"Connection": "close"},
            ) from None  # fmt: skip
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        size += len(piece)
        if size <= limit:
            take(len(piece))
            parts += piece
        elif parts:
            parts = bytearray()
        more = message.get("more_body", False)
        if size > limit and (not more or size > LINGER * limit):
            raise too_large
        if not more:
            return bytes(parts)


async def receive(request: Request, schema: type[M], limit: int, room: Room) -> tuple[M, dict[str, Any]]:
    """The body as its schema and, of the fields that it or the library knows, as plain values; APIError where wrong."""
    with room.share() as take:
        raw = await read(request, limit, take)
        if len(raw) > THREAD_BYTES:
            return await asyncio.to_thread(checked, raw, schema)
        return checked(raw, schema)


def checked(raw: bytes, schema: type[M]) -> tuple[M, dict[str, Any]]:
    """The same, of bytes that are here already."""
    data = parse(raw)
    try:
        model = schema.model_validate(data)
    except ValidationError as error:
        raise _invalid(error, data) from None
    names = (*schema.model_fields, *getattr(schema, "refused", ()))
    return model, {name: data[name] for name in names if name in data}


def parse(raw: bytes) -> dict[str, Any]:
    """A JSON object; APIError 400 for anything else, for depth, for text that no UTF-8 can hold."""
    if not raw.strip():
        raise _malformed("the body is empty, wanted a JSON object")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _malformed(f"the body is no valid UTF-8 at byte {error.start}") from None
    depth, values = _measure(raw)
    if depth > MAX_DEPTH:
        raise _malformed(f"the body nests {depth} levels deep, the limit is {MAX_DEPTH}")
    if values > MAX_VALUES:
        raise _malformed(f"the body has more than {MAX_VALUES} values, which is the limit")
    try:
        data = json.loads(text, parse_constant=_refuse_constant, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"the body is no valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise _malformed(f"the body is a {type(data).__name__}, wanted a JSON object")
    if b"\\ud" in raw.lower():
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _malformed("the body has half of a surrogate pair (\\ud800 to \\udfff) alone") from None
    return data


def _measure(raw: bytes) -> tuple[int, int]:
    """How deep brackets nest, and about how many values there are, strings left out; time and memory are linear."""
    if b"\\" in raw:  # only strings have them, and a pair of them escapes nothing
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    codes = np.frombuffer(raw, np.uint8)
    outside = np.bitwise_xor.accumulate((codes == ord('"')).view(np.uint8)) == 0
    marks = codes[outside]
    opens, closes = (marks == ord("[")) | (marks == ord("{")), (marks == ord("]")) | (marks == ord("}"))
    count = int(np.count_nonzero(opens))
    steps = opens.view(np.int8) - closes.view(np.int8)
    depth = int(np.cumsum(steps[steps != 0], dtype=np.int32).max(initial=0))
    return depth, count + int(np.count_nonzero(marks == ord(",")))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _number(text: str) -> float:
    """A number with a point or an exponent; 1.0 is an integer, as JSON schemas have it."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _malformed(message: str) -> APIError:
    return APIError(400, message, code="invalid_json")


def _invalid(error: ValidationError, data: Any) -> APIError:
    """One line on the first field that is wrong; of a union's complaints, those that got farthest into it."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    field = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
    paths = [_path(one["loc"], data, one["type"] == "missing") for one in field]
    where = max(paths, key=lambda path: path.count("[") + path.count("."))
    wanted = dict.fromkeys(one["msg"] for one, path in zip(field, paths, strict=True) if path == where)
    text = "; or: ".join([*wanted][:4])
    return APIError(400, f"{where}: {text}" if where else text, param=where or None, code="invalid_value")


def _path(loc: tuple[str | int, ...], data: Any, missing: bool) -> str:
    """A place in the body, such as messages[0].role, without the names of a union's branches."""
    text = ""
    for step in loc[:-1] if missing else loc:
        if isinstance(step, int) and isinstance(data, list) and step < len(data):
            text, data = f"{text}[{step}]", data[step]
        elif isinstance(step, str) and isinstance(data, dict) and step in data:
            text, data = f"{text}.{step}" if text else step, data[step]
    return f"{text}.{loc[-1]}".lstrip(".") if missing else text
