"""Decoding speed of the sparse modes against the bytes that they read, all in one process, taking turns.

Not a test of the suite: `python tests/sparse_speed.py MODEL.gguf [--threads N] [--modes exact,predict]`. Dense is the
engine without the section, that is, the best one: it reads ffn_down as the file has it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hotcold import Engine

LIMIT = 1.1  # of the ratio of bytes


@dataclass(frozen=True)
class Result:
    """Of a mode: seconds and bytes of weights a token, both also as shares of the dense engine's."""

    seconds: float
    nbytes: float
    density: float
    predictor_share: float
    time_ratio: float
    byte_ratio: float

    @property
    def over(self) -> float:
        """Time over what the bytes would take at the dense engine's speed."""
        return self.time_ratio / self.byte_ratio


def other_bytes(engine: Engine) -> int:
    """Bytes of weights that a step of one token reads outside the FFNs."""
    ffn = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight", "ffn_bypass.weight")
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


def measure(
    model: str | Path, modes: list[str], n_threads: int, n_tokens: int = 32, repetitions: int = 9
) -> dict[str, Result]:
    """Decoding in dense and the given modes: medians of times and of ratios to the dense time of the same round."""
    engines = {"dense": Engine(model, sparsity="dense", use_section=False, n_ctx=n_tokens, n_threads=n_threads)}
    try:
        for mode in modes:
            engines[mode] = Engine(model, sparsity=mode, n_ctx=n_tokens, n_threads=n_threads)
        dense = engines["dense"]
        ids = np.random.default_rng(0).integers(0, dense.n_vocab, n_tokens).tolist()
        times: dict[str, list[float]] = {mode: [] for mode in engines}
        start = {}
        for round_ in range(repetitions + 1):
            for mode, engine in engines.items():
                if round_ == 1:
                    start[mode] = engine.usage
                seconds = decode(engine, ids)
                if round_:  # the first warms up
                    times[mode].append(seconds)
        rest, found = other_bytes(dense), {}
        for mode, engine in engines.items():
            used = engine.usage - start[mode]
            total, whole = rest + used.step_bytes, rest + used.dense_bytes / used.steps
            ratios = [own / other for own, other in zip(times[mode], times["dense"], strict=True)]
            numbers = used.density, used.predictor_share, statistics.median(ratios), total / whole
            found[mode] = Result(statistics.median(times[mode]), total, *numbers)
        return found
    finally:
        for engine in engines.values():
            engine.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--modes", default="exact,predict")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    results = measure(options.model, options.modes.split(","), options.threads, options.tokens, options.repetitions)
    for mode, r in results.items():
        verdict = "" if mode == "dense" else f", {r.over:.3f} of it (limit {LIMIT})"
        print(
            f"{mode:14} {1000 * r.seconds:7.2f} ms a token, {r.density:6.1%} active, {r.nbytes / 1e6:7.1f} MB read; "
            f"time {r.time_ratio:.3f}, bytes {r.byte_ratio:.3f} of dense{verdict}, "
            f"predictors {r.predictor_share:.1%} of the time"
        )


if __name__ == "__main__":
    main()
