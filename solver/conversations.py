"""Conversations with a chat model on the runtime: those that it writes all by itself, and its answers to five prompts.

Given the opening of its own template, a chat model goes on with a user's message and an answer, as training taught it.
Source of the idea: Magpie (Xu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..runtime.engine import Engine
    from ..runtime.llm import LLM

TEMPERATURE, MIN_P = 0.8, 0.05  # without the latter, small models lose themselves in runs of emoji
PROMPTS = (
    "What is the capital of France?",
    "List three fruits.",
    "Explain photosynthesis in one sentence.",
    "Write a Python function that adds two numbers.",
    "Write a haiku about the sea.",
)
ANSWER_TOKENS = 90


def write(
    engine: Engine,
    start: list[int],
    n_windows: int,
    n_ctx: int,
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[list[int]]:
    """Windows of n_ctx token ids that begin with `start`; window i depends on the model, the seed and i alone.

    engine: one with n_parallel sequences or more, of which as many windows as it computes by rows are written at once.
    progress is called with the tokens written and wanted.
    """
    found: list[list[int]] = []
    for first in range(0, n_windows, engine.max_rows):
        numbers = range(first, min(first + engine.max_rows, n_windows))
        draws = [np.random.default_rng([seed, number]) for number in numbers]
        windows = [list(start) for _ in numbers]
        sequences = [engine.new_sequence() for _ in numbers]
        try:
            rows = np.concatenate([engine.eval(sequence, start).copy() for sequence in sequences])
            while True:
                for window, row, draw in zip(windows, rows, draws, strict=True):
                    window.append(_drawn(row, draw.random()))
                progress(len(found) * n_ctx + sum(map(len, windows)), n_windows * n_ctx)
                if len(windows[0]) == n_ctx:
                    break
                batch = [(sequence, window[-1:]) for sequence, window in zip(sequences, windows, strict=True)]
                rows = engine.eval_batch(batch, by_rows=True)
        finally:
            for sequence in sequences:
                sequence.close()
        found += windows
    return found


def _drawn(logits: np.ndarray, place: float) -> int:
    """The token at a place, 0 to 1, of the distribution."""
    shares = np.exp((logits.astype(np.float64) - logits.max()) / TEMPERATURE)
    shares[shares < MIN_P] = 0
    shares = shares.cumsum()
    return min(int(np.searchsorted(shares, place * shares[-1], side="right")), len(shares) - 1)


def answers(llm: LLM) -> list[str]:
    """Greedy answers to PROMPTS, each at most ANSWER_TOKENS long."""
    return [
        llm.chat([{"role": "user", "content": prompt}], max_tokens=ANSWER_TOKENS, temperature=0) for prompt in PROMPTS
    ]
