"""How well a model predicts a text, with llama.cpp's windows and scoring.

The text is cut into windows of n_ctx tokens that do not overlap; the first token of each becomes BOS where
the model wants one, and only the second half is scored, so that every scored token has a context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..runtime.engine import Engine

LOGITS_BYTES = 128 << 20  # of logits that one eval may return
BLOCK_ROWS = 32


@dataclass
class Estimate:
    """Running sums over the scored tokens; `nll` in nats."""

    count: int = 0
    nll: float = 0.0
    nll2: float = 0.0

    def add(self, nll: np.ndarray) -> None:
        """Take in the negative log-likelihoods of some tokens (float64, 1-D)."""
        self.count += nll.size
        self.nll += float(nll.sum())
        self.nll2 += float((nll * nll).sum())

    @property
    def ppl(self) -> float:
        return math.exp(self.nll / self.count)

    @property
    def error(self) -> float:
        """Standard error of `ppl`; 0 for fewer than two tokens."""
        mean = self.nll / self.count
        variance = self.nll2 / self.count - mean * mean
        return self.ppl * math.sqrt(variance / (self.count - 1)) if self.count > 1 and variance > 0 else 0.0


def perplexity(
    engine: Engine,
    ids: Sequence[int],
    n_ctx: int,
    bos: int | None,
    total: int,
    progress: Callable[[Estimate], object] | None = None,
) -> Estimate:
    """The estimate over the first `total` windows of ids; progress is called with it after each window."""
    estimate = Estimate()
    for window in windows(ids, n_ctx, bos, total):
        estimate.add(score(engine, window))
        if progress is not None:
            progress(estimate)
    return estimate


def windows(ids: Sequence[int], n_ctx: int, bos: int | None, total: int) -> Iterator[list[int]]:
    """The first `total` windows of n_ctx ids, each beginning with `bos` unless that is None."""
    for start in range(0, total * n_ctx, n_ctx):
        window = list(ids[start : start + n_ctx])
        yield window if bos is None else [bos, *window[1:]]


def score(engine: Engine, window: list[int]) -> np.ndarray:
    """Negative log-likelihoods (nats, float64) of the tokens in the second half of a window."""
    rows = max(1, LOGITS_BYTES // (4 * engine.n_vocab))
    return np.concatenate([_nll(logits, targets) for logits, targets in blocks(engine, window, rows)])


def blocks(engine: Engine, window: list[int], rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(logits float32 [n, n_vocab], the tokens that follow [n]) of a window's second half, at most `rows` at a time.

    Logits hold until the engine's next call. A closed or exhausted iterator gives its room in the cache back.
    """
    first = len(window) // 2
    sequence = engine.new_sequence()
    try:
        engine.eval(sequence, window[:first])
        # The logits at a position predict the token after it, so the last token is never evaluated.
        for start in range(first, len(window) - 1, rows):
            stop = min(start + rows, len(window) - 1)
            logits = engine.eval(sequence, window[start:stop], all_logits=True)
            yield logits, np.asarray(window[start + 1 : stop + 1])
    finally:
        sequence.close()


def _nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] by row; in blocks, so that little memory is needed on top."""
    result = np.empty(len(targets))
    for start in range(0, len(targets), BLOCK_ROWS):
        block = logits[start : start + BLOCK_ROWS]
        top = block.max(axis=1)
        total = np.exp(block - top[:, None]).sum(axis=1, dtype=np.float64)
        wanted = block[np.arange(len(block)), targets[start : start + BLOCK_ROWS]]
        result[start : start + BLOCK_ROWS] = np.log(total) - (wanted.astype(np.float64) - top)
    return result
