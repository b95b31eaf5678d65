"""The `hotcold` command: one Typer app, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..formats.errors import HotcoldError
from . import (
    bench,
    chat,
    convert,
    perplexity,
    place,
    profile,
    pull,
    quantize,
    relufy,
    run,
    section,
    serve,
    show,
    sparsify,
    synthetic,
    train_predictor,
)
from . import eval as evaluation

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PIPE = 1, 130, 141


class Commands(TyperGroup):
    """The command group; what a command raises ends here, inside Typer, which would print tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result
            except KeyboardInterrupt:
                raise SystemExit(EXIT_INTERRUPTED) from None
            except BrokenPipeError:
                # Whoever read us has gone: nothing to say, and nothing left to flush at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise SystemExit(EXIT_PIPE) from None
            except Exception as exc:
                if hasattr(exc, "exit_code") or isinstance(exc, typer.Abort):
                    raise  # Typer's own: --help, wrong usage
                if os.environ.get("HOTCOLD_DEBUG") == "1":
                    traceback.print_exc()
                print(f"hotcold: error: {_message(exc)}", file=sys.stderr)
                raise SystemExit(EXIT_ERROR) from None


def _message(exc: BaseException) -> str:
    if isinstance(exc, HotcoldError):
        text = str(exc)
    elif isinstance(exc, MemoryError):
        text = f"{str(exc) or 'out of memory'}; try a shorter context (-c) or a smaller model"
    elif isinstance(exc, OSError):
        text = f"{exc.filename}: {exc.strerror}" if exc.filename and exc.strerror else str(exc)
    else:
        text = f"a bug: {type(exc).__name__}: {exc}; HOTCOLD_DEBUG=1 shows where, please report it"
    return " ".join(text.split())


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"hotcold: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _terminate(*_: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)


app = typer.Typer(
    name="hotcold",
    cls=Commands,
    help="Run GGUF language models on the CPU. Start with: hotcold chat",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("chat")(chat.chat)
app.command("run")(run.run)
app.command("serve")(serve.serve)
app.command("pull")(pull.pull)
app.command("inspect")(show.inspect)
app.command("section")(section.section)
app.command("attach")(section.attach)
app.command("detach")(section.detach)
app.command("convert")(convert.convert)
app.command("quantize")(quantize.quantize)
app.command("bench")(bench.bench)
app.command("perplexity")(perplexity.perplexity)
app.command("eval")(evaluation.evaluate)
app.command("profile")(profile.profile)
app.command("sparsify")(sparsify.sparsify)
app.command("place")(place.place)
app.command("train-predictor")(train_predictor.train_predictor)
app.command("relufy")(relufy.relufy)
app.command("synthesize")(synthetic.synthesize)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hotcold {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run GGUF language models on the CPU. Start with: hotcold chat"""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def main() -> None:
    """Entry point: exit 0, 1 for an error (one line on stderr), 2 for wrong usage, 130 after Ctrl-C."""
    # So that a `kill` unwinds the stack, and a download cleans up behind itself.
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()
