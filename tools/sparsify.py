"""`hotcold sparsify`: thresholds for running any gated model with fewer neurons, and what each density costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..formats.errors import ParameterError, UnsupportedError
from . import console, offline, options
from .console import human_bytes, note

if TYPE_CHECKING:
    from ..solver.corpus import Corpus

HELD_OUT = 8192  # tokens, from the text's end, for perplexity and densities
HELD_OUT_SHARE = 0.4  # of the text, at most
TOKENS, MIN_TOKENS = 24_576, 64

Densities = Annotated[
    list[float] | None,
    typer.Option("--density", "-d", metavar="D", help="Share of neurons to keep; may be given more than once."),
]
NoPerplexity = Annotated[bool, typer.Option("--no-perplexity", help="Do not measure perplexity.")]
Tokens = Annotated[int, typer.Option("--tokens", "-n", min=2, metavar="N", help="Use the first N tokens.")]
DownType = Annotated[
    str | None,
    typer.Option("--down-type", metavar="TYPE", help="Of the copy of ffn_down [its own if a float, else Q8_0]."),
]


def sparsify(
    model: options.Model,
    texts: offline.Texts = None,
    density: Densities = None,
    tokens: Tokens = TOKENS,
    down_type: DownType = None,
    no_perplexity: NoPerplexity = False,
    sidecar: offline.Sidecar = False,
    dry_run: offline.DryRun = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Choose activation thresholds by density, and show what they cost."""
    from ..formats.gguf import GGUFFile
    from ..formats.section_file import Contents
    from ..formats.tokenizer import load_tokenizer
    from ..solver import corpus, priors, thresholds, transpose

    wanted = sorted({priors.check_density(each) for each in density or thresholds.DENSITIES}, reverse=True)
    path = console.find_model(model)
    with console.open_engine(str(path), None, threads, "dense", use_section=False) as engine:
        config = engine.config
        if config.n_expert:
            what = f"{path}: a mixture of experts reads few of its neurons already"
            raise UnsupportedError(f"{what}; `hotcold sparsify` is for models without experts")
        kind = transpose.check_type(down_type, config) if down_type else None
        text = corpus.load(texts or [], load_tokenizer(engine.file), tokens)
        if len(text) < MIN_TOKENS:
            raise ParameterError(f"{text.name}: got {len(text)} tokens, wanted at least {MIN_TOKENS}, better {TOKENS}")
        known, held_out = text.split(min(HELD_OUT, int(len(text) * HELD_OUT_SHARE)))
        norms = transpose.down_norms(engine.file, config)
        with offline.token_bar("looking at activations, tokens", len(text)) as progress:
            found = thresholds.collect(engine, known, norms, progress)
            checked = thresholds.collect(engine, held_out, norms, lambda done: progress(len(known) + done))
        values = thresholds.table(found, wanted, thresholds.cheapest)
        sizes = thresholds.reads(engine.file, config, kind)
        ppl = None if no_perplexity else offline.perplexity(engine, held_out)
    rows = [_row(1.0, 1.0, sizes.dense, sizes.dense, ppl)]
    for each, chosen in zip(wanted, values, strict=True):
        share = float(thresholds.densities(checked, chosen).mean())
        rows.append(_row(each, share, sizes.at(share), sizes.dense, None))
    if not dry_run:
        with GGUFFile(path) as file:
            limits, copy = thresholds.contents(wanted, values), transpose.contents(file, config, kind)
            offline.save(path, Contents(limits.metadata, limits.tensors + copy.tensors), sidecar)
        if not no_perplexity:
            for row in rows[1:]:
                row["perplexity"] = _sparse_perplexity(path, row["wanted"], threads, held_out)
    elif not no_perplexity:
        note("perplexity at the thresholds is measured once they are saved, without --dry-run")
    report = {
        "model": model,
        "dataset": text.name,
        "tokens": len(known),
        "held_out": len(held_out),
        "rows": rows,
    }
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _print(report)


def _row(wanted: float, density: float, read: float, dense: float, ppl: float | None) -> dict[str, Any]:
    return {
        "wanted": wanted,
        "density": density,
        "perplexity": ppl,
        "ffn_bytes_per_token": round(read),
        "ratio": read / dense,
    }


def _sparse_perplexity(path: Path, density: float, threads: int | None, held_out: Corpus) -> float | None:
    with console.open_engine(str(path), None, threads, sparsity=f"threshold={density:g}") as engine:
        return offline.perplexity(engine, held_out)


def _print(report: dict[str, Any]) -> None:
    print(f"thresholds from {report['tokens']} tokens of {console.printable(report['dataset'])}", end="")
    print(f", measured on {report['held_out']} others")
    print(f"{'density':>8}  {'measured':>8}  {'perplexity':>10}  {'cost':>7}  {'FFN read/token':>14}  {'of dense':>8}")
    dense = report["rows"][0]["perplexity"]
    for row in report["rows"]:
        ppl = row["perplexity"]
        shown = "-" if ppl is None else f"{ppl:.3f}"
        cost = "-" if ppl is None or row["wanted"] == 1.0 else f"{ppl / dense - 1:+.1%}"
        print(
            f"{row['wanted']:>8g}  {row['density']:>8.1%}  {shown:>10}  {cost:>7}"
            f"  {human_bytes(row['ffn_bytes_per_token']):>14}  {row['ratio']:>8.2f}"
        )
