"""One Reply on its way to a client: whole, or as server-sent events, for as long as both sides are there."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .failures import APIError, as_api_error
from .service import Service, report
from .work import while_wanted

if TYPE_CHECKING:
    from ..replies import Reply

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event; in ASCII, as some clients cut lines at every line separator that Unicode knows."""
    line = f"data: {json.dumps(data, separators=(',', ':'))}\n\n"
    return (f"event: {name}\n{line}" if name else line).encode()


class Encoder(Protocol):
    """What makes bytes of one reply."""

    def events(self, chunks: AsyncIterator[dict[str, Any]]) -> AsyncGenerator[bytes, None]:
        """Of its chunks."""

    def failure(self, failed: APIError) -> bytes:
        """Of the error that ends it."""


class Chunks:
    """Chunks as OpenAI streams them, up to [DONE] or an error."""

    async def events(self, chunks: AsyncIterator[dict[str, Any]]) -> AsyncGenerator[bytes, None]:
        """Of its chunks."""
        async for chunk in chunks:
            yield event(chunk)
        yield DONE

    def failure(self, failed: APIError) -> bytes:
        """Of the error that ends it."""
        return event(failed.body())


class Answering(Response):
    """On its way to a client, until it is complete, the client leaves, or the server cannot wait for it any longer."""

    def __init__(self, service: Service) -> None:
        self.service, self.background = service, None
        self.ended = asyncio.Event()

    @property
    def waits(self) -> bool:
        """Whether nothing has been done for it yet."""
        return False

    def end(self) -> None:
        """End it: the server shuts down."""
        self.ended.set()

    def close(self) -> None:
        """Let go what was done for it."""

    async def send(self, receive: Receive, send: Send) -> None:
        """Send it."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.service.live.add(self)
        try:
            if self.service.over or (self.service.stopping and self.waits):
                self.end()
            await self.send(receive, send)
        except ClientDisconnect:
            pass  # nobody is left to be told
        finally:
            self.service.live.discard(self)
            self.close()

    async def while_wanted(self, work: Awaitable[T], receive: Receive) -> T:
        """What `work` returns; ClientDisconnect, or APIError 503, when one side no longer wants to wait."""
        return await while_wanted(work, self.ended, receive)


class OfReply(Answering):
    """What comes of one started Reply."""

    def __init__(self, service: Service, model: str, reply: Reply) -> None:
        super().__init__(service)
        self.model, self.reply = model, reply

    @property
    def waits(self) -> bool:
        """Whether all its answers are in the queue."""
        return all(choice.answer.waits for choice in self.reply.choices)

    def close(self) -> None:
        """Free its places at once."""
        self.reply.close()
        ran = [choice for choice in self.reply.choices if choice.answer.stats.prompt_s or choice.answer.tokens]
        if ran:
            self.service.metrics.asked(self.model, self.reply.usage(ran))
        for choice in ran:
            self.service.metrics.answered(self.model, choice.answer.stats)


class Whole(OfReply):
    """The reply as one JSON object; `shape` makes it of the completion."""

    def __init__(
        self, service: Service, model: str, reply: Reply, shape: Callable[[dict[str, Any]], dict[str, Any]] = dict
    ) -> None:
        super().__init__(service, model, reply)
        self.shape = shape

    async def send(self, receive: Receive, send: Send) -> None:
        found = await self.while_wanted(self.reply.awhole(), receive)
        await send_json(self.shape(found), send)


class Stream(OfReply):
    """The reply as server-sent events; an error before the first is an HTTP status, later it is an event."""

    def __init__(self, service: Service, model: str, reply: Reply, encoder: Encoder | None = None) -> None:
        super().__init__(service, model, reply)
        self.encoder = encoder or Chunks()

    async def send(self, receive: Receive, send: Send) -> None:
        self.started, self.sending, self.latest, self.put = False, False, time.monotonic(), send
        beat = asyncio.ensure_future(self._beat())
        try:
            await self.while_wanted(self._write(), receive)
        except Exception as error:
            if isinstance(error, ClientDisconnect) or not self.started:
                raise
            failed = as_api_error(error)
            if failed.status == 500:
                report(error)
            await self._put(self.encoder.failure(failed))
        finally:
            beat.cancel()
        await self._put(b"", more=False)

    async def _write(self) -> None:
        async with aclosing(self.encoder.events(self.reply.achunks())) as found:
            async for data in found:
                await self._put(data)

    async def _beat(self) -> None:
        """A comment whenever nothing was said for a while, so that nobody in between takes the line for dead."""
        pause = self.service.settings.keep_alive
        while True:
            await asyncio.sleep(self.latest + pause - time.monotonic())
            if self.sending:
                self.latest = time.monotonic()
            elif self.latest + pause <= time.monotonic():
                await self._put(b": still at it\n\n")

    async def _put(self, data: bytes, more: bool = True) -> None:
        self.sending = True
        try:
            if not self.started:
                self.started = True
                await self.put({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await self.put({"type": "http.response.body", "body": data, "more_body": more})
        finally:
            self.sending, self.latest = False, time.monotonic()


async def send_json(data: Any, send: Send) -> None:
    """Status 200 and JSON; large data is encoded beside the event loop."""
    response = await asyncio.to_thread(JSONResponse, data)
    await send({"type": "http.response.start", "status": 200, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})
