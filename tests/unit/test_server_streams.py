"""Streams from their beginning to every kind of end: done, failed, left, not read, shut down."""

from __future__ import annotations

import json
import os
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
from typing import Any

import fakes
import httpx
import pytest
from serving import USER, Serving, make, serving

from hotcold.runtime.llm import LLM

LONG = {"messages": USER, "temperature": 0, "max_tokens": 10_000}
COMMAND = [sys.executable, "-c", "from hotcold.tools.cli import main; main()", "serve"]


class Tap:
    """Lets a model's tokens through one by one, or all of them once it is open."""

    def __init__(self) -> None:
        self._tokens, self._open = threading.Semaphore(0), False

    def __call__(self, tokens: list[int]) -> int:
        if not self._open:
            self._tokens.acquire()
        return fakes.HEL

    def drip(self, n: int = 1) -> None:
        self._tokens.release(n)

    def open(self) -> None:
        self._open = True
        self._tokens.release(1000)


@contextmanager
def tapped(n_parallel: int = 2, **options: Any) -> Iterator[tuple[Serving, Tap, LLM]]:
    tap = Tap()
    llm = make(tap, n_parallel=n_parallel)
    with serving({"m": llm}, **options) as running:
        try:
            yield running, tap, llm
        finally:
            tap.open()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


def idle(llm: LLM) -> bool:
    return not llm.scheduler.running and not llm.scheduler.waiting


def events(text: str) -> list[Any]:
    found = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [event if event == "[DONE]" else json.loads(event) for event in found]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(stream: bool) -> None:
    with tapped() as (running, tap, llm):
        with pytest.raises(httpx.ReadTimeout):
            with running.client.stream(
                "POST", "/v1/chat/completions", json={**LONG, "stream": stream}, timeout=0.3
            ) as response:
                tap.drip(2)
                response.read()
        answer = llm.scheduler.running[0].answer
        tap.open()  # a step in progress is not interrupted
        until(lambda: idle(llm))
        assert answer is not None and answer.finish_reason == ""


def test_a_stream_that_says_nothing_says_that() -> None:
    with tapped(keep_alive=0.02) as (running, tap, llm):
        with running.client.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            while not next(lines).startswith(":"):
                pass
            tap.open()
            assert [line for line in lines if line][-1] == "data: [DONE]"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_an_error_in_mid_stream_is_an_event(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(tokens: list[int]) -> int:
        if tokens[-2:] == [fakes.HEL, fakes.HEL]:
            raise RuntimeError("a secret")
        return fakes.HEL

    body = {"messages": USER, "prompt": "x", "input": "x", "temperature": 0}
    with serving({"m": make(fail)}) as running:
        text = running.client.post(path, json={**body, "stream": True}).text
        found = events(text)
        assert len(found) > 2 and "secret" not in text
        if path == "/v1/responses":
            *_, told, last = found
            assert sorted(told) == ["code", "message", "param", "sequence_number", "type"]
            assert (told["type"], told["code"], told["param"]) == ("error", "internal_error", None)
            assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
            assert last["response"]["error"] == {"code": told["code"], "message": told["message"]}
            assert [one["sequence_number"] for one in found] == list(range(len(found)))
            names = [line.removeprefix("event: ") for line in text.split("\n") if line.startswith("event: ")]
            assert names == [one["type"] for one in found]
        else:
            assert found[-1]["error"]["type"] == "server_error"
        assert running.client.post(path, json=body).status_code == 500
    assert "a bug: RuntimeError: a secret" in capsys.readouterr().err


def test_a_client_that_does_not_read_is_dropped() -> None:
    """And until then its answer pauses: what waits for it is bounded."""
    llm = make(lambda tokens: fakes.HEL, n_ctx=10**6)
    llm.engine.row = lambda tokens: ROW  # type: ignore[attr-defined]
    with serving({"m": llm}, write_timeout=0.3, send_buffer=4096) as running:
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", running.port))
            body = json.dumps({**LONG, "max_tokens": 10**6, "stream": True}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body)
            until(lambda: bool(llm.scheduler.running))
            answer = llm.scheduler.running[0].answer
            until(lambda: idle(llm))
            assert 0 < len(answer.tokens) < 5000
        assert running.chat(max_tokens=2).status_code == 200


ROW = fakes.FakeEngine(lambda tokens: fakes.HEL).row([0])


def test_the_end_lets_streams_finish() -> None:
    with tapped() as (running, tap, llm), ThreadPoolExecutor() as pool:
        asked = pool.submit(running.client.post, "/v1/chat/completions", json={**LONG, "stream": True})
        until(lambda: bool(llm.scheduler.running))
        running.server.should_exit = True
        until(lambda: running.service.stopping)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{running.port}/health")
        tap.open()
        assert events(asked.result().text)[-1] == "[DONE]"


def test_the_end_turns_away_those_who_wait_and_then_ends_the_rest() -> None:
    with tapped(n_parallel=1, grace=0.5) as (running, tap, llm), ThreadPoolExecutor() as pool:
        first = pool.submit(running.client.post, "/v1/chat/completions", json={**LONG, "stream": True})
        until(lambda: len(llm.scheduler.running) == 1)
        second = pool.submit(running.client.post, "/v1/chat/completions", json=LONG)
        until(lambda: len(llm.scheduler.waiting) == 1)
        running.server.should_exit = True
        turned_away = second.result()
        assert turned_away.status_code == 503 and turned_away.json()["error"]["code"] == "shutting_down"
        assert not first.done()
        tap.drip(50)
        last = events(first.result().text)[-1]
        assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "shutting_down")


