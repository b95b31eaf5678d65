"""`hotcold relufy`: make a ReLU model, which needs only its active neurons, out of a SwiGLU or GeGLU model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console, options
from .console import human_bytes, note, printable

if TYPE_CHECKING:
    from ..solver.relufy import Report

Texts = Annotated[list[Path], typer.Argument(metavar="TEXT...", help="UTF-8 text files to train on.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="OUT.gguf", help="File to write; replaced if it is there.")]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", help="Tokens that the layers are trained on in turn.")]
Epochs = Annotated[int, typer.Option("--epochs", metavar="N", help="Passes over these tokens.")]
Polish = Annotated[int, typer.Option("--polish", metavar="N", help="Tokens for all layers together; 0 is none.")]
Density = Annotated[float, typer.Option("--density", metavar="D", help="Mean share of active neurons to reach.")]
Chat = Annotated[float, typer.Option("--chat", metavar="S", help="Share of dialogues that the model writes itself.")]
Type = Annotated[str | None, typer.Option("--type", help="Type of the new matrices [its own if a float, else Q8_0].")]
Seed = Annotated[int, typer.Option("--seed", "-s", metavar="N", help="Seed of the order of the text.")]


def relufy(
    model: options.Model,
    texts: Texts,
    out: Out,
    tokens: Tokens = 98304,
    epochs: Epochs = 3,
    polish: Polish = 614400,
    density: Density = 0.33,
    chat: Chat = 0.33,
    type: Type = None,
    seed: Seed = 0,
    threads: options.Threads = None,
) -> None:
    """Retrain a model's feed-forward networks with ReLU, so that few of their neurons are active."""
    from ..formats.config import ModelConfig
    from ..formats.gguf import GGUFFile
    from ..formats.tokenizer import load_tokenizer
    from ..solver import corpus, relu_file
    from ..solver import relufy as library

    recipe = library.Recipe(tokens, epochs, polish, density, chat, seed)
    with GGUFFile(console.find_model(model)) as source:
        config = ModelConfig.from_gguf(source)
        library.check_model(source, config)
        kind = relu_file.choose_type(source, config, type)
        if type is None and (own := source.tensors["blk.0.ffn_gate.weight"].type) != kind:
            note(f"the new matrices are {kind.name}, as {own.name} would cost quality; --type chooses another")
        library.require_torch(threads)
        text = corpus.load(texts, load_tokenizer(source))
        with _progress() as (say, advance):
            report = library.relufy(source, text, out, recipe, kind, say, advance)
    _print(out, report)


def _print(out: Path, report: Report) -> None:
    low, high = min(report.densities), max(report.densities)
    ratio = report.perplexity / report.teacher_perplexity
    print(out)
    print(f"active neurons      {report.density:.1%} (layers {low:.1%} to {high:.1%})")
    print(f"held-out perplexity {report.perplexity:.2f}, {ratio:.3f} x the teacher's {report.teacher_perplexity:.2f}")
    note(f"{human_bytes(out.stat().st_size)}; llama.cpp would run this file with SiLU, which is wrong")


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], None]]]:
    """(say a line, move the bar): a bar below the lines on a terminal, only the lines elsewhere."""
    if not sys.stderr.isatty():
        yield note, lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("the teacher", total=None)
        current = ""

        def advance(what: str, done: int, total: int) -> None:
            nonlocal current
            if (stage := what.split(":")[0]) != current:
                current = stage
                bars.reset(task, total=total)  # so that the time left is that of this stage
            bars.update(task, description=what, completed=done, total=total)

        yield lambda text: bars.console.print(printable(text), highlight=False, markup=False), advance
