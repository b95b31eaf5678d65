"""Decoding speed after a short and after a long context, by the types of the KV cache, as Markdown rows.

    python tests/context_speed.py MODEL.gguf [--threads 1,2] [--contexts 512,8000] [--caches f16/f16,q8_0/q4_0]

The contexts take turns, in rounds of which the first warms up; medians. `by bytes` is what their ratio would be
if a step took as long as reading its weights, keys and values: what a machine bound by memory could reach at most.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from hotcold import Engine
from hotcold.runtime.limits import weights
from hotcold.runtime.models import resolve

TOKENS = 24  # of a measurement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--contexts", default="512,8000")
    parser.add_argument("--caches", default="f16/f16,q8_0/q8_0,q8_0/q4_0,q4_0/q4_0")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    path = resolve(options.model)
    contexts = [int(n) for n in options.contexts.split(",")]
    print("| keys/values | threads | " + " | ".join(f"{n} tokens" for n in contexts) + " | ratio | by bytes |")
    print("|" + "---|" * (len(contexts) + 4))
    for threads in map(int, options.threads.split(",")):
        for caches in options.caches.split(","):
            keys, values = caches.split("/")
            room = {"n_ctx": max(contexts) + TOKENS, "n_parallel": len(contexts), "n_threads": threads}
            with Engine(path, cache_type_k=keys, cache_type_v=values, **room) as engine:
                rng = np.random.default_rng(0)
                sequences = [engine.new_sequence() for _ in contexts]
                for sequence, n in zip(sequences, contexts, strict=True):
                    engine.eval(sequence, rng.integers(0, engine.n_vocab, n))
                times: list[list[float]] = [[] for _ in contexts]
                for turn in range(options.rounds + 1):
                    for sequence, n, found in zip(sequences, contexts, times, strict=True):
                        ids = rng.integers(0, engine.n_vocab, TOKENS)
                        start = time.perf_counter()
                        for token in ids:
                            engine.eval(sequence, [int(token)])
                        if turn:
                            found.append((time.perf_counter() - start) / TOKENS)
                        sequence.truncate(n)
                medians = [statistics.median(found) for found in times]
                read = sum(nbytes for _, nbytes in weights(engine).values())
                each = engine.kv_bytes / (len(contexts) * room["n_ctx"])  # of a token, blocks rounded up
                floors = [read + each * n for n in contexts]
            speeds = " | ".join(f"{1 / seconds:.0f}" for seconds in medians)
            ratio, most = medians[0] / medians[-1], floors[0] / floors[-1]
            print(f"| {caches} | {threads} | {speeds} | **{ratio:.2f}** | {most:.2f} |", flush=True)


if __name__ == "__main__":
    main()
