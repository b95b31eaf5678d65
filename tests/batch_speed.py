"""Milliseconds of one step that gives each of 1 to 32 sequences a token, by the form of the weights and their kernel.

    python tests/batch_speed.py [--model smollm2] [--threads 2] [--tokens 1,2,4,8,16,32] [--rounds 15]

`bands` are weights copied at load; `rows` and `tiles` are the two ways with weights left in the mapped file, of
which layout.TILE_MIN chooses by the number of tokens. Medians of rounds in which the three take turns. With bands a
token must get the same bits in whatever company: checked here.
"""

from __future__ import annotations

import argparse
import statistics
from time import perf_counter

from hotcold import Engine
from hotcold.runtime.models import resolve

PROMPT = 40  # tokens that each sequence has before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", default="1,2,4,8,16,32")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    path = resolve(options.model)
    counts = [int(n) for n in options.tokens.split(",")]
    sizes = {"n_ctx": 256, "n_threads": options.threads, "n_parallel": max(counts)}
    with Engine(path, load="copy", **sizes) as copied, Engine(path, load="mmap", **sizes) as mapped:
        ways = {"bands": (copied, True), "rows": (mapped, True), "tiles": (mapped, False)}
        print("tokens " + " ".join(f"{way:>14}" for way in ways) + "   milliseconds (tokens a second)")
        alone: dict[int, bytes] = {}  # by sequence, what it got in the first step of all
        for count in counts:
            times: dict[str, list[float]] = {way: [] for way in ways}
            sequences = {}
            for way, (engine, _) in ways.items():
                sequences[way] = [engine.new_sequence() for _ in range(count)]
                for number, sequence in enumerate(sequences[way]):
                    ids = [(number * 37 + i) % 1000 + 5 for i in range(PROMPT)]
                    engine.eval_batch([(sequence, ids)], by_rows=False)
            for turn in range(options.rounds):
                for way, (engine, by_rows) in ways.items():
                    batch = [(sequence, [100 + number]) for number, sequence in enumerate(sequences[way])]
                    began = perf_counter()
                    logits = engine.eval_batch(batch, by_rows=by_rows)
                    times[way].append(perf_counter() - began)
                    if way == "bands" and turn == 0:
                        for number, row in enumerate(logits):
                            assert alone.setdefault(number, row.tobytes()) == row.tobytes(), "company changes bits"
            for found in sequences.values():
                for sequence in found:
                    sequence.close()
            medians = [statistics.median(times[way]) for way in ways]
            print(f"{count:6} " + " ".join(f"{t * 1e3:7.2f} ({count / t:5.0f})" for t in medians), flush=True)


if __name__ == "__main__":
    main()
