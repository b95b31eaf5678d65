"""The server's process: the port, signals, models that load beside it, slow clients, the end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...formats.errors import HotcoldError, ParameterError
from ..llm import LLM
from .app import make_app
from .service import Service, Settings

Loader = Callable[[], AbstractContextManager[LLM]]
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
HEADER_S = 30.0  # for the head of a request to come
AFTER_GRACE_S = 5  # for the last words to be sent
MOST_CONNECTIONS = 4096
BACKLOG = 16  # connections that are accepted in one go
WAITING = 1024  # that wait for it
# Files beside those of clients: four rounds of the event loop may accept before the first too many is closed.
OTHER_FILES = 64 + 4 * BACKLOG


def serve(models: Mapping[str, Loader], settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until a signal says to stop; models load in the background meanwhile.

    say: gets the one line that tells that all is ready. Raises ParameterError for a public address without a key,
    HotcoldError for a port that is taken, and whatever made a model fail to load.
    """
    check_exposure(settings)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1)  # what matters, gate.py says
    with bind(settings) as listener, ExitStack() as stack:
        service = Service(list(models), settings)
        server = Server(service)
        loading = _Loading(models, service, stack, server)

        def ready() -> None:
            host, port = listener.getsockname()[:2]
            name = f"[{host}]" if ":" in host else host
            say(f"serving {', '.join(service.names)} at http://{name}:{port}")

        loading.ready = ready
        loading.start()
        server.run(sockets=[listener])
        if loading.error is not None:
            raise loading.error
        if loading.is_alive() or service.busy:  # in a download, a compiler or a tokenizer, which nothing interrupts
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


class _Loading(threading.Thread):
    """Opens the models one after another; the first that fails ends the server."""

    def __init__(
        self, models: Mapping[str, Loader], service: Service, stack: ExitStack, server: Server
    ) -> None:
        super().__init__(name="hotcold-loading", daemon=True)
        self.models, self.service, self.stack, self.server = models, service, stack, server
        self.error: BaseException | None = None
        self.ready: Callable[[], None] = lambda: None

    def run(self) -> None:
        try:
            for name, load in self.models.items():
                self.service.put(name, self.stack.enter_context(load()))
        except BaseException as error:
            self.error = error
            self.server.should_exit = True
        else:
            self.ready()


class Server(uvicorn.Server):
    """uvicorn's, which ends with exit code 0 after a signal, at once after a second, and tells the service before."""

    def __init__(self, service: Service) -> None:
        self.service, settings = service, service.settings

        class Protocol(BoundedProtocol):
            write_timeout = settings.write_timeout
            most = most_connections()

        config = uvicorn.Config(
            make_app(service), http=Protocol, ws="none", loop="asyncio", lifespan="off", log_config=None,
            access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=30,
            timeout_graceful_shutdown=int(settings.grace) + AFTER_GRACE_S, backlog=BACKLOG,
        )  # fmt: skip
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; more may wait for being accepted than are accepted in one go, which asyncio has as one number."""
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(WAITING)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while this runs; unlike uvicorn's own, not once more afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal ends the server in order, the second at once."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, give what runs its time, end."""
        self.service.stop()
        await super().shutdown(sockets)
        self.service.close()


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol, which drops clients that send no whole head or read nothing for too long, or are too many."""

    write_timeout = 60.0
    most = MOST_CONNECTIONS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self.reading: asyncio.TimerHandle | None = None
        self.writing: asyncio.TimerHandle | None = None
        self._expect_head()
        if len(self.connections) > self.most:  # else none could be accepted, and asyncio would log that all the time
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """It has sent something."""
        super().data_received(data)
        self._expect_head()

    def _expect_head(self) -> None:
        """Start the clock, unless it runs, where no request is being answered; else stop it."""
        if self.cycle is not None and not self.cycle.response_complete:
            _stop(self.reading)
            self.reading = None
        elif self.reading is None:
            self.reading = self.loop.call_later(HEADER_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has left."""
        _stop(self.reading)
        _stop(self.writing)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """So much waits for the client that whoever writes must wait, too."""
        super().pause_writing()
        self.writing = self.writing or self.loop.call_later(self.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        _stop(self.writing)
        self.writing = None
        super().resume_writing()


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def most_connections() -> int:
    """How many clients may be connected at once: as many as files may be open, a limit that is raised if it may be."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return MOST_CONNECTIONS
    wanted = MOST_CONNECTIONS + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        return max(1, soft - OTHER_FILES)
    return MOST_CONNECTIONS


def check_exposure(settings: Settings) -> None:
    """ParameterError for an address that others reach, without a key or the word that it is meant so."""
    if not settings.api_keys and not settings.insecure and not _is_loopback(settings.host):
        raise ParameterError(
            f"--host: got {settings.host} without an API key, so that anybody who reaches it may use the model; "
            "give --api-key KEY, or --insecure if that is meant"
        )


def _is_loopback(host: str) -> bool:
    return all(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for _, address in _addresses(host, 0))


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ParameterError(f"--host: got {host!r:.80}, wanted an address of this machine: {reason}") from None
    return [(family, address) for family, _, _, _, address in found]


def bind(settings: Settings) -> socket.socket:
    """A socket that listens; HotcoldError where that cannot be."""
    family, address = _addresses(settings.host, settings.port)[0]
    try:
        return socket.create_server(address, family=family, backlog=WAITING)
    except OSError as error:
        raise HotcoldError(
            f"{settings.host}:{settings.port}: {error.strerror}; choose another with --port (0: any that is free)"
        ) from None
