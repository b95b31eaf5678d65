"""Seconds from the start of a process to its first token: the first ever start, warm ones, llama-cpp-python's beside.

    python tests/start_speed.py [--model smollm2] [--rounds 5] [--threads 2] [--peer-python PYTHON] [--imports]

`first ever` begins with an empty kernel cache, and compiles; `warm` finds its kernels; both import, open the model,
evaluate a prompt of a few words and give the first token of an answer, as `LLM.stream` does. The peer's process does
the same with llama_cpp.Llama. `in Python`: the same without the interpreter's own start. The model file is in the
system's cache, and Python's own compiled files exist. --imports prints what the imports of a warm start cost.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from hotcold.runtime.models import resolve

BARS = {"first ever": 15.0, "warm": 1.0}
OURS = """
import time; began = time.perf_counter()
import sys
from hotcold import LLM
with LLM(sys.argv[1], n_ctx=512, n_threads=int(sys.argv[2])) as llm:
    for text in llm.stream("The capital of France is", max_tokens=1, temperature=0):
        print(time.perf_counter() - began, flush=True)
        break
"""
THEIRS = """
import time; began = time.perf_counter()
import sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=512, n_threads=int(sys.argv[2]), verbose=False)
for piece in llm("The capital of France is", max_tokens=1, temperature=0, stream=True):
    print(time.perf_counter() - began, flush=True)
    break
"""


def start(python: str, code: str, model: Path, threads: int, environment: Mapping[str, str]) -> tuple[float, float]:
    """Seconds to the first token: from the process's start, and from its first line of Python."""
    began = time.perf_counter()
    command = [python, "-c", code, str(model), str(threads)]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout
    line = child.stdout.readline()
    seconds = time.perf_counter() - began
    _, said = child.communicate()
    if child.returncode:
        raise SystemExit(f"{python}: {said.strip().splitlines()[-1] if said.strip() else child.returncode}")
    return seconds, float(line)


def imports(model: Path, threads: int) -> list[tuple[float, str]]:
    """Milliseconds of each module's own code in a warm start, the slowest first."""
    command = [sys.executable, "-X", "importtime", "-c", OURS, str(model), str(threads)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    rows = [
        line.removeprefix("import time:").split("|") for line in said.splitlines() if line.startswith("import time:")
    ]
    return sorted(((int(own) / 1e3, name.strip()) for own, _, name in rows[1:]), reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python")
    parser.add_argument("--imports", action="store_true")
    options = parser.parse_args()
    model = resolve(options.model)
    ours = (sys.executable, OURS, model, options.threads)
    times: dict[str, list[tuple[float, float]]] = {}
    print("| start | to the first token, s | in Python, s | bar |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HOTCOLD_KERNEL_CACHE": folder}
        kinds = [("first ever", ours, environment)] + [("warm", ours, environment)] * options.rounds
        if options.peer_python:
            theirs = (options.peer_python, THEIRS, model, options.threads)
            kinds += [("llama-cpp-python", theirs, dict(os.environ))] * options.rounds
        for kind, arguments, own in kinds:
            times.setdefault(kind, []).append(start(*arguments, own))
        if options.imports:
            os.environ["HOTCOLD_KERNEL_CACHE"] = folder
            slowest = imports(model, options.threads)
    for kind, found in times.items():
        whole, inside = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"| {kind} | {whole:.2f} | {inside:.2f} | {BARS.get(kind, '')} |")
    if options.imports:
        print(f"imports, ms, {len(slowest)} modules, {sum(own for own, _ in slowest):.0f} in all:")
        print("\n".join(f"{own:7.1f} {name}" for own, name in slowest[:25]))


if __name__ == "__main__":
    main()
