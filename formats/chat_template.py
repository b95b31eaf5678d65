"""Chat templates: Jinja out of a model file, rendered in a sandbox with bounded work and output.

A template is a program that came with the file. The sandbox keeps it from Python's internals; the budget below keeps
it from running or growing without end (loops, macro calls, string and list arithmetic, output).
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import cache
from typing import Any

from .errors import FormatError, ParameterError, TemplateError

MAX_SOURCE = 1 << 20  # characters of a template
MAX_SIZE = 1 << 26  # characters of output, and of any one value that a template builds
MAX_STEPS = 1 << 20  # loop turns and calls
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class _Refused(Exception):
    """The template asked for more than it may have."""


class _Budget:
    """Work and output left to one rendering."""

    def __init__(self) -> None:
        self.steps, self.size = MAX_STEPS, MAX_SIZE

    def step(self, size: int = 0) -> None:
        self.steps -= 1
        self.size -= size
        if self.steps < 0:
            raise _Refused(f"more than {MAX_STEPS} loop turns and calls")
        if self.size < 0:
            raise _Refused(f"more than {MAX_SIZE} characters of output")


_budget: ContextVar[_Budget] = ContextVar("_budget")


class ChatTemplate:
    """A chat template and what it needs to know of its model.

    stop_strings: texts that end an answer, where the template was not made for the model's own end-of-turn token.
    """

    def __init__(
        self, source: str, bos_token: str = "", eos_token: str = "", stop_strings: tuple[str, ...] = ()
    ) -> None:
        self.source, self.bos_token, self.eos_token = source, bos_token, eos_token
        self.stop_strings = stop_strings
        self._compiled: Any = None
        self._lock = threading.Lock()

    @property
    def is_fallback(self) -> bool:
        """Whether this is ChatML in place of a template that the file lacks."""
        return bool(self.stop_strings)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[Any] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt for `messages`; TemplateError where the template fails, ParameterError for bad messages."""
        if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
            raise ParameterError(f"messages: got a {type(messages).__name__}, wanted a list of dicts")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ParameterError(f"messages[{i}]: got {_line(repr(message), 60)}, wanted a dict with a role and content")
        variables = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            **extra,
        }
        token = _budget.set(_Budget())
        try:
            with self._lock:
                if self._compiled is None:
                    if len(self.source) > MAX_SOURCE:
                        raise _Refused(f"{len(self.source)} characters of source, more than {MAX_SOURCE}")
                    self._compiled = _environment().from_string(self.source)
            return str(self._compiled.render(variables))
        except (Exception, RecursionError) as error:
            reason = _line(str(error) or type(error).__name__, 300)
            where = f" (line {error.lineno})" if isinstance(getattr(error, "lineno", None), int) else ""
            raise TemplateError(f"chat template failed{where}: {reason}") from error
        finally:
            _budget.reset(token)


def load_template(file: Any) -> ChatTemplate:
    """The chat template of a GGUF file (anything with `.metadata`); ChatML, with a warning, where it has none."""
    source = file.metadata.get("tokenizer.chat_template")
    path = getattr(file, "path", "metadata")
    if source is not None and not isinstance(source, str):
        raise FormatError(path, "tokenizer.chat_template", f"a {type(source).__name__}", "a string")
    bos, eos = (_token(file.metadata, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    if source is None or not source.strip():
        warnings.warn(f"{path}: no chat template in the file, using ChatML", stacklevel=2)
        return ChatTemplate(CHATML, bos, eos, stop_strings=("<|im_end|>",))
    return ChatTemplate(source, bos, eos)


def _token(metadata: Mapping[str, Any], key: str) -> str:
    """The token that an id key names, or "": the tokenizer is the one to complain about a bad id."""
    tokens, id = metadata.get("tokenizer.ggml.tokens"), metadata.get(key)
    if isinstance(tokens, list) and isinstance(id, int) and 0 <= id < len(tokens):
        return str(tokens[id])
    return ""


def _line(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


@cache
def _environment() -> Any:
    """The one sandboxed environment; built on first use, for Jinja takes a while to import."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    return env


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: object) -> None:
    from jinja2 import TemplateError as JinjaError

    raise JinjaError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(str(pattern))
