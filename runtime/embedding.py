"""Embeddings: what a model made of a text before its output head, pooled into one vector."""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..formats.errors import ClosedError, ContextLengthError, HotcoldError, ParameterError, UnsupportedError
from .cpu.layout import KV_BLOCK
from .sampler import check_ids

if TYPE_CHECKING:
    from ..formats.config import ModelConfig
    from ..formats.tokenizer import Tokenizer
    from .engine import Engine
    from .kv_cache import Sequence
    from .scheduler import Scheduler
    from .tensors import Tensors
    from .turn import Turn

Input = str | Seq[int] | Seq[str] | Seq[Seq[int]]
POOLINGS = ("mean", "cls", "last")
ROUND = 2048  # tokens after which others who want embeddings have theirs
STEP = 256  # tokens evaluated at once, between which other users of the engine have their turn


@dataclass(frozen=True)
class Embeddings:
    """array: float32 [n_texts, n_embd]. n_tokens: of each text."""

    array: NDArray[np.float32]
    n_tokens: tuple[int, ...]


def embeddings_object(found: Embeddings, model: str, as_base64: bool = False) -> dict[str, Any]:
    """OpenAI's list of embeddings; as_base64: each as little-endian float32, else as numbers."""
    data = []
    for index, row in enumerate(found.array):
        value: Any = base64.b64encode(row.astype("<f4").tobytes()).decode() if as_base64 else row.tolist()
        data.append({"object": "embedding", "index": index, "embedding": value})
    n_tokens = sum(found.n_tokens)
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def final_norm(x: NDArray[np.float32], config: ModelConfig, tensors: Tensors) -> NDArray[np.float32]:
    """The output norm of residuals float32 [n_tok, n_embd], as the decoder's graph has it but for its gain; a copy."""
    eps = config.norm_eps / config.residual_scale**2
    if config.norm == "layer":
        x = x - x.mean(axis=1, keepdims=True)
    scale = 1.0 / np.sqrt(np.mean(np.square(x), axis=1, keepdims=True, dtype=np.float64) + eps)
    y = x * scale.astype(np.float32) * tensors.dequantized("output_norm.weight").reshape(-1)
    if config.has("output_norm.bias"):
        y += tensors.dequantized("output_norm.bias").reshape(-1)
    return y


def check_pooling(pooling: str | None, config: ModelConfig) -> str:
    """The pooling asked for, or the model's own."""
    if pooling is not None and pooling not in POOLINGS:
        raise ParameterError(f"pooling: got {pooling!r:.40}, wanted {', '.join(POOLINGS)} or None, the model's own")
    chosen = pooling or config.pooling
    if not chosen:
        what = f"that of {config.name!r:.60} is not supported"
        raise UnsupportedError(f"pooling: {what}; wanted {', '.join(POOLINGS)}")
    return chosen


def embed(
    engine: Engine,
    texts: Seq[Seq[int] | NDArray[np.integer]],
    pooling: str,
    normalize: bool,
    turn: Callable[[], AbstractContextManager[object]] = nullcontext,
    wanted: Callable[[], bool] = lambda: True,
) -> Embeddings:
    """The embeddings of texts as token ids, each from position 0 on; several short ones share a step.

    turn: held around every step of at most STEP tokens; wanted: asked before each, ClosedError once it says no.
    normalize: to length 1 (a zero vector stays). Errors as of Engine.embed.
    """
    array = np.zeros((len(texts), engine.config.n_embd), np.float32)
    left = deque(_Text(index, np.asarray(ids)) for index, ids in enumerate(texts))
    try:
        while left:
            _check_wanted(wanted)
            with turn():
                batch = _fill(engine, left)
                rows = engine.embed_batch([(text.sequence, part) for text, part in batch])
                for text, part in batch:
                    mine, rows = rows[: len(part)], rows[len(part) :]
                    text.add(mine, pooling)
                    if text.done == len(text.ids):
                        array[text.index] = text.vector
                        text.close()
                        left.popleft()
    except BaseException:
        with suppress(ClosedError), turn():
            for text in left:
                text.close()
        raise
    if not np.isfinite(array).all():
        raise HotcoldError("embeddings: got NaN or infinite values, wanted finite ones; the model file is broken")
    if normalize:
        lengths = np.linalg.norm(array, axis=1, keepdims=True)
        array /= np.where(lengths > 0, lengths, 1)
    return Embeddings(array, tuple(len(ids) for ids in texts))


def _fill(engine: Engine, left: deque[_Text]) -> list[tuple[_Text, NDArray[np.integer]]]:
    """A step's worth of the texts that are left: all of some, and then a part of one; at least one token."""
    batch: list[tuple[_Text, NDArray[np.integer]]] = []
    room = STEP
    for text in left:
        if not room:
            break
        try:
            text.open(engine)
        except ContextLengthError:  # the cache has no room for one more, or never will
            if not batch:
                raise
            break
        batch.append((text, text.ids[text.done : text.done + room]))
        room -= len(batch[-1][1])
    return batch


