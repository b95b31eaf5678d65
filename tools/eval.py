"""`hotcold eval`: quality over density of a model's modes, against the model that it was made from."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..formats.errors import ParameterError
from . import console, options
from .console import note, printable

if TYPE_CHECKING:
    from ..solver.evaluate import Report, Row, Score

Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help="GGUF files or names, as for `hotcold run`.")]
Against = Annotated[
    str | None, typer.Option("--against", metavar="TEACHER", help="What ratios are to [the first model, dense].")
]
Text = Annotated[
    list[Path] | None, typer.Option("--text", metavar="FILE", help="UTF-8 text; may be given more than once.")
]
NoDefaultText = Annotated[bool, typer.Option("--no-default-text", help="Leave Python's own help topics out.")]
Modes = Annotated[
    list[str] | None,
    typer.Option("--sparsity", metavar="MODE", help="Measure this mode; may be repeated [all that a model has]."),
]
Chunks = Annotated[int, typer.Option("--chunks", min=-1, metavar="N", help="Windows of each text; -1 is all.")]
Window = Annotated[int, typer.Option("--ctx", "--ctx-size", "-c", min=16, metavar="N", help="Tokens in a window.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw quality over density.")]
Prompts = Annotated[bool, typer.Option("--prompts", help="Print the answers to five chat prompts, too.")]
Tasks = Annotated[
    str | None,
    typer.Option("--tasks", metavar="NAME,...", help="Run tasks of lm-evaluation-harness, too."),
]
TaskFolder = Annotated[Path | None, typer.Option("--tasks-from", metavar="DIR", help="More tasks, as YAML files.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Questions of each task [all].")]

HEAD = ("", "active", "by layer", "FFN read", "perplexity", "ratio", "KL", "same token")


def evaluate(
    models: Models,
    against: Against = None,
    texts: Text = None,
    no_default_text: NoDefaultText = False,
    sparsity: Modes = None,
    chunks: Chunks = 8,
    ctx: Window = 512,
    plot: Plot = None,
    prompts: Prompts = False,
    tasks: Tasks = None,
    tasks_from: TaskFolder = None,
    limit: Limit = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare a model's modes with the model that it was made from."""
    from ..solver import evaluate as library
    from ..solver import harness
    from ..solver import plot as picture

    if tasks:
        harness.check()
    elif tasks_from is not None or limit is not None:
        raise ParameterError(f"{'--limit' if limit else '--tasks-from'}: got it without --tasks, which it is for")
    if plot is not None:
        picture.check(plot)
    if chunks == 0:
        raise ParameterError("--chunks: got 0, wanted at least 1, or -1 for all")
    found = {path.resolve(): path for path in map(console.find_model, models)}
    paths = list(found.values())
    teacher = console.find_model(against) if against else paths[0]
    teacher = found.get(teacher.resolve(), teacher)
    status = console.StatusLine()
    try:
        report = library.evaluate(
            paths, teacher, sparsity or (), texts or (), not no_default_text, ctx, chunks, threads, status
        )
        status.clear()
        for line in report.notes:
            note(line)
        if not as_json:  # before what may still fail
            _print(report, ctx)
            _print_notes(report)
        answers, scores = list[list[str]](), list[dict[str, dict[str, float]]]()
        try:
            if plot is not None:
                picture.plot_quality(report, plot)
                note(f"drawn to {plot}")
            answers = _answers(report, threads, status) if prompts else []
            scores = _tasks(report, tasks.split(","), tasks_from, limit, threads, status) if tasks else []
        finally:
            status.clear()
            if as_json:
                print(json.dumps(_as_json(report, ctx, answers, scores), ensure_ascii=False))
    finally:
        status.clear()
    if not as_json:
        _print_tasks(report, scores)
        _print_answers(report, answers)


def _answers(report: Report, threads: int | None, status: console.StatusLine) -> list[list[str]]:
    """Of every row, to each prompt; none, and a note, where there is no chat template."""
    from ..formats.chat_template import load_template
    from ..formats.gguf import GGUFFile
    from ..runtime.engine import Engine
    from ..runtime.llm import LLM
    from ..solver import conversations

    with GGUFFile(report.rows[0].model) as file:
        if not file.metadata.get("tokenizer.chat_template"):
            note(f"no prompts: {file.path} has not a chat template")
            return []
        template = load_template(file)
    found = []
    for row in report.rows:
        status(f"{row.model.stem}, {row.mode}: answering")
        engine = Engine(row.model, n_ctx=512, n_threads=threads, sparsity=row.mode, progress=status)
        with LLM.from_engine(engine, template=template) as llm:
            found.append(conversations.answers(llm))
    return found


