"""What the commands of the offline half share: their options, a progress bar over tokens, saving into the section."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import download_bar, human_bytes, note

if TYPE_CHECKING:
    from ..formats.section_file import Contents
    from ..runtime.engine import Engine
    from ..solver.corpus import Corpus

WINDOW = 512  # tokens, for perplexity

Texts = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[TEXT]...", help="UTF-8 text files; without any, Python's own help topics."),
]
Tokens = Annotated[int | None, typer.Option("--tokens", "-n", min=2, metavar="N", help="Use the first N tokens.")]
Sidecar = Annotated[bool, typer.Option("--sidecar", help="Write a file beside the model instead of into it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "--no-save", help="Print the result and save nothing.")]


@contextmanager
def token_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A callback that takes how many of `total` are done: a bar on a terminal, one line elsewhere."""
    if not sys.stderr.isatty():
        note(f"{what}: {total}")
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total)
        yield lambda done: bars.update(task, completed=done)


def save(model: Path, contents: Contents, sidecar: bool) -> Path:
    """Merge new contents into the model's section and say where they went."""
    from ..formats.section_file import update_section

    with download_bar() as progress:
        where = update_section(model, contents, sidecar=sidecar, progress=progress)
    size = sum(tensor.nbytes for tensor in contents.tensors)
    note(f"{human_bytes(size)} {'attached to' if where == model else 'written to'} {where}")
    return where


def perplexity(engine: Engine, text: Corpus) -> float | None:
    """Of the whole windows of a text; None, and a note, where it has none."""
    from ..solver import perplexity as estimator

    window = min(WINDOW, engine.n_ctx)
    total = len(text) // window
    if not total or window < 8:
        note(f"{len(text)} held-out tokens are too few for perplexity: wanted at least {window}")
        return None
    with token_bar("perplexity, windows", total) as progress:
        done = 0

        def advance(_: object) -> None:
            nonlocal done
            done += 1
            progress(done)

        return estimator.perplexity(engine, text.ids.tolist(), window, text.bos, total, advance).ppl
