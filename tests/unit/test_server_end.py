"""The server's end, and work beside its event loop: in every state of a request, and whatever threads are at."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import httpx
import numpy as np
import pytest
from serving import Serving, make, serving

from hotcold.formats.errors import BusyError, ClosedError, ContextLengthError
from hotcold.runtime.server.work import Workers


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


def workers() -> list[str]:
    return [
        thread.name for thread in threading.enumerate()
        if thread.name.startswith(("hotcold-prepare", "hotcold-embed", "hotcold-tokenize"))
    ]  # fmt: skip


class Held:
    """A callable that does not return before it may; `n` calls are in it."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.n, self.total, self.may = call, 0, 0, threading.Event()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.n += 1
        self.total += 1
        try:
            self.may.wait(60)
            return self.call(*arguments, **named)
        finally:
            self.n -= 1


@contextmanager
def held(llm: Any, name: str, **options: Any) -> Iterator[tuple[Serving, Held]]:
    """A server whose model takes its time in the method `name`."""
    method = Held(getattr(llm, name))
    setattr(llm, name, method)
    with serving({"m": llm}, **options) as running:
        try:
            yield running, method
        finally:
            method.may.set()


def shut_down(response: httpx.Response) -> bool:
    return response.status_code == 503 and response.json()["error"]["code"] == "shutting_down"


