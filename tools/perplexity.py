"""`hotcold perplexity`: how well a model predicts a text, with llama.cpp's windows and scoring.

The text is cut into windows of n_ctx tokens that do not overlap; the first token of each becomes BOS where
the model wants one, and only the second half is scored, so that every scored token has a context.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from ..formats.errors import ParameterError
from . import console, options

if TYPE_CHECKING:
    from ..runtime.engine import Engine

LOGITS_BYTES = 128 << 20  # of logits that one eval may return
BLOCK_ROWS = 32

TextFile = Annotated[Path, typer.Argument(metavar="TEXTFILE", help="UTF-8 text to predict.")]
Window = Annotated[int, typer.Option("--ctx", "--ctx-size", "-c", min=8, metavar="N", help="Tokens in a window.")]
Chunks = Annotated[int, typer.Option("--chunks", min=-1, metavar="N", help="Score the first N windows; -1 scores all.")]


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
    model: options.Model,
    textfile: TextFile,
    ctx: Window = 512,
    chunks: Chunks = -1,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure how well a model predicts a text."""
    text = textfile.read_text(encoding="utf-8", errors="replace")
    with console.open_engine(model, ctx, threads) as engine:
        from ..formats.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(engine.file)
        ids = tokenizer.encode(text)
        if len(ids) < 2 * ctx:
            raise ParameterError(f"{textfile}: got {len(ids)} tokens, wanted at least {2 * ctx} (twice -c)")
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        total = len(ids) // ctx if chunks < 0 else min(chunks, len(ids) // ctx)
        estimate = Estimate()
        with _bar(total) as advance:
            for window in windows(ids, ctx, bos, total):
                estimate.add(score(engine, window))
                advance(estimate)
    report = {
        "model": model,
        "text": str(textfile),
        "n_ctx": ctx,
        "chunks": total,
        "tokens_scored": estimate.count,
        "perplexity": estimate.ppl,
        "error": estimate.error,
    }
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(f"perplexity {estimate.ppl:.4f} +/- {estimate.error:.4f} ({total} windows of {ctx} tokens)")


def windows(ids: list[int], n_ctx: int, bos: int | None, total: int) -> Iterator[list[int]]:
    """The first `total` windows of n_ctx ids, each beginning with `bos` unless that is None."""
    for start in range(0, total * n_ctx, n_ctx):
        window = ids[start : start + n_ctx]
        yield window if bos is None else [bos, *window[1:]]


def score(engine: Engine, window: list[int]) -> np.ndarray:
    """Negative log-likelihoods (nats, float64) of the tokens in the second half of a window."""
    first = len(window) // 2
    rows = max(1, LOGITS_BYTES // (4 * engine.n_vocab))
    found = []
    sequence = engine.new_sequence()
    try:
        engine.eval(sequence, window[:first])
        # The logits at a position predict the token after it, so the last token is never evaluated.
        for start in range(first, len(window) - 1, rows):
            stop = min(start + rows, len(window) - 1)
            logits = engine.eval(sequence, window[start:stop], all_logits=True)
            found.append(_nll(logits, np.asarray(window[start + 1 : stop + 1])))
    finally:
        sequence.close()
    return np.concatenate(found)


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


def _bar(total: int) -> Any:
    """A context whose value takes the estimate after each window; a bar, if stderr is a terminal."""
    if not sys.stderr.isatty():
        return nullcontext(lambda estimate: None)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    class Bar(Progress):
        def __enter__(self) -> Any:
            super().__enter__()
            task = self.add_task("perplexity", total=total)
            return lambda estimate: self.update(
                task, advance=1, description=f"perplexity {estimate.ppl:.4f} +/- {estimate.error:.4f}"
            )

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    return Bar(*columns, console=Console(stderr=True), transient=True)
