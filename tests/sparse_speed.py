"""Decoding speed of the sparse modes against the bytes that they read, all in one process, taking turns.

Not a test of the suite: `python tests/sparse_speed.py MODEL.gguf [--threads N] [--modes exact,predict]`. Dense is the
engine without the section, that is, the best one: it reads ffn_down as the file has it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from hotcold import Engine

LIMIT = 1.15  # of the ratio of bytes


def other_bytes(engine: Engine) -> int:
    """Bytes of weights that a step of one token reads outside the FFNs."""
    ffn = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")
    skipped = () if engine.config.tied_output else ("token_embd.weight",)
    return sum(t.nbytes for name, t in engine.file.tensors.items() if not name.endswith(ffn) and name not in skipped)


def decode(engine: Engine, ids: list[int]) -> float:
    """Seconds a token, one by one after the first."""
    sequence = engine.new_sequence()
    try:
        engine.eval(sequence, ids[:1])
        start = time.perf_counter()
        for token in ids[1:]:
            engine.eval(sequence, [token])
        return (time.perf_counter() - start) / (len(ids) - 1)
    finally:
        sequence.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--modes", default="exact,predict")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    common = {"n_ctx": arguments.tokens, "n_threads": arguments.threads}
    engines = {"dense": Engine(arguments.model, sparsity="dense", use_section=False, **common)}
    engines |= {mode: Engine(arguments.model, sparsity=mode, **common) for mode in arguments.modes.split(",")}
    dense = engines["dense"]
    ids = np.random.default_rng(0).integers(0, dense.n_vocab, arguments.tokens).tolist()
    times: dict[str, list[float]] = {mode: [] for mode in engines}
    for round_ in range(arguments.repetitions + 1):
        for mode, engine in engines.items():
            before = engine.usage
            seconds = decode(engine, ids)
            if round_:  # the first warms up
                times[mode].append(seconds)
            used = engine.usage - before
            if round_ == arguments.repetitions:
                rest = other_bytes(dense)
                total, whole = rest + used.step_bytes, rest + used.dense_bytes / used.steps
                ratio = statistics.median(times[mode]) / statistics.median(times["dense"])
                verdict = "" if mode == "dense" else f", {ratio / (total / whole):.3f} of it (limit {LIMIT})"
                print(
                    f"{mode:14} {1000 * statistics.median(times[mode]):7.2f} ms a token, {used.density:6.1%} active, "
                    f"{total / 1e6:7.1f} MB read; time {ratio:.3f}, bytes {total / whole:.3f} of dense{verdict}, "
                    f"predictors {used.predictor_share:.1%} of the time"
                )


if __name__ == "__main__":
    main()
