"""One answer: the token loop, and the text that leaves it in whole characters and without stop strings."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..formats.errors import ParameterError
from ..formats.tokenizer import StreamDecoder, Tokenizer
from .sampler import Sampler, SamplingParams, check_int, log_softmax, top_ids
from .session import Session, Stats, Stopwatch
from .stops import StopMatcher

if TYPE_CHECKING:
    from .usage import Usage

Processor = Callable[[NDArray[np.intc], NDArray[np.float32]], Any]
"""(token ids so far, scores float32 (n_vocab,)) -> new scores, or whether to stop."""


@dataclass(frozen=True)
class Request:
    """A checked question: prompt ids, sampling, limits. max_tokens None = until the context is full."""

    ids: list[int]
    params: SamplingParams
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    processors: tuple[Processor, ...] = ()
    criteria: tuple[Processor, ...] = ()
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
    """An answer to be iterated over once; it takes its turn at the first step and gives it back at the end.

    Afterwards: `finish_reason` "stop" or "length", `tokens` the ids of the answer, `prompt_scores`.
    """

    def __init__(self, session: Session, tokenizer: Tokenizer, request: Request) -> None:
        session.check_open()
        session.check_prompt(len(request.ids), room=1)
        self.request = request
        self.finish_reason = ""
        self.tokens: list[int] = []
        self.prompt_scores: list[TokenScore] = []
        self._session, self._tokenizer = session, tokenizer
        self._sampler = Sampler(request.params, session.engine.n_vocab)
        self._latest: NDArray[np.float32] | None = None

    def __iter__(self) -> Generator[Piece, None, None]:
        session = self._session
        with session.turn.take():
            session.check_open()
            with closing(self._generate()) as tokens:
                for piece in self._cut(tokens):
                    yield piece
                    session.turn.resume()
                    session.check_open()

    def _cut(self, tokens: Iterable[int]) -> Iterator[Piece]:
        """Pieces of text out of token ids, up to the first stop string."""
        # a SentencePiece model's first space is part of the text, unless nothing stands before it
        continues = not all(map(self._tokenizer.is_control, self.request.ids))
        decoder, matcher = StreamDecoder(self._tokenizer, continues=continues), StopMatcher(self.request.stop)
        waiting: list[TokenScore] = []
        decoded = released = 0
        for token in tokens:
            if self.request.logprobs is not None and self._latest is not None:
                waiting.append(score(self._latest, token, self.request.logprobs, decoded))
            fresh = decoder.push(token)
            decoded += len(fresh)
            text = matcher.push(fresh)
            released += len(text)
            if text:
                yield Piece(text, [s for s in waiting if s.offset < released])
                waiting = [s for s in waiting if s.offset >= released]
            if matcher.stopped:
                self.finish_reason = "stop"
                return
        # decoder.finish() would give a replacement character for half a character: better none
        text = matcher.finish()
        if text or waiting:
            yield Piece(text, waiting)

    def _generate(self) -> Generator[int, None, None]:
        """Yield token ids; sets finish_reason, tokens and the session's stats."""
        request, session = self.request, self._session
        stats = session.stats = Stats(prompt_tokens=len(request.ids), n_ctx=session.engine.n_ctx)
        room = session.engine.n_ctx - len(request.ids)
        limit = room if request.max_tokens is None else min(request.max_tokens, room)
        context = list(request.ids)
        before: Usage | None = None
        watch = Stopwatch()
        try:
            with watch:
                logits = self._prefill(stats)
            before = session.engine.usage
            stats.prompt_s, watch.seconds = watch.seconds, 0.0
            self.finish_reason = "length"
            while len(self.tokens) < limit:
                with watch:
                    if self.tokens:
                        logits = session.step(self.tokens[-1])
                        stats.decode_steps += 1
                    token = self._choose(logits, context)
                if token is None or token in self._tokenizer.stop_ids:
                    self.finish_reason = "stop"
                    return
                self._latest = logits
                self.tokens.append(token)
                context.append(token)
                yield token
        finally:
            stats.decode_tokens, stats.decode_s = len(self.tokens), watch.seconds
            if not session.closed:
                stats.context_used = session.context_used
                if before is not None:
                    stats.usage = session.engine.usage - before

    def _prefill(self, stats: Stats) -> NDArray[np.float32]:
        request = self.request
        if not (request.prompt_logprobs and request.logprobs is not None):
            logits, stats.reused_tokens = self._session.prefill(request.ids)
            return logits
        decoder, offset = StreamDecoder(self._tokenizer), 0
        self.prompt_scores.append(TokenScore(request.ids[0], None, [], 0))
        offset += len(decoder.push(request.ids[0]))
        following = iter(request.ids[1:])
        for block in self._session.rows(request.ids):
            for row, token in zip(block, following, strict=False):
                self.prompt_scores.append(score(row, token, request.logprobs, offset))
                offset += len(decoder.push(token))
        return block[-1]

    def _choose(self, logits: NDArray[np.float32], context: Sequence[int]) -> int | None:
        """The next token, or None where a stopping criterion says so."""
        request = self.request
        if request.processors or request.criteria:
            ids, scores = np.array(context, np.intc), logits.copy()
            for processor in request.processors:
                scores = np.asarray(processor(ids, scores), np.float32)
                if scores.shape != logits.shape:
                    raise ParameterError(f"logits_processor: got shape {scores.shape}, wanted {logits.shape}")
            if any(criterion(ids, scores) for criterion in request.criteria):
                return None
            logits = scores
        return self._sampler.sample(logits, context)


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
