"""Stands in for LLM.embed until it is there; to be removed then."""

from __future__ import annotations

from typing import Any

from ...formats.errors import UnsupportedError


def open_chat(llm: Any, **given: Any) -> Any:
    """LLM.open_chat."""
    return llm.open_chat(**given)


def open_completion(llm: Any, **given: Any) -> Any:
    """LLM.open_completion."""
    return llm.open_completion(**given)


def embed(llm: Any, texts: list[Any]) -> Any:
    """LLM.embed."""
    if not hasattr(llm, "embed"):
        raise UnsupportedError("embeddings: not yet")
    return llm.embed(texts)
