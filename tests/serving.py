"""A server of the package's own in this process, on a free port, over an LLM that is there already."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import fakes
import httpx

from hotcold.runtime.llm import LLM
from hotcold.runtime.server.process import Server, bind
from hotcold.runtime.server.service import Service, Settings

USER = [{"role": "user", "content": "hi"}]


def make(*arguments: Any, **options: Any) -> LLM:
    """fakes.make's LLM, with what the server asks of a model besides."""
    llm = fakes.make(*arguments, **options)
    vars(llm.config).update(arch="fake", name="fake", n_ctx_train=200, n_embd=2)
    llm.engine.cache = SimpleNamespace(n_blocks=7, n_used=0, n_idle=0)  # type: ignore[assignment]
    return llm


class Serving:
    """A running server: its service, a client for it, its port."""

    def __init__(self, service: Service, server: Server, port: int, thread: threading.Thread) -> None:
        self.service, self.server, self.port, self.thread = service, server, port, thread
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def chat(self, **more: Any) -> httpx.Response:
        """POST /v1/chat/completions, greedily."""
        return self.client.post("/v1/chat/completions", json={"messages": USER, "temperature": 0, **more})

    def stop(self) -> None:
        """As after a signal; returns when the server has ended."""
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@contextmanager
def serving(
    models: Mapping[str, LLM | None] | None = None, send_buffer: int | None = None, **options: Any
) -> Iterator[Serving]:
    """Serve `models` (None: one that is loading; default: `m`, which says Hello), with fields of Settings.

    send_buffer: bytes that the system may hold for a client.
    """
    chosen = Settings(port=0, **options)
    if models is None:
        models = {"m": make(fakes.saying(fakes.HEL, fakes.LO), n_parallel=4)}
    service = Service(list(models), chosen)
    for name, llm in models.items():
        if llm is not None:
            service.put(name, llm)
    server, listener = Server(service), bind(chosen)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    running = Serving(service, server, listener.getsockname()[1], thread)
    try:
        yield running
    finally:
        running.client.close()
        running.stop()
        for llm in models.values():
            if llm is not None:
                llm.close()
