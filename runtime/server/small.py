"""The endpoints that answer without generating: models, embeddings, tokens."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...formats.tokenizer import Tokenizer
from .failures import APIError

if TYPE_CHECKING:
    from ..llm import LLM


def model_entry(name: str, llm: LLM, created: int) -> dict[str, Any]:
    """A model as /v1/models lists it."""
    config = llm.config
    meta = {
        "architecture": config.arch, "name": config.name, "n_ctx": llm.n_ctx, "n_ctx_train": config.n_ctx_train,
        "n_embd": config.n_embd, "n_vocab": llm.n_vocab,
    }  # fmt: skip
    return {"id": name, "object": "model", "created": created, "owned_by": "hotcold", "meta": meta}


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Each token with its text, or with its bytes where they are no whole characters."""
    found: list[dict[str, Any]] = []
    for id in ids:
        data = tokenizer.token_text(id).encode() if tokenizer.is_control(id) else tokenizer.token_bytes(id)
        try:
            found.append({"id": id, "piece": data.decode()})
        except UnicodeDecodeError:
            found.append({"id": id, "piece": list(data)})
    return found


def texts_of(given: str | list[Any]) -> list[Any]:
    """The texts (or lists of token ids) that a request's `input` or `prompt` means."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def check_dimensions(wanted: int | None, n_embd: int) -> None:
    """APIError 400 for other dimensions than the model's: cut embeddings mean something only where so trained."""
    if wanted not in (None, n_embd):
        message = f"dimensions: got {wanted}, and this model's embeddings have {n_embd}; leave it out"
        raise APIError(400, message, param="dimensions", code="unsupported")


def embeddings(model: str, rows: NDArray[np.float32], n_tokens: int, as_base64: bool) -> dict[str, Any]:
    """OpenAI's list of embeddings; rows float32 (n, n_embd)."""
    data = []
    for index, row in enumerate(rows):
        value: Any = base64.b64encode(row.astype("<f4").tobytes()).decode() if as_base64 else row.tolist()
        data.append({"object": "embedding", "index": index, "embedding": value})
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}
