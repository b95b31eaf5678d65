"""Text out of prompts and conversations: whole, as a stream, or as a stream of an event loop."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any

from ..formats.errors import ParameterError
from .answer import Answer, Processor, check_max_tokens
from .chat_prompt import Messages
from .sampler import PARAM_NAMES, reject_unknown

_FORMS = ("schema", "regex", "grammar")
_CALL_NAMES = ("max_tokens", "stop", "special", "tools", "logits_processor", *_FORMS, *PARAM_NAMES)


class Texts:
    """The part of LLM that answers in plain text; LLM supplies what is declared here."""

    ask: Callable[..., Answer]
    ask_chat: Callable[..., Answer]

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int | None = 256,
        stop: str | Sequence[str] | None = None,
        special: bool = False,
        logits_processor: Processor | Sequence[Processor] | None = None,
        **sampling: Any,
    ) -> str:
        """The text that continues a prompt (text or token ids).

        max_tokens: None or -1 = until the context is full. stop: texts that end the answer, themselves left
        out. special: parse control tokens (<|im_start|>) in the prompt. sampling: SamplingParams' fields; and one of
        schema (a JSON schema or a pydantic model class; `Model.model_validate_json` reads the answer), regex and
        grammar (Lark's or llama.cpp's notation), which the answer then fits if max_tokens lets it end.
        """
        return _join(self.stream(prompt, max_tokens, stop, special, logits_processor, **sampling))

    def stream(
        self,
        prompt: str | Sequence[int],
        max_tokens: int | None = 256,
        stop: str | Sequence[str] | None = None,
        special: bool = False,
        logits_processor: Processor | Sequence[Processor] | None = None,
        **sampling: Any,
    ) -> Generator[str, None, None]:
        """The same as `generate`, piece by piece; whole characters, and never a part of a stop string.

        Arguments are checked at once; it waits for its place from its first step on.
        """
        _check_names(sampling)
        limit = check_max_tokens(max_tokens)
        return _texts(self.ask(prompt, limit, stop, special, logits_processor=logits_processor, **sampling))

    def chat(
        self,
        messages: Messages,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        tools: list[Any] | None = None,
        logits_processor: Processor | Sequence[Processor] | None = None,
        **sampling: Any,
    ) -> str:
        """The assistant's answer to a conversation (dicts with role and content, or one user message).

        Arguments as in `generate`; tools go to the chat template.
        """
        return _join(self.stream_chat(messages, max_tokens, stop, tools, logits_processor, **sampling))

    def stream_chat(
        self,
        messages: Messages,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        tools: list[Any] | None = None,
        logits_processor: Processor | Sequence[Processor] | None = None,
        **sampling: Any,
    ) -> Generator[str, None, None]:
        """The same as `chat`, piece by piece, as `stream` does it."""
        _check_names(sampling)
        limit = check_max_tokens(max_tokens)
        return _texts(self.ask_chat(messages, limit, stop, tools, logits_processor=logits_processor, **sampling))

    async def astream(
        self,
        prompt: str | Sequence[int],
        max_tokens: int | None = 256,
        stop: str | Sequence[str] | None = None,
        special: bool = False,
        logits_processor: Processor | Sequence[Processor] | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[str, None]:
        """The same as `stream`, for `async for` in any event loop; a thread of its own computes."""
        _check_names(sampling)
        limit = check_max_tokens(max_tokens)
        answer = self.ask(prompt, limit, stop, special, logits_processor=logits_processor, **sampling)
        async with aclosing(_atexts(answer)) as texts:
            async for text in texts:
                yield text

    async def astream_chat(
        self,
        messages: Messages,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        tools: list[Any] | None = None,
        logits_processor: Processor | Sequence[Processor] | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[str, None]:
        """The same as `stream_chat`, as `astream` does it."""
        _check_names(sampling)
        limit = check_max_tokens(max_tokens)
        answer = self.ask_chat(messages, limit, stop, tools, logits_processor=logits_processor, **sampling)
        async with aclosing(_atexts(answer)) as texts:
            async for text in texts:
                yield text


def _check_names(sampling: Mapping[str, Any]) -> None:
    if "stream" in sampling:
        raise ParameterError("stream: not an argument here; use stream() or stream_chat()")
    reject_unknown(sampling, _CALL_NAMES)
    reject_unknown(sampling, (*_FORMS, *PARAM_NAMES))


def _texts(answer: Answer) -> Generator[str, None, None]:
    with closing(iter(answer)) as pieces:
        for piece in pieces:
            if piece.text:
                yield piece.text


async def _atexts(answer: Answer) -> AsyncGenerator[str, None]:
    async with aclosing(answer.__aiter__()) as pieces:
        async for piece in pieces:
            if piece.text:
                yield piece.text


def _join(stream: Generator[str, None, None]) -> str:
    # closed by hand: after a KeyboardInterrupt the traceback keeps an abandoned generator alive
    with closing(stream):
        return "".join(stream)
