"""One engine, the sequence that stays cached between calls, and the turn that callers take on them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..formats.errors import ClosedError, ContextLengthError, HotcoldError, ParameterError
from .parts import parts, reusable

if TYPE_CHECKING:
    from .engine import Engine
    from .usage import Usage

ROWS = 256  # rows of logits asked of the engine at once: 50 MB for 50k tokens


@dataclass
class Stats:
    """Figures of the last answer: tokens, seconds (a stream's consumer not counted), tokens a second.

    prompt_tokens counts the whole prompt, reused_tokens of it were cached; decode_tokens counts the answer,
    decode_steps the evaluations behind decode_s (the first token comes with the prompt).
    """

    prompt_tokens: int = 0
    prompt_s: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_s: float = 0.0
    context_used: int = 0
    n_ctx: int = 0
    reused_tokens: int = 0
    usage: Usage | None = None  # of the FFNs, while the answer's tokens were evaluated one by one

    @property
    def prompt_tok_s(self) -> float:
        """Prompt tokens evaluated a second; 0 where nothing was evaluated."""
        return (self.prompt_tokens - self.reused_tokens) / self.prompt_s if self.prompt_s > 0 else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Evaluations of single tokens a second; 0 where there was none."""
        return self.decode_steps / self.decode_s if self.decode_s > 0 else 0.0


# What this flow of control holds: id of the turn -> the mark it left there.
_held: ContextVar[dict[int, object]] = ContextVar("_held", default={})  # noqa: B039 (never mutated)


class Turn:
    """A lock that callers queue for, any thread may release, and that sees its holder ask a second time.

    A stream may be resumed by several threads (web servers do that), and a thread that resumed one may go on
    to serve another request meanwhile. So the holder is a thread *in a context*, marked at every resume.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mark: object = None
        self._thread = self._pid = 0

    def held_here(self) -> bool:
        """Whether the caller itself is inside the turn, so that waiting for it would never end."""
        mark = self._mark
        return (
            mark is not None and self._thread == threading.get_ident() and _held.get().get(id(self)) is mark
        )

    def resume(self) -> None:
        """Mark the calling thread and context as the holder."""
        self._mark, self._thread, self._pid = object(), threading.get_ident(), os.getpid()
        _held.set({**_held.get(), id(self): self._mark})

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for the turn and hold it; HotcoldError where the caller has it already."""
        if self.held_here():
            raise HotcoldError(
                "this LLM is in the middle of a stream that the same thread consumes: "
                "finish the stream or call its close() before the next call"
            )
        if self._mark is not None and self._pid != os.getpid():  # whoever would end it is not in this process
            raise HotcoldError("this LLM was answering when the process forked: open the model again in the child")
        with self._lock:
            try:
                self.resume()
                yield
            finally:
                self._mark = None
                _held.set({key: mark for key, mark in _held.get().items() if key != id(self)})


class Session:
    """The engine with one sequence, whose tokens a new prompt reuses as far as they agree.

    Everything but `close` and `check_open` is called by whoever holds `turn`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.turn = Turn()
        self.stats = Stats(n_ctx=engine.n_ctx)
        self.closed = False
        self._sequence = engine.new_sequence()

    @property
    def context_used(self) -> int:
        """Tokens in the cached sequence."""
        return len(self._sequence)

    def check_open(self) -> None:
        """Raise ClosedError after close()."""
        if self.closed:
            raise ClosedError("LLM: used after close(); open the model again")

    def check_prompt(self, n_tokens: int, room: int) -> None:
        """Raise ContextLengthError unless n_tokens and `room` more fit the context."""
        n_ctx = self.engine.n_ctx
        if n_tokens + room > n_ctx:
            answer = " and at least one token of an answer" if room else ""
            raise ContextLengthError(
                f"prompt: got {n_tokens} tokens, and the context holds n_ctx = {n_ctx}{answer}; "
                "shorten the prompt or open the model with a larger n_ctx"
            )

    def prefill(self, ids: Sequence[int]) -> tuple[NDArray[np.float32], int]:
        """Make the sequence hold `ids`; the logits after the last (n_vocab,) and how many tokens were reused.

        The logits are the engine's buffer, valid until its next evaluation; likewise below.
        """
        reused = reusable(_common(self._sequence.tokens, ids), len(ids))
        self._sequence.truncate(reused)
        return self.engine.eval(self._sequence, ids[reused:])[-1], reused

    def step(self, token: int) -> NDArray[np.float32]:
        """Append one token; logits (n_vocab,)."""
        return self.engine.eval(self._sequence, [token])[-1]

    def rows(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Evaluate `ids` from nothing in the cached sequence; blocks of logits, one row a token."""
        self._sequence.truncate(0)
        for part in parts(len(ids), ROWS):
            yield self.engine.eval(self._sequence, ids[part], all_logits=True)

    def close(self) -> None:
        """Wait for the call in progress and close the engine; a stream that the caller holds ends there."""
        if self.closed:
            return
        if self.turn.held_here():
            self._close()
        else:
            with self.turn.take():
                self._close()

    def __del__(self) -> None:
        # here and not in LLM: a stream keeps its session alive, and the LLM may be dropped before it
        with suppress(Exception):
            self._close()

    def _close(self) -> None:
        if not self.closed:
            self.closed = True
            self._sequence.close()
            self.engine.close()


def check_ids(ids: object, n_vocab: int) -> list[int]:
    """Token ids as a list of int; ParameterError for anything else or an id out of range."""
    try:
        array = np.asarray(ids)
    except ValueError:
        array = np.empty((0, 0))
    if array.size == 0 and array.ndim == 1:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ParameterError(f"token ids: got {type(ids).__name__}, wanted a flat list of integers")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= n_vocab:
        raise ParameterError(f"token ids: got {low if low < 0 else high}, wanted 0 to {n_vocab - 1}")
    found: list[int] = array.tolist()
    return found


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Stopwatch:
    """Seconds spent inside its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += perf_counter() - self._start
