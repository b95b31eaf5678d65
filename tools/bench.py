"""`hotcold bench`: prompt and decode speed, load and first-token time, peak memory; also against llama.cpp.

As llama-bench does, a prompt is evaluated from an empty cache, and so is a decode of one-token steps; speeds
are medians. Against a peer the two take turns, so that whatever else the machine does hits both. A decoded token reads
the weights, so its speed stands beside that of reading them and doing nothing else, measured before and after.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import numpy as np
import typer

from ..formats.errors import UnsupportedError
from . import console, options
from .bench_peer import peak_rss
from .gpu import GPUOptions, opened, timeline

if TYPE_CHECKING:
    from ..formats.section import Placement
    from ..runtime.engine import Engine, Sequence

SHORT_PROMPT = 8
READ_S = 0.1  # of reading memory, at a time
PAUSE_S = 0.1  # for the other side's threads to go to sleep
CTX_STEP = 256


class Against(str, Enum):
    """What can be measured in the same run."""

    llama_cpp = "llama-cpp-python"


PromptLength = Annotated[int, typer.Option("--n-prompt", "-p", min=1, metavar="N", help="Tokens in the prompt.")]
DecodeLength = Annotated[int, typer.Option("--n-gen", "-n", min=1, metavar="N", help="Tokens to decode.")]
Repetitions = Annotated[int, typer.Option("--repetitions", "-r", min=1, metavar="N", help="Measurements of each kind.")]
Peer = Annotated[
    Against | None,
    typer.Option("--against", metavar="llama-cpp-python", help="Measure this package too, taking turns."),
]
PeerPython = Annotated[
    Path | None, typer.Option("--peer-python", metavar="PATH", help="The Python that has that package.")
]


class Side(Protocol):
    """One of the two that are measured; times in seconds, memory in bytes."""

    load_s: float
    first_token_s: float

    def prompt(self, ids: list[int]) -> float: ...
    def decode(self, first: int, n: int) -> float: ...
    def read_rate(self) -> float | None: ...
    def peak_rss(self) -> int | None: ...


class Timed:
    """What an engine in this process takes."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def prompt(self, ids: list[int]) -> float:
        """Seconds to evaluate ids from an empty cache."""
        return self._timed(lambda sequence: self._next(sequence, ids))

    def decode(self, first: int, n: int) -> float:
        """Seconds for n one-token steps from an empty cache, greedy after `first`."""

        def steps(sequence: Sequence) -> None:
            token = first
            for _ in range(n):
                token = self._next(sequence, [token])

        return self._timed(steps)

    def _next(self, sequence: Sequence, ids: list[int]) -> int:
        return int(self.engine.eval(sequence, ids)[0].argmax())

    def _timed(self, work: Callable[[Sequence], object]) -> float:
        sequence = self.engine.new_sequence()
        try:
            start = time.perf_counter()
            work(sequence)
            return time.perf_counter() - start
        finally:
            sequence.close()


class Ours(Timed):
    """The engine in this process, opened and measured as a user would have it."""

    def __init__(
        self,
        path: Path,
        n_ctx: int,
        n_threads: int | None,
        sparsity: str,
        gpu: GPUOptions,
        stack: ExitStack,
        lora: list[tuple[Path, float]],
        load: str,
        types: dict[str, str],
    ) -> None:
        from ..runtime.engine import Engine  # imported before the clock starts, as the peer's library is
        from ..runtime.limits import Reader, bytes_outside_ffn, reader_of

        status = console.StatusLine()
        stack.callback(status.clear)
        path, rest = console.settled(path, lora, n_threads, status)
        trace = stack.enter_context(timeline(gpu))

        def make(placement: Placement | None) -> Engine:
            self.on_cpu = placement is None
            self.load_s = -time.perf_counter()
            return Engine(
                path,
                n_ctx=n_ctx,
                n_threads=n_threads,
                sparsity=sparsity,
                placement=placement,
                trace=trace,
                lora=rest,
                load=load,
                cache_type_k=types["cache_type_k"],
                cache_type_v=types["cache_type_v"],
                progress=status,
            )

        super().__init__(stack.enter_context(opened(gpu, path, n_ctx, n_threads, sparsity, status, make)))
        self.load_s += time.perf_counter()
        self.first_token_s = self.load_s + self.prompt(token_ids(self.engine.n_vocab, SHORT_PROMPT))
        self.reader: Reader | None = None
        if self.on_cpu:
            self.reader = reader_of(self.engine, status)
            stack.callback(self.reader.close)
            self.outside_ffn = bytes_outside_ffn(self.engine)
        status.clear()

    def read_rate(self) -> float | None:
        """Bytes a second at which as many threads read the weights and do nothing else; None if a GPU has a part."""
        return self.reader.rate(READ_S) if self.reader else None

    def ffn(self, first: int, n: int) -> dict[str, Any]:
        """What the FFNs do in such a decode: mode, active share, bytes read a token, predictors' share of the time."""
        used, plan = self.engine.usage, self.engine.plan
        if plan:
            self.decode(first, n)
            used = self.engine.usage - used
        return {
            "sparsity": str(plan.sparsity) if plan else "dense",
            "active": used.density,
            "bytes_per_token": round(used.step_bytes),
            "bytes_over_dense": used.byte_share,
            "predictor_time": used.predictor_share,
        }

    def peak_rss(self) -> int | None:
        """Peak resident bytes of this process, mapped model included."""
        return peak_rss()


