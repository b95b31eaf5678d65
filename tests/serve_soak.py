"""Many clients of `hotcold serve` for minutes: random prompts, lengths, disconnects; every stream must be its own.

    python tests/serve_soak.py [--model smollm2] [--clients 32] [--seconds 300] [--parallel 8] [--threads 2]

Each greedy text is computed first by an LLM in this process, one answer at a time; like the server it is opened for
several answers (for one alone, other kernels round otherwise). A stream that ended must equal it, one that its client
left must be a beginning of it. Where one differs, the gap between the two likeliest tokens at that
place is printed: rounding may turn a near tie, nothing may turn a clear choice. Exit code 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from serve_http import Exchange, finish_of, text_of
from serve_process import KEY, Served

from hotcold import LLM
from hotcold.runtime.models import resolve

FLAT = 0.05  # of the memory after the warm-up
WARM_UP = 0.2  # of the time


@dataclass(frozen=True)
class Job:
    """A request, its text when it runs alone, why that ends, and how clear each choice of a token was."""

    path: str
    body: dict[str, Any]
    text: str
    reason: str
    gaps: list[tuple[int, float]]  # place in the text, log probability of the best token less that of the next

    def gap_at(self, place: int) -> float:
        """How clear the choice of the token was that covers a place in the text."""
        return next((gap for at, gap in reversed(self.gaps) if at <= place), float("nan"))


def make_jobs(
    model: str | Path,
    *,
    n_ctx: int,
    n_jobs: int,
    n_prompt: int,
    n_answer: int,
    n_parallel: int,
    seed: int,
    n_threads: int = 1,
) -> list[Job]:
    """Random requests of up to n_prompt tokens, some with shared beginnings, and their texts."""
    rng = random.Random(seed)
    text = " ".join("\n".join(topics[name] for name in sorted(topics)).split())
    with LLM(model, n_ctx=n_ctx, n_threads=n_threads, n_parallel=n_parallel) as llm:
        per_token = 4000 / len(llm.tokenize(text[:4000]))

        def piece(n_tokens: int) -> str:
            start = rng.randrange(len(text) - 20_000)
            return text[start : start + max(1, int(n_tokens * per_token))]

        shared = [piece(n_prompt * share // 8) for share in (1, 2, 3, 4)]
        jobs = []
        for _ in range(n_jobs):
            prompt = piece(rng.randint(1, n_prompt // 3))
            if rng.random() < 0.5:
                prompt = rng.choice(shared) + " " + prompt
            n = rng.choice([1, 2, rng.randint(3, n_answer), rng.randint(3, n_answer), n_answer])
            options: dict[str, Any] = {"temperature": 0.0, "logprobs": 2}
            body: dict[str, Any] = {"max_tokens": n, "temperature": 0}
            if rng.random() < 0.2:
                body["stop"] = options["stop"] = [rng.choice([". ", " the", "e", "\n"])]
            if rng.random() < 0.4:
                messages = [{"role": "user", "content": prompt}]
                jobs.append(
                    (llm.ask_chat(messages, n, **options), "/v1/chat/completions", {"messages": messages, **body})
                )
            else:
                jobs.append((llm.ask(prompt, n, **options), "/v1/completions", {"prompt": prompt, **body}))
        found = []
        for answer, path, body in jobs:
            pieces = list(answer)
            gaps = [
                (score.offset, score.top[0][1] - score.top[1][1])
                for part in pieces
                for score in part.scores
                if score.top
            ]
            found.append(Job(path, body, "".join(part.text for part in pieces), answer.finish_reason, gaps))
    return found


@dataclass
class Report:
    """What happened; problems are what must not."""

    requests: int = 0
    completed: int = 0
    left: int = 0
    busy: int = 0
    tokens: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    rss: list[tuple[float, int, int]] = field(default_factory=list)  # seconds, bytes of all, bytes of its own

    def growth(self) -> tuple[float, float]:
        """Largest memory after the warm-up over the smallest: all of it, and what is not a file's."""
        late = [(total, own) for at, total, own in self.rss if at >= WARM_UP * self.seconds] or [(1, 1)]
        return tuple(max(column) / min(column) - 1 for column in zip(*late, strict=True))  # type: ignore[return-value]


