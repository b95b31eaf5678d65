"""The endpoints that answer without generating: models, embeddings, tokens."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from starlette.types import Receive, Send

from ...formats.errors import BusyError
from ...formats.tokenizer import Tokenizer
from .answers import Answering, send_json
from .failures import APIError
from .service import Service

if TYPE_CHECKING:
    from ..embedding import Embeddings
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


class Embedding(Answering):
    """Embeddings on their way to a client, computed between the steps of the answers."""

    def __init__(self, service: Service, model: str, llm: LLM, given: dict[str, Any]) -> None:
        super().__init__(service)
        self.model, self.llm, self.given = model, llm, given
        self.begun = self.closed = False
        if service.n_embedding >= service.settings.n_queue:
            raise BusyError(f"{service.n_embedding} requests for embeddings wait, which is the most; ask again later")
        service.n_embedding += 1

    @property
    def waits(self) -> bool:
        """Whether others are before it."""
        return not self.begun

    def close(self) -> None:
        """Stop after the step in progress."""
        self.closed = True
        self.service.n_embedding -= 1

    async def send(self, receive: Receive, send: Send) -> None:
        work = asyncio.get_running_loop().run_in_executor(self.service.embedding, self._embed)
        found = await self.while_wanted(work, receive)
        as_base64 = self.given.get("encoding_format") == "base64"
        data = embeddings(self.model, found.array, sum(found.n_tokens), as_base64)
        self.service.metrics.embedded(self.model, data["usage"]["prompt_tokens"])
        await send_json(data, send)

    def _embed(self) -> Embeddings:
        self.begun = True
        return self.llm.embed(self.given["input"], wanted=lambda: not self.closed)
