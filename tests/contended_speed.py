"""Decode speed while every core also runs a busy loop, over that of a quiet machine; llama-cpp-python's beside it.

    python tests/contended_speed.py MODEL.gguf... [--threads 2] [--seconds 2] [--rounds 3] [--peer-python PYTHON]

A busy loop is a process of the same priority, pinned to one core, so that each thread gets about half a core: without
waiting at barriers for threads that have none, a half of the speed would be left. Quiet and contended rounds take
turns, ours and the peer's too, only one of which computes at a time. Wants a machine that is quiet otherwise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from hotcold import Engine
from hotcold.runtime.cpu.threads import default_threads
from hotcold.runtime.models import resolve
from hotcold.tools.bench import Theirs, Timed, token_ids

BAR = 0.4  # of the quiet speed
N_CTX = 512
MOST = N_CTX - 8  # tokens of a measurement


class Side(Protocol):
    def decode(self, first: int, n: int) -> float: ...


@contextmanager
def busy_loops() -> Iterator[None]:
    """One on every core that this process may use."""
    loops = []
    try:
        for core in sorted(os.sched_getaffinity(0)):
            code = f"import os; os.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
            loops.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
        for loop in loops:
            assert loop.stdout
            loop.stdout.readline()
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="of a measurement, on a quiet machine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", type=Path)
    options = parser.parse_args()
    print("| model | engine | quiet tok/s | contended tok/s | kept (each round) |\n|---|---|---|---|---|", flush=True)
    for model in options.models:
        path = resolve(model)
        with ExitStack() as stack:
            engine = stack.enter_context(Engine(path, n_ctx=N_CTX, n_threads=options.threads))
            sides: dict[str, Side] = {"hotcold": Timed(engine)}
            if options.peer_python:
                theirs = Theirs(options.peer_python, path, N_CTX, options.threads, engine.n_vocab)
                stack.callback(theirs.close)
                sides["llama-cpp-python"] = theirs
            first = token_ids(engine.n_vocab, 1)[0]
            rates: dict[tuple[str, bool], list[float]] = {
                (name, loops): [] for name in sides for loops in (False, True)
            }
            for _ in range(options.rounds):
                for name, side in sides.items():
                    n = max(4, min(MOST, int(options.seconds * 8 / side.decode(first, 8))))
                    rates[name, False].append(n / side.decode(first, n))
                    with busy_loops():
                        side.decode(first, 2)
                        rates[name, True].append(n / side.decode(first, n))
            for name in sides:
                quiet, contended = rates[name, False], rates[name, True]
                kept = [b / a for a, b in zip(quiet, contended, strict=True)]
                bar = f", bar {BAR:.0%}" if name == "hotcold" else ""
                print(
                    f"| {path.name} | {name}, {options.threads} threads | {statistics.median(quiet):.1f} "
                    f"| {statistics.median(contended):.1f} | **{statistics.median(kept):.0%}** "
                    f"({min(kept):.0%} to {max(kept):.0%}{bar}) |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