def test_the_end_answers_those_whose_bodies_are_still_coming() -> None:
    with serving(grace=60) as running, socket.create_connection(("127.0.0.1", running.port)) as raw:
        raw.settimeout(20)
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        until(lambda: bool(running.server.server_state.tasks))
        running.server.should_exit = True
        head, _, body = b"".join(iter(lambda: raw.recv(65536), b"")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503") and b"application/json" in head
        assert json.loads(body)["error"]["code"] == "shutting_down"
        running.stop()


def test_the_end_does_not_wait_for_what_is_being_prepared() -> None:
    with held(make(), "open_chat", grace=60) as (running, opening), ThreadPoolExecutor() as pool:
        asked = pool.submit(running.chat)
        until(lambda: opening.n == 1)
        running.stop()
        assert opening.n == 1 and shut_down(asked.result())
    until(lambda: not workers())


def test_tokens_are_counted_until_the_grace_time_is_over() -> None:
    with held(make(), "tokenize", grace=0.2) as (running, tokenizing), ThreadPoolExecutor() as pool:
        asked = pool.submit(running.client.post, "/tokenize", json={"content": "x"})
        until(lambda: tokenizing.n == 1)
        running.stop()
        assert shut_down(asked.result())
    until(lambda: not workers())


def test_no_thread_outlives_a_server_that_is_idle() -> None:
    llm = make(fakes.saying(fakes.HEL))
    llm.embed = lambda given, wanted: SimpleNamespace(array=np.zeros((1, 2), np.float32), n_tokens=(1,))  # type: ignore
    with serving({"m": llm}) as running:
        assert running.chat().status_code == 200
        for path, body in (("/tokenize", {"content": "x"}), ("/v1/embeddings", {"input": "x"})):
            assert running.client.post(path, json=body).status_code == 200
        assert [name.rpartition("_")[0] for name in sorted(workers())] == [
            "hotcold-embed", "hotcold-prepare", "hotcold-tokenize"
        ]  # fmt: skip
    assert workers() == []


SLOW = """
import sys, time
from hotcold.runtime.llm import LLM
from hotcold.tools.cli import main

def open_chat(self, **request):
    print("preparing", flush=True)
    time.sleep(600)

LLM.open_chat = open_chat
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_process_ends_though_a_thread_does_not(tiny_model: Callable[..., Path]) -> None:
    command = [sys.executable, "-c", SLOW, "serve", str(tiny_model()), "--port", "0", "-t", "1", "--grace", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout is not None and started.stderr is not None
            url = started.stdout.readline().split()[-1]
            with ThreadPoolExecutor() as pool:
                body = {"messages": [{"role": "user", "content": "x"}]}
                asked = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=60)
                assert started.stdout.readline() == "preparing\n"
                started.send_signal(signal.SIGTERM)
                assert shut_down(asked.result())
            assert started.wait(30) == 0 and "Traceback" not in started.stderr.read()
        finally:
            started.kill()


# what waits is bounded, and keeps nobody else waiting


def test_so_many_requests_are_prepared_and_others_hear_that() -> None:
    llm = make(fakes.saying(fakes.HEL), n_parallel=1, n_queue=5)
    with held(llm, "open_chat") as (running, opening), ThreadPoolExecutor() as pool:
        asked = [pool.submit(running.chat) for _ in range(4)]
        until(lambda: opening.n == 4)
        asked += [pool.submit(running.chat) for _ in range(2)]
        until(lambda: running.service._preparing.count == 6)
        response = running.chat()
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        assert response.headers["retry-after"] == "1" and opening.total == 4
        opening.may.set()
        assert {one.result().status_code for one in asked} == {200}
        assert running.service._preparing.count == 0 and running.chat().status_code == 200


def test_a_client_that_leaves_is_not_prepared_for() -> None:
    with held(make(fakes.saying(fakes.HEL)), "open_chat") as (running, opening), ThreadPoolExecutor() as pool:
        asked = [pool.submit(running.chat) for _ in range(4)]
        until(lambda: opening.n == 4)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"http://127.0.0.1:{running.port}/v1/chat/completions", json=CHAT, timeout=0.2)
        until(lambda: running.service._preparing.count == 4)
        opening.may.set()
        assert {one.result().status_code for one in asked} == {200}
        assert opening.total == 4


CHAT = {"messages": [{"role": "user", "content": "x"}]}


def test_texts_that_are_cut_keep_no_chat_waiting() -> None:
    """/tokenize has a thread of its own, and embeddings have theirs."""
    with held(make(fakes.saying(fakes.HEL)), "tokenize") as (running, tokenizing), ThreadPoolExecutor(9) as pool:
        asked = [pool.submit(running.client.post, "/tokenize", json={"content": "x"}) for _ in range(8)]
        until(lambda: running.service._tokenizing.count == 8)
        assert tokenizing.n == 1 and running.chat().status_code == 200
        tokenizing.may.set()
        assert {one.result().status_code for one in asked} == {200}


def test_embeddings_count_until_their_work_ends() -> None:
    llm: Any = make()
    llm.embed = lambda given, wanted: SimpleNamespace(array=np.zeros((1, 2), np.float32), n_tokens=(1,))
    with held(llm, "embed", n_queue=0) as (running, embedding):
        url, body = f"http://127.0.0.1:{running.port}/v1/embeddings", {"input": "x"}
        for _ in range(4):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=body, timeout=0.2)
        until(lambda: embedding.n == 4)  # of clients that have left
        assert httpx.post(url, json=body).status_code == 429
        embedding.may.set()
        until(lambda: running.service.embedding.count == 0)
        assert httpx.post(url, json=body).status_code == 200


def test_a_text_that_is_too_long_is_not_cut() -> None:
    llm = make(n_ctx=20)
    llm.engine.config.pooling = "mean"  # type: ignore[attr-defined]
    cut: list[str] = []
    real = llm.tokenizer.encode
    llm.tokenizer.encode = lambda text, *rest: [cut.append(text), real(text, *rest)][1]  # type: ignore
    with pytest.raises(ContextLengthError, match=r"input: got a text of 261 characters \(number 1\)"):
        llm.embed(["a", "b" * 261])
    assert cut == ["a"]
    with pytest.raises(ClosedError):
        llm.embed(["c", "d", "e"], wanted=lambda: len(cut) < 3)
    assert cut == ["a", "c", "d"]


def test_workers() -> None:
    """What is called comes back, errors too; what is cancelled in the queue, or after the end, is never called."""

    async def main() -> None:
        crew, may, called = Workers(1, "crew", 3), threading.Event(), []
        first = asyncio.ensure_future(crew.run(lambda: may.wait(60)))
        second = asyncio.ensure_future(crew.run(lambda: called.append("second")))
        third = asyncio.ensure_future(crew.run(lambda: {}["a key"]))  # type: ignore[misc]
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await crew.run(lambda: called.append("fourth"))
        second.cancel()
        await asyncio.sleep(0)
        assert crew.count == 2
        may.set()
        assert await first
        with pytest.raises(KeyError, match="a key"):
            await third
        assert called == [] and len(crew.threads) == 1
        crew.close()
        assert not crew.busy and crew.count == 0

    asyncio.run(main())