# the process


@contextmanager
def process(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    env = {name: value for name, value in os.environ.items() if name != "HOTCOLD_API_KEY"}
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as started:
        try:
            yield started
        finally:
            started.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_process_serves_and_ends_with_0(tiny_model: Callable[..., Path]) -> None:
    with process(tiny_model(), "--port", "0", "--alias", "tiny", "-t", "1", "-v") as started:
        assert started.stdout is not None and started.stderr is not None
        ready = started.stdout.readline()
        assert ready.startswith("hotcold: serving tiny at http://127.0.0.1:"), ready + started.stderr.read()
        url = ready.split()[-1]
        body = {"model": "tiny", "messages": USER, "max_tokens": 4}
        found = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert found.status_code == 200 and found.json()["usage"]["completion_tokens"] <= 4
        figures = httpx.get(f"{url}/metrics").text
        assert 'hotcold_kv_blocks_used{model="tiny"} 0.0' in figures
        started.send_signal(signal.SIGTERM)
        assert started.wait(30) == 0
        log = started.stderr.read()
        assert "POST /v1/chat/completions 200" in log and "Traceback" not in log


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_second_signal_ends_at_once(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model(n_ctx_train=100_000)
    with process(model, "--port", "0", "-t", "1", "-np", "1", "--grace", "1000") as started:
        assert started.stdout is not None
        url = started.stdout.readline().split()[-1]
        body = {"messages": USER, "stream": True, "max_tokens": 100_000, "logit_bias": {"0": -1000, "2": -1000}}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()  # which, once dropped, hangs up
            assert next(lines)
            started.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                started.wait(0.5)
            started.send_signal(signal.SIGINT)
            assert started.wait(30) == 128 + signal.SIGINT


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch.gguf", "--port", "0"], "no such file"),
        (["nosuch.gguf", "--host", "0.0.0.0"], "without an API key"),
        (["a.gguf", "b/a.gguf"], "--alias"),
        (["a.gguf", "--api-key", ""], "--api-key"),
        (["a.gguf", "--api-key-file", "nosuch"], "--api-key-file"),
    ],
)
def test_what_cannot_be_served_is_one_line(arguments: list[str], said: str) -> None:
    with process(*arguments) as started:
        out, err = started.communicate(timeout=60)
    assert started.returncode == 1 and out == ""
    assert err.splitlines()[-1].startswith("hotcold: error: ") and said in err and "Traceback" not in err


def test_a_port_that_is_taken(tiny_model: Callable[..., Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with process(tiny_model(), "--port", str(taken.getsockname()[1])) as started:
            out, err = started.communicate(timeout=60)
    assert started.returncode == 1 and "--port" in err and err.count("\n") == 1
