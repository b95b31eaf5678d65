"""`hotcold perplexity`: how well a model predicts a text, with llama.cpp's windows and scoring."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ..formats.errors import ParameterError
from ..solver import perplexity as estimator
from . import console, options

TextFile = Annotated[Path, typer.Argument(metavar="TEXTFILE", help="UTF-8 text to predict.")]
Window = Annotated[int, typer.Option("--ctx", "--ctx-size", "-c", min=8, metavar="N", help="Tokens in a window.")]
Chunks = Annotated[int, typer.Option("--chunks", min=-1, metavar="N", help="Score the first N windows; -1 scores all.")]


def perplexity(
    model: options.Model,
    textfile: TextFile,
    ctx: Window = 512,
    chunks: Chunks = -1,
    threads: options.Threads = None,
    sparsity: options.Sparsity = "auto",
    lora: options.Lora = None,
    load: options.Load = "auto",
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    as_json: options.AsJson = False,
) -> None:
    """Measure how well a model predicts a text."""
    text = textfile.read_text(encoding="utf-8", errors="replace")
    types = {"cache_type_k": cache_type_k, "cache_type_v": cache_type_v}
    with console.open_engine(model, ctx, threads, sparsity, True, options.adapters(lora), load=load, **types) as engine:
        from ..formats.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(engine.file)
        ids = tokenizer.encode(text)
        if len(ids) < 2 * ctx:
            raise ParameterError(f"{textfile}: got {len(ids)} tokens, wanted at least {2 * ctx} (twice -c)")
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        total = len(ids) // ctx if chunks < 0 else min(chunks, len(ids) // ctx)
        with _bar(total) as advance:
            estimate = estimator.perplexity(engine, ids, ctx, bos, total, advance)
    report = {
        "model": model,
        "text": str(textfile),
        "n_ctx": ctx,
        **types,
        "chunks": total,
        "tokens_scored": estimate.count,
        "perplexity": estimate.ppl,
        "error": estimate.error,
    }
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(f"perplexity {estimate.ppl:.4f} +/- {estimate.error:.4f} ({total} windows of {ctx} tokens)")


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