class _Text:
    """A text at work: its tokens, how many of them are done, the sequence that keeps them, what is pooled so far."""

    def __init__(self, index: int, ids: NDArray[np.integer]) -> None:
        self.index, self.ids, self.done = index, ids, 0
        self.vector: NDArray[np.floating] = np.zeros(())
        self._sequence: Sequence | None = None

    @property
    def sequence(self) -> Sequence:
        assert self._sequence is not None
        return self._sequence

    def open(self, engine: Engine) -> None:
        """Reserve room for all its tokens; ContextLengthError if there is none."""
        if self._sequence is None:
            sequence = engine.new_sequence(guest=len(self.ids) <= engine.cache.n_spare * KV_BLOCK)
            try:
                sequence.reserve(len(self.ids))
            except BaseException:
                sequence.close()
                raise
            self._sequence = sequence

    def add(self, rows: NDArray[np.float32], pooling: str) -> None:
        """Pool the hidden states of its next tokens."""
        if pooling == "mean":
            self.vector = self.vector + rows.sum(axis=0, dtype=np.float64) / len(self.ids)
        elif pooling == "last":
            self.vector = rows[-1]
        elif not self.done:
            self.vector = rows[0]
        self.done += len(rows)

    def close(self) -> None:
        """Give its room back."""
        if self._sequence is not None:
            self._sequence.close()
            self._sequence = None


class Embedder:
    """The part of LLM that makes embeddings; LLM supplies what is declared here."""

    config: ModelConfig
    engine: Engine
    name: str
    scheduler: Scheduler
    tokenizer: Tokenizer
    embedding: Turn  # of those who want embeddings: the cache has room for one of them

    def embed(
        self,
        input: Input,
        pooling: str | None = None,
        normalize: bool = True,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Embeddings:
        """The embeddings of one text or several, as texts or as token ids; answers go on between its steps.

        pooling: mean, cls (the first token) or last; None: the model's own. normalize: to length 1. Texts are tokenized
        with the BOS and EOS that the model wants. ParameterError for an empty text, ContextLengthError for a long one.
        wanted: asked before every text is cut and every step; once it says no, ClosedError.
        """
        chosen, left = check_pooling(pooling, self.config), deque(self._texts(input, wanted))
        found = []
        while left:
            texts = [left.popleft()]
            while left and sum(map(len, texts)) + len(left[0]) <= ROUND:
                texts.append(left.popleft())
            with self.embedding:
                found.append(embed(self.engine, texts, chosen, normalize, self.scheduler.exclusive, wanted))
        return Embeddings(np.concatenate([one.array for one in found]), sum((one.n_tokens for one in found), ()))

    def create_embedding(self, input: Input, model: str | None = None) -> dict[str, Any]:
        """The embeddings in OpenAI's shape, normalized."""
        return embeddings_object(self.embed(input), model or self.name)

    def _texts(self, input: Input, wanted: Callable[[], bool]) -> list[list[int]]:
        """The token ids of each text."""
        many = not isinstance(input, (str, bytes)) and isinstance(input, (Seq, np.ndarray)) and len(input) > 0
        one = isinstance(input, str) or (many and isinstance(input[0], (int, np.integer)))
        if not (one or many):
            raise ParameterError(f"input: got {input!r:.60}, wanted a text, token ids, or a list of some of these")
        given: Any = [input] if one else input
        texts, most = [], self.tokenizer.most_characters(self.engine.n_ctx)
        for index, text in enumerate(given):
            _check_wanted(wanted)
            if isinstance(text, str):
                if most is not None and len(text) > most:  # cutting it might take minutes
                    raise _too_long(f"{len(text)} characters", index, self.engine.n_ctx)
                ids = self.tokenizer.encode(text)
            else:
                ids = check_ids(text, self.engine.n_vocab)
            if not ids:
                raise ParameterError(f"input: got an empty text (number {index}), wanted at least one token")
            if len(ids) > self.engine.n_ctx:
                raise _too_long(f"{len(ids)} tokens", index, self.engine.n_ctx)
            texts.append(ids)
        return texts


def _too_long(length: str, index: int, n_ctx: int) -> ContextLengthError:
    return ContextLengthError(
        f"input: got a text of {length} (number {index}), and the context holds n_ctx = {n_ctx} tokens; shorten it, "
        "or open the model with a larger n_ctx"
    )


def _check_wanted(wanted: Callable[[], bool]) -> None:
    if not wanted():
        raise ClosedError("embeddings: nobody wants them any more")
