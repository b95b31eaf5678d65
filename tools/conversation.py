"""A conversation with a model: history, settings, what still fits the context. No terminal in here."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.errors import ContextLengthError, FormatError, ParameterError

if TYPE_CHECKING:
    from ..runtime.llm import LLM

Message = dict[str, str]

CHAT_LENGTH = 1024  # small models may never end by themselves
FORMAT, VERSION = "hotcold-chat", 1
PARAMETERS: dict[str, type] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "typical_p": float,
    "repeat_penalty": float,
    "repeat_last_n": int,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "n_predict": int,
}
SYNONYMS = {"temp": "temperature", "num_predict": "n_predict", "max_tokens": "n_predict"}


class Conversation:
    """One conversation with `llm`; `options` are SamplingParams names, `n_predict` -1 is without a limit."""

    def __init__(
        self,
        llm: LLM,
        model: str,
        system: str | None = None,
        options: dict[str, Any] | None = None,
        n_predict: int = CHAT_LENGTH,
    ) -> None:
        self.llm, self.model, self.system = llm, model, system
        self.options = dict(options or {})
        self.n_predict = n_predict
        self.messages: list[Message] = []
        self.dropped = 0  # messages at the start that no longer fit the context

    def ask(self, text: str) -> Generator[str, None, None]:
        """Stream the answer to a new user message; without any answer (an error, Ctrl-C) it is forgotten."""
        previous = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        yield from self._answer(previous)

    def regenerate(self) -> Generator[str, None, None]:
        """Stream another answer to the last user message, in place of the one it has."""
        previous = list(self.messages)
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages:
            raise ParameterError("nothing to answer again yet")
        yield from self._answer(previous)

    def clear(self) -> None:
        """Forget the conversation; system prompt and parameters stay."""
        self.messages, self.dropped = [], 0

    def set_parameter(self, name: str, value: str) -> None:
        """Set a sampling parameter from text; raises ParameterError naming what is wrong."""
        name = name.replace("-", "_").lower()
        name = SYNONYMS.get(name, name)
        if name not in PARAMETERS:
            raise ParameterError(f"parameter: got {name}, wanted one of {', '.join(PARAMETERS)}")
        kind = PARAMETERS[name]
        try:
            number = kind(value)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise ParameterError(f"{name}: got {value!r}, wanted {wanted}") from None
        self._apply({**self.parameters(), name: number})

    def parameters(self) -> dict[str, Any]:
        """The parameters that were set here; all others are the model's own."""
        return {**self.options, "n_predict": self.n_predict}

    def save(self, path: Path) -> None:
        """Write the conversation and its settings as JSON; the file is replaced whole or not at all."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "system": self.system,
            "parameters": self.parameters(),
            "messages": self.messages,
        }
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(data, stream, ensure_ascii=False, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise

    def load(self, path: Path) -> None:
        """Take up a conversation that save() wrote; raises FormatError and changes nothing if not."""
        try:
            data = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as exc:
            raise FormatError(path, "JSON", exc, "a conversation saved by /save") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise FormatError(path, "format", "something else", f"{FORMAT} version {VERSION}")
        system, messages, parameters = data.get("system"), data.get("messages"), data.get("parameters")
        if system is not None and not isinstance(system, str):
            raise FormatError(path, "system", type(system).__name__, "a string or null")
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise FormatError(path, "messages", "something else", "a list of messages with role and content")
        if not isinstance(parameters, dict) or not all(_fits(*item) for item in parameters.items()):
            raise FormatError(path, "parameters", parameters, f"numbers for some of {', '.join(PARAMETERS)}")
        try:
            self._apply(parameters)
        except ParameterError as exc:
            raise FormatError(path, "parameters", exc, "values in range") from None
        self.system, self.messages, self.dropped = system, messages, 0

    def _apply(self, parameters: dict[str, Any]) -> None:
        from ..runtime.sampler import SamplingParams

        n_predict = parameters.get("n_predict", CHAT_LENGTH)
        if n_predict < -1:
            raise ParameterError(f"n_predict: got {n_predict}, wanted -1 (no limit) or more")
        options = {name: value for name, value in parameters.items() if name != "n_predict"}
        SamplingParams(**options)  # checks the ranges
        self.options, self.n_predict = options, n_predict

    def _answer(self, previous: list[Message]) -> Generator[str, None, None]:
        pieces: list[str] = []
        answered = False
        try:
            window = self._window()
            max_tokens = None if self.n_predict < 0 else self.n_predict
            with closing(self.llm.stream_chat(window, max_tokens=max_tokens, **self.options)) as stream:
                for piece in stream:
                    pieces.append(piece)
                    yield piece
            answered = True
        except ContextLengthError:
            if not pieces:
                raise
        finally:
            if pieces or answered:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages[:] = previous

    def _window(self) -> list[Message]:
        """The messages to send: all, or after an overflow the newest that fill half the context.

        Half, because each drop changes the prompt's start and so costs computing all of it again.
        """
        n_ctx = self.llm.engine.n_ctx
        if self._count(self.dropped) + min(n_ctx // 4, 256) > n_ctx:
            while self.dropped + 2 < len(self.messages) and self._count(self.dropped) > n_ctx // 2:
                self.dropped += 2
        return self._from(self.dropped)

    def _from(self, start: int) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return system + self.messages[start:]

    def _count(self, start: int) -> int:
        """Tokens of the prompt that the messages from `start` make."""
        text = self.llm.template.render(self._from(start), add_generation_prompt=True)
        return len(self.llm.tokenize(text, add_bos=False, special=True))


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("user", "assistant", "system")
        and isinstance(message.get("content"), str)
    )


def _fits(name: str, value: object) -> bool:
    kind = PARAMETERS.get(name)
    return kind is not None and isinstance(value, (int, kind)) and not isinstance(value, bool)
