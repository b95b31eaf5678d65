"""`hotcold chat`: the REPL, or one answer when something is piped in."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..formats.errors import HotcoldError, ParameterError
from . import console, gpu, options
from .conversation import CHAT_LENGTH, Conversation
from .fence import FENCE, fence_open, unfenced
from .run import read_stdin

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

REPEAT_PENALTY = 1.1  # as other chat programs have it: small models fall into loops without

Length = Annotated[
    int, typer.Option("--n-predict", "-n", min=-1, metavar="N", help="Tokens per answer; -1 is no limit.")
]


def chat(
    model: options.Model = options.DEFAULT_MODEL,
    system: options.System = None,
    n_predict: Length = CHAT_LENGTH,
    temp: options.Temp = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repeat_penalty: options.RepeatPenalty = None,
    seed: options.Seed = None,
    threads: options.Threads = None,
    ctx: options.Context = None,
    sparsity: options.Sparsity = "auto",
    vram_budget: options.VramBudget = None,
    require_gpu: options.RequireGpu = False,
    cold: options.Cold = "auto",
    trace: options.TraceFile = None,
    lora: options.Lora = None,
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    prompt_cache: options.PromptCache = None,
    lookup: options.Lookup = 0,
    load: options.Load = "auto",
) -> None:
    """Chat with a model, or answer what is piped in."""
    interactive = sys.stdin.isatty()
    question = "" if interactive else read_stdin().strip()
    if not interactive and not question:
        raise ParameterError("stdin: got nothing, wanted a message; run `hotcold chat` in a terminal to talk")
    chosen = options.sampling(temp, top_k, top_p, min_p, repeat_penalty, seed)
    wanted = gpu.GPUOptions(vram_budget, require_gpu, cold, trace)
    adapters = options.adapters(lora)
    more: dict[str, Any] = {"lookup": lookup, "load": load}
    more |= {"cache_type_k": cache_type_k, "cache_type_v": cache_type_v}
    with gpu.open_llm(model, ctx, threads, sparsity, wanted, adapters, prompt_cache, **more) as llm:
        if "repeat_penalty" not in llm.config.sampling:
            chosen.setdefault("repeat_penalty", REPEAT_PENALTY)
        talk = Conversation(llm, model, system, chosen, n_predict)
        if interactive:
            Repl(talk).run()
            return
        write = console.printable if sys.stdout.isatty() else str
        with closing(talk.ask(question)) as pieces:
            for piece in pieces:
                sys.stdout.write(write(piece))
                sys.stdout.flush()
        sys.stdout.write("\n")


class Repl:
    """Reads lines, answers them, hands lines that start with / to the commands."""

    def __init__(self, talk: Conversation) -> None:
        from rich.console import Console

        self.talk = talk
        self.console = Console(highlight=False)
        self.told_dropped = False

    def run(self) -> None:
        """Talk until /bye or Ctrl-D."""
        from .commands import run_command

        self._greet()
        prompt = _prompt_session()
        while True:
            try:
                line = prompt.prompt(">>> ").strip()
            except KeyboardInterrupt:
                self.say("Use /bye or Ctrl-D to leave.")
                continue
            except EOFError:
                return
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if not run_command(self, line):
                        return
                elif text := unfenced(line):
                    self.answer(self.talk.ask(text))
            except KeyboardInterrupt:
                self.say("Stopped.")
            except (HotcoldError, OSError, MemoryError) as exc:
                self.fail(exc)

    def answer(self, pieces: Generator[str, None, None]) -> None:
        """Write an answer as it comes; Ctrl-C stops it and keeps what was said."""
        live = waiting = self.console.is_terminal
        wrap = console.WordWrap(sys.stdout.write, self.console.width if live else sys.maxsize)
        if waiting:
            self.console.print("[dim]...[/]", end="")
        try:
            with closing(pieces):
                for piece in pieces:
                    if waiting:
                        self._erase_line()
                        waiting = False
                    wrap.push(console.printable(piece))
                    sys.stdout.flush()
        except KeyboardInterrupt:
            wrap.drop()
            raise
        finally:
            if waiting:
                self._erase_line()
            wrap.finish()
            sys.stdout.write("\n\n" if wrap.column else "\n")
            sys.stdout.flush()
        stats = self.talk.llm.stats()
        if 0 <= self.talk.n_predict <= stats.decode_tokens:
            self.say(f"Stopped at {self.talk.n_predict} tokens: /set parameter n_predict -1 takes the limit off.")
        elif stats.prompt_tokens + stats.decode_tokens >= stats.n_ctx:
            self.say("Stopped: the context is full. The next message makes room.")
        if self.talk.dropped and not self.told_dropped:
            self.told_dropped = True
            self.say("The conversation outgrew the context: the model no longer sees its oldest turns.")

    def say(self, text: str) -> None:
        """A remark of ours, dim; text is not markup."""
        self.console.print(console.printable(text), style="dim", markup=False)

    def fail(self, exc: BaseException) -> None:
        """One line for an error; the conversation goes on."""
        text = " ".join(str(exc).split()) or type(exc).__name__
        self.console.print(f"error: {console.printable(text)}", style="red", markup=False)

    def _greet(self) -> None:
        config, engine = self.talk.llm.config, self.talk.llm.engine
        name = console.printable(config.name or Path(self.talk.model).name)
        self.console.print(f"[bold]hotcold[/] {__version__}  ", end="")
        self.console.print(name, markup=False, style="cyan", end="")
        self.console.print(f"  {engine.n_threads} threads, context {engine.n_ctx}", style="dim")
        self.say(f"/help lists the commands, {FENCE} starts and ends several lines, Ctrl-D leaves.")

    def _erase_line(self) -> None:
        sys.stdout.write("\r\x1b[2K")


def _prompt_session() -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.formatted_text import FormattedText

    from .commands import CommandCompleter

    @Condition
    def continues() -> bool:
        return fence_open(get_app().current_buffer.text)

    @Condition
    def is_command() -> bool:
        return get_app().current_buffer.text.startswith("/")

    return PromptSession(
        history=_history(),
        multiline=continues,
        prompt_continuation=FormattedText([("class:prompt", "... ")]),
        completer=CommandCompleter(),
        complete_while_typing=is_command,
        placeholder=FormattedText([("ansibrightblack", "Send a message (/help for help)")]),
    )


def _history() -> Any:
    """The history file in the cache folder, or, where that cannot be written, one for this run."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    from ..runtime.models import home

    path = home() / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with open(path, "ab"):
            pass
    except OSError as exc:
        console.note(f"warning: no history is kept: {path}: {exc.strerror}")
        return InMemoryHistory()
    return FileHistory(str(path))
