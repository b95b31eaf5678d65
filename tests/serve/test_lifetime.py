"""The process: what it prints, how it ends under load, and a small edition of the soak."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import serve_soak
from serve_http import Exchange, finish_of
from serve_process import COMMAND, KEY, Served

NO_END = {"2": -100, "0": -100, "1": -100}
CHAT = "/v1/chat/completions"


def asked(model: str, n: int, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": model, "messages": messages, "max_tokens": n, "temperature": 0, "logit_bias": NO_END, **options}


@pytest.mark.parametrize("n_tokens", [60, 30_000], ids=["short-answers", "long-answers"])
def test_sigterm_under_load(tiny_model: Callable[..., Path], n_tokens: int) -> None:
    """Running streams finish, or end with an error event; whole answers come or are refused; exit 0."""
    file = tiny_model(n_ctx_train=32_768, seed=6)
    with Served(file, "--parallel", "4", "--threads", "1", "--ctx", "32768", "--grace", "2") as server:
        name = server.model()

        async def stream() -> str:
            exchange = await Exchange.open(server.url, CHAT, asked(name, n_tokens, stream=True), KEY)
            if exchange.status != 200:
                return "refused" if exchange.status == 503 else f"status {exchange.status}"
            reason, error = None, None
            async for event in exchange.events():
                started.set()
                reason = finish_of(event) or reason
                error = event.get("error") or error
            if error:
                return "told" if error["message"] and error["type"] else "an empty error"
            return "finished" if reason and exchange.done else "cut off"

        async def whole() -> str:
            exchange = await Exchange.open(server.url, CHAT, asked(name, n_tokens), KEY)
            found = await exchange.json()
            if exchange.status == 200:
                return "finished" if found["usage"]["completion_tokens"] == n_tokens else "cut off"
            return "told" if exchange.status == 503 and found["error"]["message"] else f"status {exchange.status}"

        async def run() -> list[str]:
            tasks = [asyncio.create_task(stream()) for _ in range(6)] + [asyncio.create_task(whole()) for _ in range(2)]
            await started.wait()
            server.process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*tasks)

        started = asyncio.Event()
        fates = asyncio.run(run())
        assert server.process.wait(60) == 0, "\n".join(server.log[-30:])
    assert set(fates) <= {"finished", "told", "refused"}, fates
    if n_tokens == 60:
        assert fates.count("finished") >= 4  # what was running had the time
    else:
        assert fates.count("told") >= 4
    assert not any("Traceback" in line for line in server.log), "\n".join(server.log[-40:])


def test_sigint_and_a_second_signal(served_model: Path) -> None:
    """Ctrl-C ends it as SIGTERM does; a second one does not wait for the grace time."""
    with Served(served_model, "--parallel", "2", "--threads", "1") as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) in (0, 130)
    with Served(served_model, "--parallel", "1", "--threads", "1", "--grace", "600") as server:
        body = asked(server.model(), 100_000, stream=True, messages=[{"role": "user", "content": "a"}])
        body["max_tokens"] = 2000

        async def run() -> None:
            exchange = await Exchange.open(server.url, CHAT, body, KEY)
            await anext(exchange.events())
            for _ in range(2):
                server.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.2)
            exchange.abort()

        asyncio.run(run())
        assert server.process.wait(60) is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], ("--api-key", "--insecure")),
        (["--host", "::"], ("--api-key", "--insecure")),
        (["--parallel", "0"], ("parallel",)),
        (["--port", "70000"], ("port",)),
    ],
)  # fmt: skip
def test_refused_to_start(served_model: Path, arguments: list[str], words: tuple[str, ...]) -> None:
    """A public address without a key, and wrong options: a line that says what to do, no traceback, not 0."""
    done = subprocess.run(
        [*COMMAND, "serve", str(served_model), *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode not in (0, -9) and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_a_port_in_use(served_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*COMMAND, "serve", str(served_model), "--port", port], capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr and port in done.stderr


def test_without_a_key(served_model: Path) -> None:
    """On this machine alone no key is needed, and any is taken."""
    with Served(served_model, "--threads", "1", key=None) as server:
        assert server.get("/v1/models")[0] == 200
        server.key = "sk-any"
        assert server.get("/v1/models")[0] == 200


def test_small_soak(server: Served, served_model: Path) -> None:
    """32 clients, random prompts, lengths and disconnects: some seconds of tests/serve_soak.py."""
    jobs = serve_soak.make_jobs(served_model, n_ctx=2048, n_jobs=24, n_prompt=120, n_answer=60, n_parallel=4, seed=3)
    report = asyncio.run(serve_soak.soak(server, jobs, n_clients=32, n_requests=160, seed=4))
    assert report.problems == []
    assert report.completed > 60 and report.left > 15
    after = server.settled()
    assert after.running == after.waiting == after.blocks == 0


@pytest.mark.skipif(os.name != "posix", reason="needs a shell that sets limits")
def test_more_connections_than_files(served_model: Path) -> None:
    """They are dropped without a flood of tracebacks, and the server serves again when they are gone."""
    limited = ["bash", "-c", 'ulimit -n 256; exec "$0" "$@"', *COMMAND, "serve"]
    with Served(served_model, "--threads", "1", "--parallel", "1", command=limited) as server:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(400)]
        for connection in held:
            connection.settimeout(5)
        # those who came first may stay
        held[0].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert held[0].recv(64).startswith(b"HTTP/1.1 200")
        for connection in held:
            connection.close()
        server.wait()
        assert not any("Traceback" in line for line in server.log) and len(server.log) < 20, "\n".join(server.log)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


def test_json_on_the_wire_is_utf8(server: Served, model: str) -> None:
    """Streams of a model that emits any bytes: every event is whole UTF-8 and whole JSON."""

    async def run() -> None:
        for seed in range(4):
            body = asked(model, 200, stream=True) | {"temperature": 2.0, "seed": seed}
            exchange = await Exchange.open(server.url, CHAT, body, KEY)
            assert exchange.status == 200
            lines = [line for line in (await exchange.body()).decode("utf-8").split("\n") if line.startswith("data: ")]
            chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
            assert lines[-1] == "data: [DONE]" and len(chunks) > 1 and all(chunk["choices"] for chunk in chunks)

    asyncio.run(run())
