"""Decoding speed of a relufied model against its teacher, in hotcold and in llama-cpp-python, as Markdown rows.

    python tests/relufy_speed.py RELUFIED.gguf TEACHER.gguf TEXT [--threads 1,2] [--rounds 9] [--peer-python PYTHON]

Both files should be of the same types (`hotcold quantize` makes them so). All sides are open at once and take turns;
each decodes the tokens of the text one by one (what is active depends on them), llama-cpp-python greedily as many.
Medians of rounds, of which the first warms up; bytes are those of the weights that a token reads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from hotcold import Engine
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.tokenizer import load_tokenizer
from hotcold.runtime.limits import bytes_outside_ffn
from hotcold.tools.bench import PAUSE_S, Theirs, Timed

HEAD = "| model | threads | tok/s | times the teacher | times llama.cpp | MB a token | of the teacher's | active |"


class Reading(Timed):
    """An engine that decodes given tokens."""

    def read(self, ids: list[int]) -> float:
        """Seconds for one-token steps over ids from an empty cache."""
        return self._timed(lambda sequence: [self._next(sequence, [token]) for token in ids])


def measure(options: argparse.Namespace, n_threads: int, ids: list[int]) -> list[str]:
    """A row for each side."""
    n_ctx = -(-len(ids) // 256) * 256
    with ExitStack() as stack:
        ours: dict[str, Reading] = {}
        wanted = [(options.teacher, "dense"), *((options.model, mode) for mode in options.modes.split(","))]
        for path, mode in wanted:
            engine = stack.enter_context(Engine(path, n_ctx=n_ctx, n_threads=n_threads, sparsity=mode))
            ours[f"{path.stem}, {mode}"] = Reading(engine)
        names = list(ours)
        seconds: dict[str, list[float]] = {name: [] for name in [*names, "llama.cpp"]}
        peer = None
        if options.peer_python:
            peer = Theirs(options.peer_python, options.teacher, n_ctx, n_threads, ours[names[0]].engine.n_vocab)
            stack.callback(peer.close)
        usage = {}
        for round_ in range(options.rounds + 1):
            for name, side in ours.items():
                time.sleep(PAUSE_S)
                before = side.engine.usage
                found = side.read(ids)
                if round_:
                    usage[name] = side.engine.usage - before
                    seconds[name].append(found)
            if peer:
                time.sleep(PAUSE_S)
                found = peer.decode(ids[0], len(ids))
                if round_:
                    seconds["llama.cpp"].append(found)
        median = {name: statistics.median(values) if values else 0.0 for name, values in seconds.items()}
        nbytes = {name: bytes_outside_ffn(ours[name].engine) + usage[name].step_bytes for name in names}
        rows = []
        for name in names:
            by_peer = f"{median['llama.cpp'] / median[name]:.2f}" if peer else ""
            cells = [name, str(n_threads), f"{len(ids) / median[name]:.0f}", f"{median[names[0]] / median[name]:.2f}"]
            cells += [by_peer, f"{nbytes[name] / 1e6:.1f}", f"{nbytes[name] / nbytes[names[0]]:.2f}"]
            rows.append("| " + " | ".join([*cells, f"{usage[name].density:.1%}"]) + " |")
        if peer:
            speed = f"{len(ids) / median['llama.cpp']:.0f}"
            rows.append(f"| {options.teacher.stem}, llama.cpp | {n_threads} | {speed} | | 1.00 | | | |")
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--modes", default="exact", help="of the relufied model, as exact,predict")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peer-python", type=Path)
    options = parser.parse_args()
    with GGUFFile(options.teacher) as file:
        text = options.text.read_text(encoding="utf-8")[: 20 * options.tokens]
        ids = load_tokenizer(file).encode(text)[: options.tokens]
    print(HEAD + "\n|" + "---|" * (HEAD.count("|") - 1))
    for n_threads in map(int, options.threads.split(",")):
        for row in measure(options, n_threads, ids):
            print(row, flush=True)


if __name__ == "__main__":
    main()