class Soak:
    """One run against a server."""

    def __init__(self, server: Served, jobs: list[Job], seed: int, end: float, n_requests: int) -> None:
        self.server, self.jobs, self.end, self.n_requests = server, jobs, end, n_requests
        self.report = Report()
        self.seed = seed
        self.model = server.model()
        self.start = time.monotonic()

    async def client(self, number: int) -> None:
        """Requests one after the other, until the time or their number is up."""
        rng = random.Random(f"{self.seed} {number}")
        while time.monotonic() < self.end and self.report.requests < self.n_requests:
            self.report.requests += 1
            job = rng.choice(self.jobs)
            stream = rng.random() < 0.75
            leave = rng.choice([0, 0, 1, 2, 5, 10, 20]) if rng.random() < 0.3 else None
            try:
                await asyncio.wait_for(self.one(job, stream, leave, rng), 300)
            except Exception as error:
                self.problem(job, f"{type(error).__name__}: {error}")
            if rng.random() < 0.2:
                await asyncio.sleep(rng.random() * 0.3)

    async def one(self, job: Job, stream: bool, leave: int | None, rng: random.Random) -> None:
        """One request; `leave`: go after so many events, or, where nothing is streamed, tenths of a second."""
        body = {"model": self.model, **job.body, **({"stream": True} if stream else {})}
        opening = asyncio.ensure_future(Exchange.open(self.server.url, job.path, body, KEY))
        if leave is not None and not stream:
            await asyncio.wait([opening], timeout=leave / 10)
            if not opening.done():
                opening.cancel()
                await asyncio.gather(opening, return_exceptions=True)
                self.report.left += 1
                return
        exchange = await opening
        try:
            if exchange.status == 429:
                self.report.busy += 1
                await asyncio.sleep(float(exchange.headers["retry-after"]))
            elif exchange.status != 200:
                self.problem(job, f"status {exchange.status}: {(await exchange.body())[:300]!r}")
            elif not stream:
                found = await exchange.json()
                self.completed(job, text_of(found), finish_of(found))
            else:
                await self.read(job, exchange, leave)
        finally:
            exchange.abort() if rng.random() < 0.5 else await exchange.close()

    async def read(self, job: Job, exchange: Exchange, leave: int | None) -> None:
        text, reason, n = "", None, 0
        if leave != 0:
            async for event in exchange.events():
                if "error" in event:
                    self.problem(job, f"an error in the stream: {event['error']}")
                    return
                text += text_of(event)
                reason = finish_of(event) or reason
                n += 1
                if n == leave:
                    break
        if leave is None or n < leave:
            self.completed(job, text, reason, exchange.done)
        else:
            self.report.left += 1
            self.compare(job, text, job.text[: len(text)])

    def completed(self, job: Job, text: str, reason: str | None, done: bool = True) -> None:
        self.report.completed += 1
        self.report.tokens += len(job.gaps)
        if self.compare(job, text, job.text) and reason != job.reason:
            self.problem(job, f"finish_reason {reason!r}, wanted {job.reason!r}")
        if not done:
            self.problem(job, "the stream ended without [DONE]")

    def compare(self, job: Job, got: str, wanted: str) -> bool:
        if got == wanted:
            return True
        place = next(
            (i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted))
        )
        others = [other for other in self.jobs if other.text.startswith(got[:200]) and other is not job]
        mixed = f" (the text of another request, {self.jobs.index(others[0])})" if others and len(got) > 20 else ""
        around = f"got {got[place : place + 40]!r}, wanted {wanted[place : place + 40]!r}"
        self.problem(
            job,
            f"differs at {place} of {len(wanted)}, where the gap was {job.gap_at(place):.4f}: {around}{mixed}",
        )
        return False

    def problem(self, job: Job, text: str) -> None:
        self.report.problems.append(f"request {self.jobs.index(job)} ({job.path}): {text}")

    async def watch(self) -> None:
        """Note the memory every second."""
        while True:
            self.report.rss.append((time.monotonic() - self.start, *self.server.memory()))
            await asyncio.sleep(1)


async def soak(
    server: Served,
    jobs: list[Job],
    *,
    n_clients: int,
    n_requests: int = sys.maxsize,
    seconds: float = 600,
    seed: int = 0,
) -> Report:
    """Run clients against a server until so many requests or seconds are over."""
    run = Soak(server, jobs, seed, time.monotonic() + seconds, n_requests)
    watch = asyncio.create_task(run.watch())
    await asyncio.gather(*(run.client(number) for number in range(n_clients)))
    run.report.seconds = time.monotonic() - run.start
    watch.cancel()
    return run.report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=400, help="tokens at most, about")
    parser.add_argument("--answer", type=int, default=96, help="tokens at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("serve", nargs="*", help="more options of hotcold serve, after --")
    options = parser.parse_args()
    model = resolve(options.model)
    sizes = {"n_ctx": options.ctx, "n_jobs": options.jobs, "n_prompt": options.prompt, "n_answer": options.answer}
    jobs = make_jobs(model, seed=options.seed, n_threads=options.threads, n_parallel=options.parallel, **sizes)
    print(f"{len(jobs)} requests computed alone, {sum(len(job.gaps) for job in jobs)} tokens", file=sys.stderr)
    arguments = ["--parallel", str(options.parallel), "--threads", str(options.threads), "--ctx", str(options.ctx)]
    with Served(model, *arguments, *options.serve) as server:
        report = asyncio.run(soak(server, jobs, n_clients=options.clients, seconds=options.seconds, seed=options.seed))
        after = server.settled()
        failed = {path: n for path, n in server.statuses().items() if path.startswith("5")}
        code = server.terminate()
    total, own = report.growth()
    every = max(1, len(report.rss) // 15)
    problems = [f"{text} ({n} times)" for text, n in Counter(report.problems).most_common()]
    figures = {
        "requests": report.requests, "completed": report.completed, "left": report.left, "busy": report.busy,
        "tokens": report.tokens, "seconds": round(report.seconds, 1), "tok_s": round(report.tokens / report.seconds, 1),
        "memory_growth": round(total, 4), "own_memory_growth": round(own, 4),
        "memory_mb": [[round(at), round(a / 1e6), round(b / 1e6)] for at, a, b in report.rss[::every]],
        "running_after": after.running, "waiting_after": after.waiting, "kv_blocks_after": after.blocks,
        "server_errors": failed, "exit_code": code, "n_problems": len(report.problems), "problems": problems[:20],
    }  # fmt: skip
    print(json.dumps(figures, indent=None if options.json else 1))
    clean = not report.problems and not failed and code == 0 and total <= FLAT
    sys.exit(0 if clean and after.running == after.waiting == after.blocks == 0 else 1)


if __name__ == "__main__":
    main()
