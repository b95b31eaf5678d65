"""The REPL's slash commands: a table of names, and one small function each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from ..formats.errors import ParameterError
from .console import human_bytes, printable
from .conversation import PARAMETERS
from .fence import unfenced
from .run import describe

if TYPE_CHECKING:
    from .chat import Repl


@dataclass(frozen=True)
class Command:
    """A command's usage and what it does; `run` gets the REPL and the rest of the line."""

    usage: str
    help: str
    run: Callable[[Repl, str], None]


class Leave(Exception):
    """Raised by /bye."""


def run_command(repl: Repl, line: str) -> bool:
    """Carry out one command line; False when the REPL shall end. Raises what the command raises."""
    name, _, rest = line.partition(" ")
    command = COMMANDS.get("/help" if name == "/?" else name.lower())
    if command is None:
        close = [known for known in COMMANDS if known.startswith(name.lower()[:3])]
        hint = f"Did you mean {close[0]}? " if close else ""
        repl.say(f"Unknown command {name}. {hint}/help lists them.")
        return True
    try:
        command.run(repl, rest.strip())
    except Leave:
        return False
    return True


class CommandCompleter(Completer):
    """Completes commands and their fixed arguments."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """What the last word of a line may become."""
        *before, word = document.text_before_cursor.split(" ")
        for name in completions(before):
            if name.startswith(word):
                yield Completion(name, start_position=-len(word))


def completions(before: list[str]) -> Iterable[str]:
    """The words that can follow those of a command line."""
    arguments = {
        (): COMMANDS,
        ("/set",): ("parameter", "system"),
        ("/set", "parameter"): PARAMETERS,
        ("/show",): SHOWN,
    }
    return arguments.get(tuple(before), ())


def _set(repl: Repl, rest: str) -> None:
    what, _, value = rest.partition(" ")
    value = value.strip()
    if what == "system":
        repl.talk.system = unfenced(value) or None
        repl.say("System prompt set." if repl.talk.system else "System prompt removed.")
    elif what == "parameter":
        name, _, number = value.partition(" ")
        if not name or not number.strip():
            raise ParameterError(f"/set parameter: wanted NAME VALUE; names: {', '.join(PARAMETERS)}")
        repl.talk.set_parameter(name, number.strip())
        repl.say(f"{name} is now {number.strip()}.")
    else:
        raise ParameterError("/set: wanted /set parameter NAME VALUE or /set system TEXT")


def _show(repl: Repl, rest: str) -> None:
    show = SHOWN.get(rest or "info")
    if show is None:
        raise ParameterError(f"/show: got {rest}, wanted one of {', '.join(SHOWN)}")
    show(repl)


def _show_info(repl: Repl) -> None:
    from .show import bits_per_weight, parameter_count, type_totals

    llm = repl.talk.llm
    file, config = llm.engine.file, llm.config
    types = ", ".join(f"{name} {human_bytes(size)}" for name, (_, size) in type_totals(file).items())
    _table(
        repl,
        {
            "model": config.name,
            "file": file.path,
            "architecture": f"{config.arch}, {config.n_layer} layers, {config.n_embd} wide",
            "parameters": f"{parameter_count(file) / 1e6:.1f} M at {bits_per_weight(file):.2f} bits",
            "tensors": types,
            "context": f"{llm.engine.n_ctx} tokens (trained on {config.n_ctx_train})",
            "threads": llm.engine.n_threads,
        },
    )


def _show_system(repl: Repl) -> None:
    system = repl.talk.system or "(none: the template's own, if it has one)"
    repl.console.print(printable(system), markup=False)


def _show_parameters(repl: Repl) -> None:
    from ..runtime.sampler import SamplingParams

    talk = repl.talk
    params = SamplingParams.from_metadata(talk.llm.config.sampling, **talk.options)
    shown = {name: getattr(params, name, talk.n_predict) for name in PARAMETERS}
    _table(repl, {name: f"{value}{'  (set)' if name in talk.options else ''}" for name, value in shown.items()})


def _show_template(repl: Repl) -> None:
    repl.console.print(printable(repl.talk.llm.template.source), markup=False)


def _save(repl: Repl, rest: str) -> None:
    if not rest:
        raise ParameterError("/save: wanted a file name")
    repl.talk.save(Path(rest).expanduser())
    repl.say(f"Saved {len(repl.talk.messages)} messages to {rest}.")


def _load(repl: Repl, rest: str) -> None:
    if not rest:
        raise ParameterError("/load: wanted a file name")
    repl.talk.load(Path(rest).expanduser())
    repl.say(f"Loaded {len(repl.talk.messages)} messages from {rest}.")


def _clear(repl: Repl, rest: str) -> None:
    repl.talk.clear()
    repl.told_dropped = False
    repl.say("The conversation is forgotten.")


def _regen(repl: Repl, rest: str) -> None:
    repl.answer(repl.talk.regenerate())


def _stats(repl: Repl, rest: str) -> None:
    repl.say(describe(repl.talk.llm.stats()))


def _help(repl: Repl, rest: str) -> None:
    _table(repl, {command.usage: command.help for command in COMMANDS.values()})
    repl.say('""" starts and ends a message of several lines; Ctrl-C stops an answer; //x sends /x.')


def _bye(repl: Repl, rest: str) -> None:
    raise Leave


def _table(repl: Repl, rows: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, style="cyan"), Text(printable(str(value))))
    repl.console.print(table)


SHOWN: dict[str, Callable[[Repl], None]] = {
    "info": _show_info,
    "system": _show_system,
    "parameters": _show_parameters,
    "template": _show_template,
}
COMMANDS = {
    "/set": Command("/set parameter NAME VALUE | system TEXT", "change a parameter, the system prompt", _set),
    "/show": Command(f"/show [{'|'.join(SHOWN)}]", "what the model is, what is set", _show),
    "/load": Command("/load FILE", "take up a saved conversation", _load),
    "/save": Command("/save FILE", "save the conversation and its settings as JSON", _save),
    "/clear": Command("/clear", "forget the conversation, keep the settings", _clear),
    "/regen": Command("/regen", "answer the last message again", _regen),
    "/stats": Command("/stats", "speed of the last answer, context used", _stats),
    "/help": Command("/help", "this list", _help),
    "/bye": Command("/bye", "leave", _bye),
}
