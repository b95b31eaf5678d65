"""What all requests share: the settings, the models and whether they load, serve or stop, the figures."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from starlette.types import Receive

from ...formats.errors import HotcoldError
from .bodies import Room
from .failures import RETRY_S, APIError, shutting_down, unknown_model
from .metrics import Metrics
from .work import Workers, while_wanted

if TYPE_CHECKING:
    from ..llm import LLM

T = TypeVar("T")
MIB = 1 << 20
EMBEDDING = 4  # requests for embeddings at work at once, which take turns
PREPARING = 4  # prompts that are cut, or grammars that are compiled, at once


class Ending(Protocol):
    """Something on its way to a client, that can be ended."""

    @property
    def waits(self) -> bool:
        """Whether nothing has been done for it yet."""

    def end(self) -> None:
        """End it, and say why."""


@dataclass(frozen=True)
class Settings:
    """How to serve; seconds and bytes. api_keys: any of them opens the door; none: no key is asked for.

    insecure: serve whoever reaches the port, whatever Host and Origin it names. cors: origins whose pages may call.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    insecure: bool = False
    grace: float = 30.0
    verbose: bool = False
    max_body: int = 16 * MIB
    max_bodies: int = 256 * MIB  # of all that are coming
    n_queue: int = 64  # requests for embeddings, or to /tokenize, that may wait; answers wait in their model's queue
    keep_alive: float = 5.0  # a stream that has nothing to say says so this often
    write_timeout: float = 60.0  # how long a client may read nothing of what waits for it


class Service:
    """One server's state; all but `put` happens on its event loop."""

    def __init__(self, names: Sequence[str], settings: Settings) -> None:
        self.names, self.settings = list(names), settings
        self.models: dict[str, LLM] = {}
        self.created = int(time.time())
        self.room = Room(settings.max_bodies)
        self.stops, self.ends = asyncio.Event(), asyncio.Event()
        self.live: set[Ending] = set()
        self.embedding = Workers(EMBEDDING, "hotcold-embed", EMBEDDING + settings.n_queue)
        self.metrics = Metrics(self.models)
        self._preparing = Workers(PREPARING, "hotcold-prepare")
        self._tokenizing = Workers(1, "hotcold-tokenize", 1 + settings.n_queue)
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]

    def put(self, name: str, llm: LLM) -> None:
        """A model has loaded (from any thread)."""
        self.models[name] = llm

    @property
    def stopping(self) -> bool:
        """Whether nothing new is begun."""
        return self.stops.is_set()

    @property
    def over(self) -> bool:
        """Whether the grace time is over."""
        return self.ends.is_set()

    @property
    def status(self) -> str:
        """loading, ok or stopping."""
        if self.stopping:
            return "stopping"
        return "ok" if len(self.models) == len(self.names) else "loading"

    def check_ready(self) -> None:
        """APIError 503 unless all models are there and the server goes on."""
        if self.status == "loading":
            headers = {"Retry-After": str(RETRY_S)}
            raise APIError(503, "the model is still loading", "server_error", code="loading", headers=headers)
        if self.status == "stopping":
            raise shutting_down()

    def pick(self, name: str | None) -> tuple[str, LLM]:
        """The model of a request and its name here; APIError 404. Where one is served, any name means it."""
        if name in self.models:
            return name, self.models[name]
        if len(self.names) == 1:
            return self.names[0], self.models[self.names[0]]
        if not name:
            raise APIError(400, f"model: got none, wanted one of {', '.join(self.names)}", param="model")
        raise unknown_model(name, self.names)

    async def prepare(self, receive: Receive, llm: LLM, open: Callable[..., T], given: dict[str, Any]) -> T:
        """The reply that `open`, of this model, makes of a request, beside the event loop; not once the server stops.

        BusyError where as many are being prepared as may run and wait; ClientDisconnect for a client that has left.
        """
        n_queue = llm.scheduler.n_queue
        most = llm.scheduler.n_parallel + (self.settings.n_queue if n_queue is None else n_queue)
        return await while_wanted(self._preparing.run(partial(open, **given), most), self.stops, receive)

    async def tokenize(self, receive: Receive, call: Callable[..., T], *arguments: Any) -> T:
        """What `call` returns, after others' of this kind: however long the texts are, nobody else waits for them."""
        return await while_wanted(self._tokenizing.run(partial(call, *arguments)), self.ends, receive)

    def knows(self, key: bytes) -> bool:
        """Whether this is one of the keys, in a time that tells nothing about them."""
        given = hashlib.sha256(key).digest()
        return sum(hmac.compare_digest(given, wanted) for wanted in self._keys) > 0

    def stop(self) -> None:
        """Take nothing more, and end what waits; what runs has the grace time."""
        self.stops.set()
        if self.live:
            log(f"ends, and waits up to {self.settings.grace:g} s for what runs; a second signal ends it at once")
        for one in list(self.live):
            if one.waits:
                one.end()
        asyncio.get_running_loop().call_later(self.settings.grace, self._end)

    def _end(self) -> None:
        self.ends.set()
        for one in list(self.live):
            one.end()

    def close(self) -> None:
        """End the threads that work for this server."""
        for workers in self._workers:
            workers.close()

    @property
    def busy(self) -> bool:
        """Whether there is still a thread that works for nobody."""
        return any(workers.busy for workers in self._workers)

    @property
    def _workers(self) -> tuple[Workers, ...]:
        return self.embedding, self._preparing, self._tokenizing


def log(line: str) -> None:
    """One line of the server's log, on stderr."""
    print(f"hotcold: {line}", file=sys.stderr, flush=True)


def report(error: BaseException) -> None:
    """One line about an error that no client caused; HOTCOLD_DEBUG=1 shows where it came from."""
    if os.environ.get("HOTCOLD_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, HotcoldError):
        text = str(error)
    else:
        text = f"a bug: {type(error).__name__}: {error}; HOTCOLD_DEBUG=1 shows where, please report it"
    log(f"error: {' '.join(text.split())}")
