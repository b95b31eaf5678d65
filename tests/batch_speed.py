"""Milliseconds of one step that gives each of 1 to 32 sequences a token, by the way the weights are multiplied.

    python tests/batch_speed.py [--model smollm2] [--threads 2] [--tokens 1,2,4,8,16,32] [--rounds 15]

`rows` is what an LLM for one answer takes, `strips` what one for several does, `tiles` the way of prompts; medians of
rounds in which the three take turns. Strips and tiles must give the same bits (runtime/cpu/strips.py): checked here.
"""

from __future__ import annotations

import argparse
import statistics
from time import perf_counter

import numpy as np

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
    with (
        Engine(path, n_ctx=256, n_threads=options.threads, n_parallel=max(counts), lookup=False) as several,
        Engine(path, n_ctx=256 * max(counts), n_threads=options.threads) as single,
    ):
        ways = {"rows": (single, True), "strips": (several, True), "tiles": (several, False)}
        print("tokens " + " ".join(f"{way:>12}" for way in ways) + "   milliseconds (tokens a second)")
        for count in counts:
            times: dict[str, list[float]] = {way: [] for way in ways}
            sequences = {}
            for way, (engine, _) in ways.items():
                sequences[way] = [engine.new_sequence() for _ in range(count)]
                for number, sequence in enumerate(sequences[way]):
                    ids = [(number * 37 + i) % 1000 + 5 for i in range(PROMPT)]
                    engine.eval_batch([(sequence, ids)], by_rows=False)
            for _ in range(options.rounds):
                logits = {}
                for way, (engine, by_rows) in ways.items():
                    batch = [(sequence, [100 + number]) for number, sequence in enumerate(sequences[way])]
                    began = perf_counter()
                    logits[way] = engine.eval_batch(batch, by_rows=by_rows)
                    times[way].append(perf_counter() - began)
                    logits[way] = logits[way].copy()
                assert np.array_equal(logits["strips"], logits["tiles"]), "strips and tiles differ"
            for found in sequences.values():
                for sequence in found:
                    sequence.close()
            medians = [statistics.median(times[way]) for way in ways]
            print(
                f"{count:6} " + " ".join(f"{t * 1e3:6.2f} ({count / t:4.0f})"[:13].rjust(13) for t in medians),
                flush=True,
            )


if __name__ == "__main__":
    main()
