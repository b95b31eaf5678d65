"""Conversations with the scripted engine of fakes.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import fakes

from hotcold.tools.conversation import Conversation

HELLO = (fakes.HEL, fakes.LO)


def make_talk(next_token: Callable[[list[int]], int | None] | None = None, **options: Any) -> Conversation:
    llm = fakes.make(next_token or fakes.saying(*HELLO), **options)
    engine: Any = llm.engine
    engine.n_threads = 2
    engine.config.name = "fake model"
    return Conversation(llm, "fake.gguf", options={"temperature": 0.0})


def said(pieces: Iterator[str]) -> str:
    return "".join(pieces)


def roles(talk: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in talk.messages]
