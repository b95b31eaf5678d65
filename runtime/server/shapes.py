"""What replies look like, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Shape(BaseModel):
    """May gain fields."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class ErrorBody(Shape):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Shape):
    """Every error's shape."""

    error: ErrorBody


class Health(Shape):
    """Whether the server serves."""

    status: Literal["ok", "loading", "stopping"]


class Model(Shape):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    meta: dict[str, Any]


class Models(Shape):
    """All models that are served."""

    object: Literal["list"]
    data: list[Model]


class Usage(Shape):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(Shape):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(Shape):
    """One of n answers."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Shape):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(Shape):
    """One of n answers."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: Literal["stop", "length"]


class Completion(Shape):
    """The continuations of a prompt."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Embedding(Shape):
    """A text's place: numbers, or little-endian float32 as base64; of length 1."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Shape):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Shape):
    """One embedding for each text."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Response(Shape):
    """/v1/responses' answer."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "in_progress", "failed"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class TokenPiece(Shape):
    """A token and its text, or its bytes."""

    id: int
    piece: str | list[int]


class TokenIds(Shape):
    """Tokens, with their pieces if asked."""

    tokens: list[int] | list[TokenPiece]


class Content(Shape):
    """A text."""

    content: str
