"""How fast `hotcold serve` is with 1 to 32 clients, and llama-cpp-python's own server beside it in the same run.

    python tests/serve_speed.py [--model smollm2] [--threads 2] [--streams 1,2,4,8,16,32] [--rounds 3]
                                [--peer-python PYTHON --peer-streams 8]

The peer runs in its own interpreter (`pip install 'llama-cpp-python[server]'` there); rounds alternate between the two
servers, only one of which computes at a time. This process is the client: it sends the same prompts with the same
max_tokens to both, greedy, and counts the tokens that `usage` tells. Each client begins its next request when its last
one has ended; a round is the time from the first request to the last end. llama.cpp's own llama-server has no wheel,
so it is not compared here. Run it on a quiet machine: the peer's threads spin at barriers, so that other work on the
same cores slows it several times. `short_answers`: those that the model ended before max_tokens.

Fairness: while one stream runs, another client sends a long prompt; the longest gap between two tokens of the stream,
and the time to the first token of the long prompt, are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

from serve_http import Exchange, post, text_of
from serve_process import Served

from hotcold.runtime.models import resolve

TEXT = " ".join("\n".join(topics[name] for name in sorted(topics)).split())


@dataclass
class Load:
    """What one round gave."""

    tokens: int
    seconds: float
    short: int  # answers that ended by themselves, before max_tokens

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds


def prompts(n: int, n_chars: int, salt: int) -> list[str]:
    """Different beginnings of prose that goes on; no two rounds share one, so that nothing is cached."""
    return [f"{salt}.{i} " + TEXT[(salt * 131 + i * 7919) % 200_000 :][:n_chars] for i in range(n)]


async def load(server: Served, model: str, n_streams: int, n_each: int, n_tokens: int, n_chars: int, salt: int) -> Load:
    """n_streams clients with n_each requests one after the other."""
    asked = prompts(n_streams * n_each, n_chars, salt)
    found: list[dict[str, Any]] = []

    async def client(number: int) -> None:
        for prompt in asked[number::n_streams]:
            body = {"model": model, "prompt": prompt, "max_tokens": n_tokens, "temperature": 0}
            status, reply = await post(server.url, "/v1/completions", body, server.key)
            if status != 200:
                raise RuntimeError(f"status {status}: {reply}")
            found.append(reply)

    start = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(n_streams)))
    seconds = time.perf_counter() - start
    counts = [reply["usage"]["completion_tokens"] for reply in found]
    return Load(sum(counts), seconds, sum(count < n_tokens for count in counts))


async def streams(
    server: Served, model: str, n_streams: int, n_tokens: int, n_chars: int, salt: int
) -> dict[str, float]:
    """Streamed: median time to the first token, and to each next one (seconds)."""
    first, gaps = [], []

    async def client(prompt: str) -> None:
        start = time.perf_counter()
        times = await timed(server, model, prompt, n_tokens)
        first.append(times[0] - start)
        gaps.extend(b - a for a, b in zip(times, times[1:], strict=False))

    await asyncio.gather(*(client(prompt) for prompt in prompts(n_streams, n_chars, salt)))
    return {
        "first_token_s": statistics.median(first),
        "next_token_s": statistics.median(gaps),
        "worst_gap_s": max(gaps),
    }


async def timed(
    server: Served, model: str, prompt: str, n_tokens: int, begun: asyncio.Event | None = None
) -> list[float]:
    """When each piece of a streamed answer came."""
    body = {"model": model, "prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "stream": True}
    exchange = await Exchange.open(server.url, "/v1/completions", body, server.key)
    if exchange.status != 200:
        raise RuntimeError(f"status {exchange.status}: {await exchange.body()!r}")
    times = []
    async for event in exchange.events():
        if text_of(event):
            times.append(time.perf_counter())
            if begun is not None and len(times) == 8:
                begun.set()
    await exchange.close()
    return times


async def fairness(server: Served, model: str, n_tokens: int, n_long: int, salt: int) -> dict[str, float]:
    """The longest gap in a stream, alone and while a prompt of n_long characters is read, and that one's wait."""
    (one, two) = prompts(2, 200, salt)
    alone = await timed(server, model, one, n_tokens)
    begun = asyncio.Event()
    running = asyncio.create_task(timed(server, model, two, n_tokens, begun))
    await begun.wait()
    start = time.perf_counter()
    long = await timed(server, model, prompts(3, n_long, salt + 1)[2], 4)
    beside = await running

    def gaps(times: list[float]) -> list[float]:
        return [b - a for a, b in zip(times, times[1:], strict=False)]

    return {
        "gap_alone_s": max(gaps(alone)), "median_gap_alone_s": statistics.median(gaps(alone)),
        "gap_beside_s": max(gaps(beside)), "median_gap_beside_s": statistics.median(gaps(beside)),
        "long_first_token_s": long[0] - start,
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def peer_server(python: str, model: str, threads: int, n_ctx: int) -> Served:
    """llama-cpp-python's server at its best: no logits but the last, no answer cut off by the next."""
    options = [
        "--model", model, "--model_alias", "peer", "--n_threads", str(threads), "--n_threads_batch", str(threads),
        "--n_ctx", str(n_ctx), "--logits_all", "false", "--interrupt_requests", "false", "--host", "127.0.0.1",
    ]  # fmt: skip
    port = ("--port", str(free_port()))
    return Served(*options, key=None, command=[python, "-m", "llama_cpp.server"], health="/v1/models", port_option=port)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", default="1,2,4,8,16,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--each", type=int, default=2, help="requests of each client in a round")
    parser.add_argument("--tokens", type=int, default=96, help="max_tokens of an answer")
    parser.add_argument("--chars", type=int, default=120, help="length of a prompt")
    parser.add_argument("--long", type=int, default=6000, help="length of the long prompt")
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--parallel", default=None, help="default: as many as the most streams")
    parser.add_argument("--peer-python")
    parser.add_argument("--peer-streams", default="8")
    parser.add_argument("serve", nargs="*", help="more options of hotcold serve, after --")
    options = parser.parse_args()
    model = str(resolve(options.model))
    sizes = [int(n) for n in options.streams.split(",")]
    peer_sizes = [int(n) for n in options.peer_streams.split(",")] if options.peer_python else []
    parallel = options.parallel or str(max(sizes))
    arguments = ["--threads", str(options.threads), "--ctx", str(options.ctx), "--parallel", parallel, *options.serve]
    with ExitStack() as stack:
        ours = stack.enter_context(Served(model, *arguments))
        servers = [("hotcold", ours, ours.model(), sizes)]
        if options.peer_python:
            peer = stack.enter_context(peer_server(options.peer_python, model, options.threads, options.ctx))
            servers.append(("llama-cpp-python", peer, "peer", peer_sizes))
        found: dict[tuple[str, int], list[Load]] = {}
        salt = 0
        for number in range(options.rounds + 1):  # the first warms up
            for size in sorted({*sizes, *peer_sizes}):
                for label, server, name, wanted in servers:
                    if size not in wanted or (number == 0 and size not in (1, max(wanted))):
                        continue
                    salt += 1
                    each = 1 if number == 0 else options.each
                    got = asyncio.run(load(server, name, size, each, options.tokens, options.chars, salt))
                    if number:
                        found.setdefault((label, size), []).append(got)
                        print(f"{label} {size}: {got.tok_s:.1f} tok/s, {got.short} short", file=sys.stderr, flush=True)
        report: dict[str, Any] = {"streams": [], "latency": [], "fairness": []}
        for (label, size), loads in sorted(found.items(), key=lambda item: (item[0][0], item[0][1])):
            rates = [got.tok_s for got in loads]
            row = {"server": label, "clients": size, "tok_s": round(statistics.median(rates), 1)}
            spread = [round(min(rates), 1), round(max(rates), 1)]
            report["streams"].append({**row, "range": spread, "short_answers": sum(got.short for got in loads)})
        for size in sizes:
            salt += 1
            got_times = asyncio.run(streams(ours, ours.model(), size, options.tokens, options.chars, salt))
            report["latency"].append({"clients": size, **{key: round(value, 4) for key, value in got_times.items()}})
        for _ in range(options.rounds):
            salt += 2
            got_gaps = asyncio.run(fairness(ours, ours.model(), 128, options.long, salt))
            report["fairness"].append({key: round(value, 4) for key, value in got_gaps.items()})
    rate = {(row["server"], row["clients"]): row["tok_s"] for row in report["streams"]}
    if ("hotcold", 1) in rate and ("hotcold", 8) in rate:
        report["8_clients_over_1"] = round(rate["hotcold", 8] / rate["hotcold", 1], 2)
        report["bar_8_over_1"] = 2.5
    if ("llama-cpp-python", 8) in rate and ("hotcold", 8) in rate:
        report["8_clients_over_peer"] = round(rate["hotcold", 8] / rate["llama-cpp-python", 8], 2)
        report["bar_over_peer"] = 2.0
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
