"""HTTP by hand over asyncio sockets: what no polite client does (leave, stall, send half), and little overhead."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

LIMIT = 1 << 24  # bytes of one line


class Exchange:
    """One request on a connection of its own: `exchange = await Exchange.open(url, "/v1/models")`.

    `done`: whether a stream ended in [DONE].
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False

    @classmethod
    async def open(
        cls,
        url: str,
        path: str,
        body: Any = None,
        key: str | None = None,
        method: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Exchange:
        """Send a request (a body that is not bytes goes as JSON) and read the reply's head."""
        host = urlsplit(url)
        reader, writer = await asyncio.open_connection(host.hostname, host.port, limit=LIMIT)
        self = cls(reader, writer)
        try:
            data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
            head = {
                "Host": host.netloc,
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                "Connection": "close",
                **({"Authorization": f"Bearer {key}"} if key else {}),
                **(headers or {}),
            }
            lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1"]
            lines += [f"{name}: {value}" for name, value in head.items()]
            writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + data)
            await writer.drain()
            await self.head()
        except BaseException:
            self.abort()
            raise
        return self

    async def head(self) -> None:
        """Read the status and the headers (names in lower case)."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}

    async def blocks(self) -> AsyncIterator[bytes]:
        """The body as it comes; ConnectionError where it ends before its end."""
        try:
            if self.headers.get("transfer-encoding", "").lower() == "chunked":
                while size := int(await self.reader.readline() or b"-1", 16):
                    if size < 0:
                        raise ConnectionResetError("the reply ended inside its body")
                    yield (await self.reader.readexactly(size + 2))[:-2]
            elif "content-length" in self.headers:
                yield await self.reader.readexactly(int(self.headers["content-length"]))
            else:
                while block := await self.reader.read(65536):
                    yield block
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("the reply ended inside its body") from error

    async def body(self) -> bytes:
        """The whole body; the connection is closed then."""
        try:
            return b"".join([block async for block in self.blocks()])
        finally:
            await self.close()

    async def json(self) -> Any:
        """The whole body, parsed."""
        return json.loads(await self.body())

    async def events(self) -> AsyncIterator[Any]:
        """The data of server-sent events, parsed, up to [DONE] (an `event: error` has an "error" in its data)."""
        held = b""
        async for block in self.blocks():
            held = (held + block).replace(b"\r\n", b"\n")
            *whole, held = held.split(b"\n\n")
            for event in whole:
                data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
                if data == b"[DONE]":
                    self.done = True
                elif data:
                    assert not self.done, f"an event after [DONE]: {data!r}"
                    yield json.loads(data)
        assert not held.strip(), f"half an event at the end: {held!r}"

    def abort(self) -> None:
        """Drop the connection at once, without a goodbye."""
        self.writer.transport.abort()

    async def close(self) -> None:
        """Close the connection."""
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            pass


async def post(url: str, path: str, body: Any, key: str | None = None) -> tuple[int, Any]:
    """(status, parsed reply) of one POST."""
    exchange = await Exchange.open(url, path, body, key)
    return exchange.status, await exchange.json()


def text_of(event: dict[str, Any]) -> str:
    """The answer's text in a completion, a chat completion, or a chunk of either."""
    parts = []
    for choice in event.get("choices", ()):
        message = choice.get("delta") or choice.get("message") or choice
        parts.append(message.get("content") or message.get("text") or "")
    return "".join(parts)


def finish_of(event: dict[str, Any]) -> str | None:
    """The finish reason in a completion or chunk."""
    return next((c["finish_reason"] for c in event.get("choices", ()) if c.get("finish_reason")), None)