def _tasks(
    report: Report,
    names: list[str],
    folder: Path | None,
    limit: int | None,
    threads: int | None,
    status: console.StatusLine,
) -> list[dict[str, dict[str, float]]]:
    from ..runtime.llm import LLM
    from ..solver import harness

    found = []
    for row in report.rows:
        status(f"{row.model.stem}, {row.mode}: lm-evaluation-harness")
        with LLM(row.model, n_ctx=2048, n_threads=threads, sparsity=row.mode, progress=status) as llm:
            found.append(harness.run(llm, names, limit, folder))
    return found


def _label(row: Row) -> str:
    return printable(f"{row.model.stem} {row.mode}")


def _cells(row: Row, score: Score, first: bool) -> tuple[str, ...]:
    layers = f"{min(score.densities):.0%} - {max(score.densities):.0%}" if min(score.densities) < 1 else ""
    own = f"{score.perplexity:.3f} +/- {score.error:.3f}"
    found = (_label(row), f"{score.density:.1%}", layers, f"{score.read:.1%}", own)
    if first:
        return (*found, "", "", "")
    return (*found, f"{score.ratio:.4f} +/- {score.ratio_error:.4f}", f"{score.kl:.4f}", f"{score.same:.1%}")


def _print(report: Report, ctx: int) -> None:
    """A table with a part for each text: drawn on a terminal, else in aligned columns."""
    parts = {}
    for text in report.texts:
        title = f"{printable(text.name)}, {len(text.windows)} window{'s' * (len(text.windows) > 1)} of {ctx} tokens"
        parts[title] = [_cells(row, row.scores[text.name], row is report.rows[0]) for row in report.rows]
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table

        for title, rows in parts.items():
            table = Table(*HEAD, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
            for number, column in enumerate(table.columns):
                column.justify, column.overflow = ("right" if number else "left"), "fold"
            for row in rows:
                table.add_row(*row)
            Console(highlight=False, markup=False).print(table)
        return
    widths = [max(len(row[i]) for rows in parts.values() for row in [HEAD, *rows]) for i in range(len(HEAD))]
    for title, rows in parts.items():
        print(title)
        for row in [HEAD, *rows]:
            cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
            print("  ".join([f"{row[0]:<{widths[0]}}", *cells]).rstrip())
        print()


def _print_notes(report: Report) -> None:
    """What the columns are, and the skews."""
    from ..solver.evaluate import PUBLISHED_SKEWS

    print(f"ratio (of perplexities), KL (nats a token) and same token (greedy): to {_label(report.rows[0])}")
    print("FFN read: bytes of weights that a token reads, of those of gate, up and down")
    skews: dict[tuple[Path, float], Row] = {}  # predictors change nothing in what a model's neurons do
    for row in report.rows:
        if row.skew is not None:
            skews.setdefault((row.model, row.skew), row)
    if skews:
        others = ", ".join(f"{share:.0%} in {name}" for name, share in PUBLISHED_SKEWS.items())
        print(f"neurons that give 80 % of the activations (PowerInfer's models: {others}):")
    for (_, skew), row in skews.items():
        print(f"  {skew:.1%} in {_label(row)}")


def _print_tasks(report: Report, scores: list[dict[str, dict[str, float]]]) -> None:
    for task in scores[0] if scores else []:
        print(f"\n{task}")
        for row, found in zip(report.rows, scores, strict=True):
            shown = ", ".join(f"{name.partition(',')[0]} {value:.4f}" for name, value in found[task].items())
            print(f"  {_label(row)}: {shown}")


def _print_answers(report: Report, answers: list[list[str]]) -> None:
    from ..solver.conversations import PROMPTS

    for number, prompt in enumerate(PROMPTS if answers else ()):
        print(f"\n> {prompt}")
        for row, found in zip(report.rows, answers, strict=True):
            text = printable(found[number]).strip().replace("\n", "\n    ")
            print(f"  {_label(row)}:\n    {text}")


def _as_json(
    report: Report, ctx: int, answers: list[list[str]], scores: list[dict[str, dict[str, float]]]
) -> dict[str, Any]:
    from ..solver.conversations import PROMPTS
    from ..solver.evaluate import PUBLISHED_SKEWS

    rows = []
    for number, row in enumerate(report.rows):
        texts = {name: {**asdict(score), "density": score.density} for name, score in row.scores.items()}
        one: dict[str, Any] = {"model": str(row.model), "mode": row.mode, "series": row.series, "skew": row.skew}
        one["texts"] = texts
        if answers:
            one["answers"] = dict(zip(PROMPTS, answers[number], strict=True))
        if scores:
            one["tasks"] = scores[number]
        rows.append(one)
    return {
        "against": str(report.rows[0].model),
        "n_ctx": ctx,
        "windows": {text.name: len(text.windows) for text in report.texts},
        "notes": report.notes,
        "published_skews": PUBLISHED_SKEWS,
        "rows": rows,
    }
