"""The endpoints that answer without generating: models, embeddings, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Send

from ...formats.tokenizer import Tokenizer
from ..embedding import embeddings_object
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


class Embedding(Answering):
    """Embeddings on their way to a client, computed between the steps of the answers."""

    def __init__(self, service: Service, model: str, llm: LLM, given: dict[str, Any]) -> None:
        super().__init__(service)
        self.model, self.llm, self.given = model, llm, given
        self.begun = self.closed = False

    @property
    def waits(self) -> bool:
        """Whether others are before it."""
        return not self.begun

    def close(self) -> None:
        """Stop after the step in progress."""
        self.closed = True

    async def send(self, receive: Receive, send: Send) -> None:
        found = await self.while_wanted(self.service.embedding.run(self._embed), receive)
        data = embeddings_object(found, self.model, self.given.get("encoding_format") == "base64")
        self.service.metrics.embedded(self.model, data["usage"]["prompt_tokens"])
        await send_json(data, send)

    def _embed(self) -> Embeddings:
        self.begun = True
        return self.llm.embed(self.given["input"], wanted=lambda: not self.closed)
