"""Stands in for LLM.open_chat and LLM.open_completion until they are there; to be removed then."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from ...formats.errors import UnsupportedError
from ..completions import _Chat, _Text
from ..llm import LLM

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repeat_penalty", "repeat_last_n",
             "presence_penalty", "frequency_penalty", "logit_bias", "seed")  # fmt: skip


class Reply:
    """One answer in both shapes."""

    def __init__(self, llm: LLM, given: dict[str, Any], chat: bool) -> None:
        limit = given.get("max_completion_tokens") or given.get("max_tokens") or (None if chat else 16)
        options = {name: given[name] for name in _SAMPLING if given.get(name) is not None}
        ask = llm.ask_chat if chat else llm.ask
        asked = given["messages" if chat else "prompt"]
        self.answers = [ask(asked, limit, given.get("stop"), **options)]
        self.created, self.chat = int(time.time()), chat
        self.usage = bool((given.get("stream_options") or {}).get("include_usage"))
        self.shape: Any = (_Chat if chat else _Text)(self.answers[0], llm.tokenizer, given["model"])

    def start(self) -> None:
        """Queue it."""
        self.answers[0].start()

    def close(self) -> None:
        """End it."""
        self.answers[0].close()

    async def awhole(self) -> dict[str, Any]:
        """All of it."""
        text = "".join([piece.text async for piece in self.answers[0]])
        finish, usage = self.answers[0].finish_reason, {"usage": self.shape.usage()}
        if not self.chat:
            return {**self.shape.envelope(text, None, finish), **usage}
        message = {"role": "assistant", "content": text}
        choice = {"message": message, "logprobs": None, "finish_reason": finish}
        return {**self.shape.envelope("chat.completion", choice), **usage}

    async def achunks(self) -> AsyncIterator[dict[str, Any]]:
        """It, as it comes."""
        if self.chat:
            yield self.shape.chunk({"role": "assistant"}, None, None)
        async for piece in self.answers[0]:
            delta = {"content": piece.text}
            yield self.shape.chunk(delta, None, None) if self.chat else self.shape.envelope(piece.text, None, None)
        finish = self.answers[0].finish_reason
        last = self.shape.chunk({}, None, finish) if self.chat else self.shape.envelope("", None, finish)
        yield last
        if self.usage:
            yield {**last, "choices": [], "usage": self.shape.usage()}


def open_chat(llm: Any, **given: Any) -> Reply:
    """LLM.open_chat."""
    return llm.open_chat(**given) if hasattr(llm, "open_chat") else Reply(llm, given, True)


def open_completion(llm: Any, **given: Any) -> Reply:
    """LLM.open_completion."""
    return llm.open_completion(**given) if hasattr(llm, "open_completion") else Reply(llm, given, False)


def embed(llm: Any, texts: list[Any]) -> Any:
    """LLM.embed."""
    if not hasattr(llm, "embed"):
        raise UnsupportedError("embeddings: not yet")
    return llm.embed(texts)
