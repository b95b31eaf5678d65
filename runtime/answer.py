"""One answer: which token comes next, and the text that leaves it in whole characters and without stop strings."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..formats.errors import ContextLengthError, ParameterError
from ..formats.tokenizer import StreamDecoder, Tokenizer
from .sampler import Sampler, SamplingParams, check_int, log_softmax, top_ids
from .scheduler import wake
from .stats import Stats
from .stops import StopMatcher

if TYPE_CHECKING:
    import asyncio

    from .batch import Job
    from .scheduler import Scheduler, Unit
    from .usage import Usage

UNREAD = 32  # pieces that nobody has read, after which an answer pauses

Processor = Callable[[NDArray[np.intc], NDArray[np.float32]], Any]
"""(token ids so far, scores float32 (n_vocab,)) -> new scores, or whether to stop."""


class Constraint(Protocol):
    """What may come next: a grammar's state in one answer."""

    def apply(self, scores: NDArray[np.float32]) -> None:
        """Set the scores (n_vocab,) of tokens that may not come now to -inf."""

    def accept(self, token: int) -> None:
        """Go on after a token that was chosen, the end token too."""


@dataclass(frozen=True)
class Request:
    """A checked question: prompt ids, sampling, limits. max_tokens None = until the context is full."""

    ids: list[int]
    params: SamplingParams
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    processors: tuple[Processor, ...] = ()
    criteria: tuple[Processor, ...] = ()
    constraint: Constraint | None = None
    logprobs: int | None = None  # how many alternatives to give with each token; None = no log probabilities
    prompt_logprobs: bool = False


@dataclass(frozen=True)
class TokenScore:
    """A token, its log probability (None: first of the prompt), the likeliest ids, its place in the text."""

    id: int
    logprob: float | None
    top: list[tuple[int, float]]
    offset: int  # characters of the answer (or, in the prompt, of the prompt) before this token


@dataclass
class Piece:
    """Text that became certain, and, where wanted, the scores of the tokens that begin in it."""

    text: str
    scores: list[TokenScore] = field(default_factory=list)


