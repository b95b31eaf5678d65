"""Chat templates: Jinja out of a model file, rendered in a bounded sandbox."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import FormatError, ParameterError, TemplateError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_STOP = ("<|im_end|>",)


class ChatTemplate:
    """A chat template and what it needs to know of its model.

    stop_strings: texts that end an answer where no token of the model may (the ChatML fallback).
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
        """The prompt for `messages`; TemplateError when it fails, ParameterError for bad messages."""
        if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
            raise ParameterError(f"messages: got a {type(messages).__name__}, wanted a list of dicts")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                shown = _line(repr(message), 60)
                raise ParameterError(f"messages[{i}]: got {shown}, wanted a dict with a role and content")
        variables = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            **extra,
        }
        from jinja2 import TemplateError as JinjaError  # Jinja takes a while to import

        from .template_sandbox import Budget, compile_template, render

        budget = Budget(len(self.source))
        try:
            with self._lock:
                if self._compiled is None:
                    self._compiled = compile_template(self.source, budget)
            return render(self._compiled, variables, budget)
        except Exception as error:  # a template is a program: anything can come out of it
            line = getattr(error, "lineno", None)
            where = f", line {line}" if isinstance(line, int) else ""
            name = "" if isinstance(error, JinjaError) and str(error) else f"{type(error).__name__}: "
            raise TemplateError(f"chat template{where}: {name}{_line(str(error), 300)}") from error


def load_template(file: Any) -> ChatTemplate:
    """The chat template of a GGUF file (anything with `.metadata`); else ChatML, with a warning."""
    source = file.metadata.get("tokenizer.chat_template")
    path = getattr(file, "path", "metadata")
    if source is not None and not isinstance(source, str):
        raise FormatError(path, "tokenizer.chat_template", f"a {type(source).__name__}", "a string")
    bos, eos = (_token(file.metadata, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    if source is None or not source.strip():
        warnings.warn(f"{path}: no chat template in the file, using ChatML", stacklevel=2)
        return ChatTemplate(CHATML, bos, eos, CHATML_STOP)
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