class Theirs:
    """llama-cpp-python in a child process of its own, which stays loaded between measurements."""

    def __init__(self, python: Path, path: Path, n_ctx: int, n_threads: int, n_vocab: int) -> None:
        self.python = python
        self.log = tempfile.TemporaryFile()
        command = [str(python), str(Path(__file__).with_name("bench_peer.py"))]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, encoding="utf-8"
            )
        except OSError as exc:
            raise UnsupportedError(f"--peer-python: {python}: {exc.strerror}; wanted an interpreter") from exc
        ids = token_ids(n_vocab, SHORT_PROMPT)
        try:
            reply = self._ask(op="load", model=str(path), n_ctx=n_ctx, n_threads=n_threads, ids=ids)
        except BaseException:
            self.close()
            raise
        self.load_s, self.first_token_s, self.rss = reply["load_s"], reply["first_token_s"], None

    def prompt(self, ids: list[int]) -> float:
        """Seconds to evaluate ids from an empty cache."""
        return float(self._ask(op="prompt", ids=ids)["s"])

    def decode(self, first: int, n: int) -> float:
        """Seconds for n one-token steps from an empty cache, greedy after `first`."""
        return float(self._ask(op="decode", first=first, n=n)["s"])

    def read_rate(self) -> None:
        """None: that is for us to measure."""

    def peak_rss(self) -> int | None:
        """Peak resident bytes of the child, mapped model included."""
        return self.rss

    def close(self) -> None:
        """End the child."""
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.log.seek(0)
            said = self.log.read().decode("utf-8", errors="replace").strip().splitlines() or ["it ended"]
            raise UnsupportedError(
                f"--against: {self.python} cannot run llama-cpp-python: {said[-1]}; "
                "install it there, or name another interpreter by --peer-python"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise UnsupportedError(f"--against: llama-cpp-python: {reply['error']}")
        self.rss = reply["peak_rss_bytes"]
        return dict(reply)


def bench(
    model: options.Model,
    n_prompt: PromptLength = 512,
    n_gen: DecodeLength = 64,
    repetitions: Repetitions = 5,
    threads: options.Threads = None,
    sparsity: options.Sparsity = "auto",
    vram_budget: options.VramBudget = None,
    require_gpu: options.RequireGpu = False,
    cold: options.Cold = "auto",
    trace: options.TraceFile = None,
    lora: options.Lora = None,
    load: options.Load = "auto",
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    against: Peer = None,
    peer_python: PeerPython = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure speed, start-up time and peak memory."""
    if lora and against is not None:
        raise typer.BadParameter("the other package is measured without adapters", param_hint="--lora")
    path = console.find_model(model)
    n_ctx = -(-max(n_prompt, n_gen, SHORT_PROMPT) // CTX_STEP) * CTX_STEP
    with ExitStack() as stack:
        types = {"cache_type_k": cache_type_k, "cache_type_v": cache_type_v}
        wanted, adapters = GPUOptions(vram_budget, require_gpu, cold, trace), options.adapters(lora)
        ours = Ours(path, n_ctx, threads, sparsity, wanted, stack, adapters, load, types)
        n_vocab, used = ours.engine.n_vocab, ours.engine.n_threads
        _warn_if_busy()
        sides: list[Side] = [ours]
        if against is not None:
            theirs = Theirs(peer_python or Path(sys.executable), path, n_ctx, used, n_vocab)
            stack.callback(theirs.close)
            sides.append(theirs)
        results = [
            {"model": model, "threads": used, **result}
            for result in measure(sides, token_ids(n_vocab, n_prompt), n_gen, repetitions)
        ]
        ffn = ours.ffn(token_ids(n_vocab, 1)[0], n_gen)
        rate = results[0].pop("read_bytes_s")
        reading = rate and reads(ours.outside_ffn + ffn["bytes_per_token"], results[0]["decode_tok_s"], rate)
    report: dict[str, Any] = {
        **results[0],
        "n_prompt": n_prompt,
        "n_gen": n_gen,
        "repetitions": repetitions,
        "n_ctx": n_ctx,
        **types,
        "ffn": ffn,
        "read": reading,
    }
    if against is not None:
        del results[1]["read_bytes_s"]
        report["peer"] = {**results[1], "name": against.value}
        report["ratio"] = {
            kind: results[0][f"{kind}_tok_s"] / results[1][f"{kind}_tok_s"] for kind in ("prompt", "decode")
        }
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _print(report)


def _warn_if_busy() -> None:
    cores = os.cpu_count() or 1
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * cores:
        console.note(f"warning: load is {os.getloadavg()[0]:.1f} on {cores} cores: other work will disturb this")


def token_ids(n_vocab: int, count: int) -> list[int]:
    """The same pseudo-random valid ids every time."""
    return np.random.default_rng(0).integers(0, n_vocab, count).tolist()


def measure(sides: list[Side], ids: list[int], n_gen: int, repetitions: int) -> list[dict[str, Any]]:
    """One result a side: median tokens per second, times in seconds, memory in bytes."""
    prompts: list[list[float]] = [[] for _ in sides]
    decodes: list[list[float]] = [[] for _ in sides]
    rates: list[list[float]] = [[] for _ in sides]
    status = console.StatusLine()
    for round_ in range(repetitions + 1):
        status(f"measuring, round {round_} of {repetitions}" if round_ else "warming up")
        for number, side in enumerate(sides):
            time.sleep(PAUSE_S)
            prompts[number].append(len(ids) / side.prompt(ids))
        for number, side in enumerate(sides):
            time.sleep(PAUSE_S)
            before = side.read_rate()
            decodes[number].append(n_gen / side.decode(ids[0], n_gen))
            after = side.read_rate()
            if before and after:
                rates[number].append((before + after) / 2)
    status.clear()
    return [
        {
            # The first round warmed up.
            "prompt_tok_s": statistics.median(prompts[number][1:]),
            "decode_tok_s": statistics.median(decodes[number][1:]),
            "read_bytes_s": statistics.median(rates[number][1:]) if rates[number] else None,
            "load_s": side.load_s,
            "first_token_s": side.first_token_s,
            "peak_rss_bytes": side.peak_rss(),
        }
        for number, side in enumerate(sides)
    ]


def reads(nbytes: int, tok_s: float, rate: float) -> dict[str, float]:
    """What a decode of tok_s tokens a second reads at nbytes of weights a token, where memory is read at `rate`."""
    return {
        "bytes_per_token": nbytes,
        "decode_bytes_s": tok_s * nbytes,
        "memory_bytes_s": rate,
        "share": tok_s * nbytes / rate,
    }


def _print(report: dict[str, Any]) -> None:
    print(f"{console.printable(report['model'])}: {report['threads']} threads, medians of {report['repetitions']}")
    rows = [
        (f"prompt {report['n_prompt']} (tok/s)", "prompt_tok_s", "{:.1f}"),
        (f"decode {report['n_gen']} (tok/s)", "decode_tok_s", "{:.1f}"),
        ("load (s)", "load_s", "{:.2f}"),
        ("first token (s)", "first_token_s", "{:.2f}"),
        ("peak memory", "peak_rss_bytes", None),
    ]
    sides = [report, report["peer"]] if "peer" in report else [report]
    if "peer" in report:
        print(f"{'':18}  {'hotcold':>12}  {report['peer']['name']:>16}  {'ratio':>6}")
    for title, key, form in rows:
        cells = [_cell(side[key], form) for side in sides]
        line = f"{title:18}  {cells[0]:>12}" + "".join(f"  {cell:>16}" for cell in cells[1:])
        ratio = report.get("ratio", {}).get(key.removesuffix("_tok_s"))
        print(line + (f"  {ratio:>5.2f}x" if ratio is not None else ""))
    if read := report["read"]:
        print(
            f"decode reads {console.human_bytes(read['bytes_per_token'])} of weights a token: "
            f"{read['decode_bytes_s'] / 1e9:.1f} GB/s, {read['share']:.0%} of the {read['memory_bytes_s'] / 1e9:.1f} "
            "at which they can be read"
        )
    ffn = report["ffn"]
    if ffn["sparsity"] != "dense":
        predictors = f", predictors {ffn['predictor_time']:.1%} of the time" if ffn["predictor_time"] else ""
        print(
            f"FFN {ffn['sparsity']}: {ffn['active']:.1%} of neurons active, "
            f"{console.human_bytes(ffn['bytes_per_token'])} a token "
            f"({ffn['bytes_over_dense']:.0%} of dense){predictors}"
        )


def _cell(value: float | None, form: str | None) -> str:
    if value is None:
        return "unknown"
    return form.format(value) if form else console.human_bytes(value)