class Answer:
    """An answer, to be iterated over once, by `for` or `async for`; it waits for its place from `start` on.

    Afterwards: `finish_reason` "stop" or "length", `tokens` the ids of the answer, `prompt_scores`, `end_score` (of the
    token that ended it), `stats`. An answer that nobody reads pauses, and gives its place to others that wait.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer, request: Request) -> None:
        self.request = request
        self.finish_reason = ""
        self.tokens: list[int] = []
        self.ids = list(request.ids)  # and then the answer's
        self.prompt_scores: list[TokenScore] = []
        self.end_score: TokenScore | None = None
        self.ended = False
        self.error: BaseException | None = None
        engine = scheduler.engine
        self.stats = Stats(prompt_tokens=len(request.ids), n_ctx=engine.n_ctx)
        room = engine.n_ctx - len(request.ids)
        self._limit = room if request.max_tokens is None else min(request.max_tokens, room)
        if room < (request.max_tokens != 0):
            raise ContextLengthError(
                f"prompt: got {len(request.ids)} tokens, and the context holds n_ctx = {engine.n_ctx} and at least "
                "one token of an answer; shorten the prompt or open the model with a larger n_ctx"
            )
        self._scheduler, self._tokenizer = scheduler, tokenizer
        self._sampler = Sampler(request.params, engine.n_vocab)
        # a SentencePiece model's first space is part of the text, unless nothing stands before it
        continues = not all(map(tokenizer.is_control, request.ids))
        self._decoder, self._matcher = StreamDecoder(tokenizer, continues=continues), StopMatcher(request.stop)
        self._scores: list[TokenScore] = []  # of tokens whose text is held back
        self._decoded = self._released = 0  # characters
        self._prompt_text, self._prompt_offset = StreamDecoder(tokenizer), 0
        self._pieces: deque[Piece] = deque()
        self._job: Job | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken: Callable[[], None] = lambda: None
        self._awaited = False
        self._usage: Usage | None = None
        self._asked = 0.0

    # --- its reader ---

    def start(self, unit: Unit | None = None) -> None:
        """Queue it, if it is not yet; BusyError where too many wait, ClosedError after close(). unit: see `Unit`."""
        if self._job is None and not self.ended:
            self._asked = perf_counter()
            self._job = self._scheduler.submit(self, unit)

    def __iter__(self) -> Generator[Piece, None, None]:
        self.start()
        try:
            while True:
                self._scheduler.advance(self)
                while self._pieces:
                    yield self._pieces.popleft()
                if self.ended and not self._pieces:
                    break
            if self.error is not None:
                raise self.error
        finally:
            self.close()

    async def __aiter__(self) -> AsyncGenerator[Piece, None]:
        import asyncio  # who needs it has it

        self.start()
        woken = asyncio.Event()
        self._loop, self._woken = asyncio.get_running_loop(), woken.set
        try:
            while True:
                while self._pieces:
                    yield self._pieces.popleft()
                if self.ended and not self._pieces:
                    break
                woken.clear()
                self._awaited = True  # from here on, who makes it readable calls
                if not self.readable:
                    self._scheduler.run_in_background()
                    await woken.wait()
                self._awaited = False
            if self.error is not None:
                raise self.error
        finally:
            self._loop = None
            self.close()

    def close(self) -> None:
        """End it, from any thread and at any time: its place and its memory are free after the step in progress."""
        job, self._job = self._job, None
        self.ended = True
        if job is not None:
            self._scheduler.cancel(job)
        wake([self])

    # --- the scheduler ---

    @property
    def readable(self) -> bool:
        """Whether its reader need not wait."""
        return self.ended or bool(self._pieces)

    @property
    def waits(self) -> bool:
        """Whether it has been queued and had no place yet."""
        return self._job is not None and self._job.sequence is None and not self.tokens

    @property
    def room(self) -> bool:
        """Whether it can go on."""
        return not self.ended and len(self._pieces) < UNREAD

    @property
    def left(self) -> int:
        """Tokens that it may still have."""
        return self._limit - len(self.tokens)

    @property
    def abandoned(self) -> bool:
        """Whether the event loop that it was read in is closed."""
        loop = self._loop
        return loop is not None and loop.is_closed()

    def waker(self) -> tuple[asyncio.AbstractEventLoop, Callable[[], None]] | None:
        """Whom to call, and in which loop, because there is something to read."""
        loop = self._loop
        return (loop, self._woken) if loop is not None and self._awaited and self.readable else None

    def take_prompt(self, rows: NDArray[np.float32], first: int) -> None:
        """Logits [n, n_vocab] of n tokens of the prompt from the first on, each for the token after it."""
        ids, n_top, scores = self.request.ids, self.request.logprobs, self.prompt_scores
        if n_top is None:
            return
        if not scores:
            scores.append(TokenScore(ids[0], None, [], 0))
            self._prompt_offset += len(self._prompt_text.push(ids[0]))
        for place, row in enumerate(rows, first + 1):
            if place == len(scores) < len(ids):  # some may come again
                token = ids[place]
                scores.append(score(row, token, n_top, self._prompt_offset))
                self._prompt_offset += len(self._prompt_text.push(token))

    def take(self, logits: NDArray[np.float32]) -> None:
        """Logits (n_vocab,) after all tokens so far: choose the next token, or end."""
        if self.ended:
            return
        try:
            engine = self._scheduler.engine
            if self._usage is None and (engine.plan is not None or engine.config.n_expert):
                self._usage = engine.usage
            if self._limit == 0:
                return self._finish("length")
            token = self._choose(logits)
            if token is None or token in self._tokenizer.stop_ids:
                if token is not None and self.request.logprobs is not None:
                    self.end_score = score(logits, token, self.request.logprobs, self._decoded)
                return self._finish("stop")
            self.tokens.append(token)
            self.ids.append(token)
            self.stats.first_s = self.stats.first_s or perf_counter() - self._asked
            self.stats.decode_tokens = len(self.tokens)
            self._cut(token, logits)
            if self._matcher.stopped:
                self._finish("stop")
            elif len(self.tokens) >= self._limit:
                self._finish("length")
        except Exception as error:
            self.fail(error)

    def count_step(self, seconds: float, n_guesses: int) -> None:
        """Note an evaluation of its last token."""
        self.stats.decode_s += seconds
        self.stats.decode_steps += 1
        self.stats.guessed_tokens += n_guesses

    def fail(self, error: BaseException) -> None:
        """End it with an error, which its reader gets."""
        if not self.ended:
            self.error = error
            self._end()

    def _finish(self, reason: str) -> None:
        # decoder.finish() would give a replacement character for half a character: better none
        text = self._matcher.finish()
        if text or (self._scores and not self._matcher.stopped):
            self._pieces.append(Piece(text, self._scores))
        self.finish_reason = reason
        self._end()

    def _end(self) -> None:
        self.stats.context_used = len(self.ids)
        self.stats.total_s = perf_counter() - self._asked
        if self._usage is not None:
            with suppress(Exception):  # the engine may be closed
                self.stats.usage = self._scheduler.engine.usage - self._usage
        self.ended = True

    def _cut(self, token: int, logits: NDArray[np.float32]) -> None:
        """The text that this token makes certain, up to the first stop string."""
        if self.request.logprobs is not None:
            self._scores.append(score(logits, token, self.request.logprobs, self._decoded))
        fresh = self._decoder.push(token)
        self._decoded += len(fresh)
        text = self._matcher.push(fresh)
        self._released += len(text)
        if text:
            self._pieces.append(Piece(text, [s for s in self._scores if s.offset < self._released]))
            self._scores = [s for s in self._scores if s.offset >= self._released]

    def _choose(self, logits: NDArray[np.float32]) -> int | None:
        """The next token, or None where a stopping criterion says so."""
        request = self.request
        if request.processors or request.criteria:
            ids, scores = np.array(self.ids, np.intc), logits.copy()
            for processor in request.processors:
                scores = np.asarray(processor(ids, scores), np.float32)
                if scores.shape != logits.shape:
                    raise ParameterError(f"logits_processor: got shape {scores.shape}, wanted {logits.shape}")
            if any(criterion(ids, scores) for criterion in request.criteria):
                return None
            logits = scores
        if request.constraint is None:
            return self._sampler.sample(logits, self.ids)
        scores = logits.copy()
        request.constraint.apply(scores)
        token = self._sampler.sample(scores, self.ids)
        request.constraint.accept(token)
        return token


def score(logits: NDArray[np.float32], token: int, n_top: int, offset: int) -> TokenScore:
    """Log probability of a token under raw logits (n_vocab,), with the n_top likeliest ids."""
    row = log_softmax(logits)
    top = [(int(i), float(row[i])) for i in top_ids(row, n_top)]
    return TokenScore(token, float(row[token]), top, offset)


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple; ParameterError for an empty one or another type."""
    found = (stop,) if isinstance(stop, str) or not isinstance(stop or (), Sequence) else tuple(stop or ())
    if not all(isinstance(s, str) and s for s in found):
        raise ParameterError(f"stop: got {stop!r}, wanted a non-empty string or a list of such")
    return found


def check_callables(name: str, given: Processor | Sequence[Processor] | None) -> tuple[Processor, ...]:
    """One callable or several as a tuple; ParameterError otherwise."""
    # llama-cpp-python's lists of processors are callable themselves, so lists come first
    found: tuple[Any, ...]
    if given is None:
        found = ()
    elif isinstance(given, Sequence):
        found = tuple(given)
    else:
        found = (given,)
    if not all(callable(item) for item in found):
        raise ParameterError(f"{name}: got {given!r}, wanted a callable or a list of callables")
    return found


def check_max_tokens(max_tokens: int | None) -> int | None:
    """None and -1 mean "until the context is full"; ParameterError for other negatives."""
    if max_tokens is None:
        return None
    number = check_int("max_tokens", max_tokens, -1)
    return None if number < 0 else number
