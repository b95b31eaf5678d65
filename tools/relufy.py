"""`hotcold relufy`: make a ReLU model, which needs only its active neurons, out of a SwiGLU or GeGLU model."""

from __future__ import annotations

import signal
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

Texts = Annotated[list[Path] | None, typer.Argument(metavar="TEXT", help="UTF-8 text files to train on.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="OUT.gguf", help="File to write; replaced if it is there.")]
Text = Annotated[
    str | None,
    typer.Option("--text", metavar="self", help="self: the model writes its training text, if you have none."),
]
Minutes = Annotated[
    float | None, typer.Option("--minutes", metavar="N", help="Time for everything; the stages share it [90].")
]
Tokens = Annotated[
    int | None,
    typer.Option("--tokens", metavar="N", help="Train on N tokens, in whole steps, not for a time: the same file."),
]
Density = Annotated[float, typer.Option("--density", metavar="D", help="Mean share of active neurons to reach.")]
LowRank = Annotated[
    int, typer.Option("--low-rank", metavar="R", help="Train updates of rank R, and write them as a LoRA adapter.")
]
Sweeps = Annotated[int, typer.Option("--sweeps", metavar="N", help="Passes through the layers, one by one.")]
FitTokens = Annotated[int, typer.Option("--fit-tokens", metavar="N", help="Tokens of each of these passes.")]
Chat = Annotated[float, typer.Option("--chat", metavar="S", help="Share of dialogues that the model writes itself.")]
Own = Annotated[float, typer.Option("--own", metavar="S", help="Share of documents that the model writes itself.")]
Rate = Annotated[
    float | None, typer.Option("--lr", metavar="X", help="Highest learning rate [3e-4, or 1e-3 with --low-rank].")
]
Batch = Annotated[int, typer.Option("--batch-size", "-b", metavar="N", help="Tokens of a step.")]
Ubatch = Annotated[int, typer.Option("--ubatch-size", "-ub", metavar="N", help="Tokens in memory at once.")]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Compute blocks twice to save memory (gradient checkpointing).")
]
Type = Annotated[str | None, typer.Option("--type", help="Type of the new matrices [its own if a float, else Q8_0].")]
Seed = Annotated[int, typer.Option("--seed", "-s", metavar="N", help="Seed of the order of the text.")]


def relufy(
    model: options.Model,
    out: Out,
    texts: Texts = None,
    text: Text = None,
    minutes: Minutes = None,
    tokens: Tokens = None,
    density: Density = 0.3,
    low_rank: LowRank = 0,
    sweeps: Sweeps = 1,
    fit_tokens: FitTokens = 32768,
    chat: Chat = 0.25,
    own: Own = 0.25,
    lr: Rate = None,
    batch_size: Batch = 2048,
    ubatch_size: Ubatch = 2048,
    checkpointing: Checkpointing = False,
    type: Type = None,
    seed: Seed = 0,
    threads: options.Threads = None,
) -> None:
    """Retrain a model's feed-forward networks with ReLU, so that few of their neurons are active."""
    from ..formats.config import ModelConfig
    from ..formats.errors import ParameterError
    from ..formats.gguf import GGUFFile
    from ..formats.tokenizer import load_tokenizer
    from ..solver import corpus, relu_file
    from ..solver import relufy as library
    from ..solver.relufy_checks import LOW_RANK_LR, WHOLE_LR, Effort, Recipe, check_model, check_out, require_torch

    if text not in (None, "self"):
        raise ParameterError(f"--text: got {text!r:.40}, wanted self; files are named without an option")
    if bool(texts) == (text == "self"):
        raise ParameterError("TEXT: got text files and --text self, or neither; wanted one of them")
    if minutes is not None and tokens is not None:
        raise ParameterError("--minutes: got it with --tokens; wanted one of them")
    if low_rank and type is not None:
        raise ParameterError("--type: got it with --low-rank, but an adapter's matrices get theirs when it is merged")
    rate = (LOW_RANK_LR if low_rank else WHOLE_LR) if lr is None else lr
    recipe = Recipe(fit_tokens, sweeps, chat, own, batch_size, low_rank, seed)
    minutes = 90.0 if minutes is None and tokens is None else minutes
    effort = Effort(density, minutes, tokens, rate, ubatch_size, checkpointing)
    path = console.find_model(model)
    check_out(out, [path, *(texts or ())])
    with GGUFFile(path) as source:
        config = ModelConfig.from_gguf(source)
        check_model(source, config)
        kind = relu_file.choose_type(source, config, "F32" if low_rank else type)
        if type is None and not low_rank and (before := source.tensors["blk.0.ffn_gate.weight"].type) != kind:
            note(f"the new matrices are {kind.name}, as {before.name} would cost quality; --type chooses another")
        require_torch(threads)
        brought = corpus.load(texts, load_tokenizer(source)) if texts else None
        with _interruptible(), _progress() as (say, advance):
            report = library.relufy(source, brought, out, recipe, effort, kind, say, advance)
    _print(out, report, None if low_rank else kind.name)


def _print(out: Path, report: Report, kind: str | None) -> None:
    """kind: that the matrices were rounded to; None: an adapter."""
    low, high = min(report.densities), max(report.densities)
    ratio = report.perplexity / report.teacher_perplexity
    print(out)
    print(f"active neurons      {report.density:.1%} (layers {low:.1%} to {high:.1%})")
    print(f"held-out perplexity {report.perplexity:.2f}, {ratio:.3f} x the teacher's {report.teacher_perplexity:.2f}")
    print(f"trained             {report.tokens} tokens in {report.minutes:.0f} minutes")
    if kind is None:
        note(
            f"{human_bytes(out.stat().st_size)}; run it with --lora {printable(str(out))} on the model it was made for"
        )
    else:
        note(f"measured before the matrices were rounded to {kind}; hotcold eval measures the file")
        note(f"{human_bytes(out.stat().st_size)}; llama.cpp refuses this file: it does not know the bypass")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Have a request to end (SIGTERM) keep the work as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
