"""Continuous batching: answers join and leave the running batch at every step of one engine.

A step is one evaluation of the tokens that were chosen last, of all running answers together, and one of a part of
the prompts that wait. Both kinds of tokens have kernels of their own, in which a token's numbers do not depend on the
others in its step: an answer is the same alone and among others.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..formats.errors import BusyError, ClosedError
from .cpu.layout import KV_BLOCK
from .prompt_lookup import PromptLookup
from .turn import Turn

if TYPE_CHECKING:
    from .answer import Answer
    from .engine import Engine
    from .kv_cache import Sequence as Tokens

PROMPT_STEP = 512  # prompt tokens of one step, at most
PROMPT_SECONDS = 0.1  # and for how long they may hold up answers that are running
PROMPT_LEAST = 32
IDLE_SECONDS = 5.0  # until the background thread ends


class Job:
    """An answer in the scheduler: its sequence while it has a place, and how far it has come."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.sequence: Tokens | None = None
        self.cancelled = False
        self.lookup = PromptLookup()

    @property
    def ids(self) -> list[int]:
        """The prompt, then the answer so far."""
        return self.answer.ids

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that are not evaluated."""
        assert self.sequence is not None
        return max(0, len(self.answer.request.ids) - len(self.sequence))


class Scheduler:
    """Answers' turns on one engine.

    n_parallel: answers that run at once; n_queue: that may wait for that (None: any number). lookup: tokens to guess
    from the text so far for each that is chosen. Whoever wants an answer drives the steps (`advance`), or the
    background thread does (`run_in_background`). `steps` is the turn on the engine, for other uses of it.
    """

    def __init__(self, engine: Engine, n_parallel: int, n_queue: int | None = None, lookup: int = 0) -> None:
        self.engine, self.n_parallel, self.n_queue, self.lookup = engine, n_parallel, n_queue, lookup
        self.steps = Turn()
        self.closed = False
        self.running: list[Job] = []
        self.waiting: deque[Job] = deque()
        self._state = threading.Condition()  # guards `running` and `waiting`; notified when there is work
        self._prompt_speed = 1000.0  # tokens a second, as measured
        self._thread: threading.Thread | None = None

    def submit(self, answer: Answer) -> Job:
        """Queue an answer; BusyError where too many wait."""
        job = Job(answer)
        with self._state:
            if self.closed:
                raise ClosedError("LLM: used after close(); open the model again")
            room = self.n_parallel - len(self.running)
            if self.n_queue is not None and len(self.waiting) >= max(0, room) + self.n_queue:
                raise BusyError(
                    f"{len(self.running)} answers are running and {len(self.waiting)} waiting, which is the most; "
                    "ask again later"
                )
            self.waiting.append(job)
            self._state.notify()
        return job

    def cancel(self, job: Job) -> None:
        """End a job and free its place: at once, or after the step in progress."""
        job.cancelled = True
        if self.steps.acquire(blocking=False):  # or else whoever steps will see it
            try:
                self._sweep()
            finally:
                self.steps.release()

    def advance(self, job: Job) -> None:
        """Take steps until the job's answer has something to read or has ended."""
        while not job.answer.readable:
            with self.steps:
                if not job.answer.readable:
                    self.step()
            self._after()

    def run_in_background(self) -> None:
        """Have a thread take the steps from now on; it ends when there is nothing to do for a while."""
        with self._state:
            if self._thread is None and not self.closed:
                self._thread = threading.Thread(target=self._serve, name="hotcold-steps", daemon=True)
                self._thread.start()

    def step(self) -> bool:
        """One step for all who can go on; False if nobody can. The caller has the turn."""
        self._sweep()
        self._admit()
        ready = [job for job in self.running if job.answer.room]
        prompts = [job for job in ready if job.prompt_left]
        chosen = [job for job in ready if not job.prompt_left]
        self._decode(chosen)
        self._prefill(prompts, PROMPT_STEP if not chosen else self._patience())
        self._sweep()
        wakers: dict[Any, list[Any]] = {}
        for job in ready:
            for loop, wake in job.answer.take_wakers():
                wakers.setdefault(loop, []).append(wake)
        for loop, calls in wakers.items():
            loop.call_soon_threadsafe(lambda calls=calls: [call() for call in calls])
        return bool(ready)

    # --- places ---

    def _sweep(self) -> None:
        """Take out what has ended."""
        with self._state:
            gone = [job for job in (*self.running, *self.waiting) if job.cancelled or job.answer.ended]
            for job in gone:
                (self.waiting if job.sequence is None else self.running).remove(job)
        for job in gone:
            self._leave(job, tail=True)
            job.answer.close()

    def _leave(self, job: Job, tail: bool) -> None:
        if job.sequence is not None:
            sequence, job.sequence = job.sequence, None
            sequence.share(tail)
            sequence.close()

    def _admit(self) -> None:
        """Give free places to who waits; if there is none, those of answers that nobody reads."""
        with self._state:
            if self.waiting and len(self.running) >= self.n_parallel:
                for job in [job for job in self.running if not job.answer.room][: len(self.waiting)]:
                    self.running.remove(job)
                    self._leave(job, tail=True)
                    self.waiting.append(job)
            held_up = []
            while self.waiting and len(self.running) < self.n_parallel:
                job = self.waiting.popleft()
                if not job.answer.room:
                    held_up.append(job)
                    continue
                job.sequence = self.engine.new_sequence()
                self.running.append(job)
            self.waiting.extend(held_up)

    # --- steps ---

    def _decode(self, jobs: list[Job]) -> None:
        """Evaluate what was chosen last, by rows; with guesses of what comes next, as far as a step has room."""
        most = self.engine.max_rows
        share = max(1, most // max(1, len(jobs)))
        batch: list[tuple[Job, list[int], int]] = []  # its tokens, and how many of them are guesses
        for job in jobs:
            sequence = job.sequence
            assert sequence is not None
            if len(sequence) >= len(job.ids):  # interrupted before its logits were used
                sequence.truncate(len(job.ids) - 1)
            pending = job.ids[len(sequence) :]
            guesses: list[int] = []
            if len(pending) == 1 and self.lookup:
                room = min(self.lookup, share - 1, job.answer.left - 1)
                guesses = job.lookup.guess(job.ids, room) if room > 0 else []
            batch.append((job, (pending + guesses)[:most], len(guesses)))
        while batch:
            part: list[tuple[Job, list[int], int]] = []
            while batch and sum(len(tokens) for _, tokens, _ in part) + len(batch[0][1]) <= most:
                part.append(batch.pop(0))
            began = perf_counter()
            rows = self._evaluate([(job, tokens, 1 + n) for job, tokens, n in part], by_rows=True)
            if rows is None:
                continue
            seconds = perf_counter() - began
            at = 0
            for job, tokens, n_guesses in part:
                self._hand_out(job, tokens, rows[at : at + 1 + n_guesses], seconds)
                at += 1 + n_guesses

    def _hand_out(self, job: Job, tokens: list[int], rows: NDArray[np.float32], seconds: float) -> None:
        """Let an answer choose its next tokens; guesses that are not chosen are forgotten."""
        sequence, answer = job.sequence, job.answer
        assert sequence is not None
        answer.count_step(seconds, len(rows) - 1)
        if len(sequence) < len(job.ids):  # evaluated again, and not yet all
            return
        guesses = tokens[len(tokens) - (len(rows) - 1) :]
        before = len(job.ids)
        for i, row in enumerate(rows):
            before = len(job.ids)
            answer.take(row)
            if answer.ended or len(job.ids) == before or i == len(guesses) or job.ids[-1] != guesses[i]:
                break
            answer.stats.right_guesses += 1
        # the token chosen last is not evaluated, unless it ended the answer and is no part of it
        sequence.truncate(len(job.ids) - 1 if len(job.ids) > before else len(job.ids))

    def _prefill(self, jobs: list[Job], budget: int) -> None:
        """Evaluate parts of prompts, by tiles: equal shares for all who wait, the short ones first."""
        parts: list[tuple[Job, list[int]]] = []
        begun: set[tuple[int, ...]] = set()
        for job in jobs:
            if not job.answer.request.prompt_logprobs:
                assert job.sequence is not None
                job.answer.stats.reused_tokens += job.sequence.adopt(job.answer.request.ids)
        for index, job in enumerate(sorted(jobs, key=lambda job: job.prompt_left)):
            assert job.sequence is not None
            held, ids = len(job.sequence), job.answer.request.ids
            size = min(job.prompt_left, max(1, budget // (len(jobs) - index)))
            size = min(size, budget)
            head = tuple(ids[: held // KV_BLOCK * KV_BLOCK + KV_BLOCK])
            if size <= 0 or head in begun:  # another one computes the same block now: take it from there
                continue
            if held + size >= len(head) == held // KV_BLOCK * KV_BLOCK + KV_BLOCK:
                begun.add(head)
            budget -= size
            parts.append((job, ids[held : held + size]))
        if not parts:
            return
        if any(job.answer.request.prompt_logprobs for job, _ in parts):  # these want a row for each token
            parts = [next(part for part in parts if part[0].answer.request.prompt_logprobs)]
            parts = [(parts[0][0], parts[0][1][:128])]
        began = perf_counter()
        wanted = [self._rows_wanted(job, len(tokens)) for job, tokens in parts]
        rows = self._evaluate([(job, tokens, n) for (job, tokens), n in zip(parts, wanted, strict=True)], by_rows=False)
        if rows is None:
            return
        seconds, n_tokens = perf_counter() - began, sum(len(tokens) for _, tokens in parts)
        self._prompt_speed = 0.5 * self._prompt_speed + 0.5 * n_tokens / seconds
        at = 0
        for (job, _tokens), n in zip(parts, wanted, strict=True):
            job.answer.stats.prompt_s += seconds
            assert job.sequence is not None
            job.sequence.share()
            if job.answer.request.prompt_logprobs:
                job.answer.take_prompt(rows[at : at + n])
            if n and not job.prompt_left and not job.answer.tokens:
                job.answer.take(rows[at + n - 1])
            at += n

    def _rows_wanted(self, job: Job, n: int) -> int:
        if job.answer.request.prompt_logprobs:
            return n
        return int(n == job.prompt_left and not job.answer.tokens)

    def _patience(self) -> int:
        """Prompt tokens that keep running answers waiting for about PROMPT_SECONDS."""
        return int(min(PROMPT_STEP, max(PROMPT_LEAST, self._prompt_speed * PROMPT_SECONDS)))

    def _evaluate(self, batch: list[tuple[Job, list[int], int]], by_rows: bool) -> NDArray[np.float32] | None:
        """Logits of the last tokens of each job, as many as it wants; None if that failed, which ends their answers."""
        try:
            given = [(job.sequence, tokens) for job, tokens, _ in batch]
            return self.engine.eval_batch(given, [n for _, _, n in batch], by_rows)  # type: ignore[arg-type]
        except Exception as error:
            for job, _, _ in batch:
                job.answer.fail(error)
            return None

    # --- who steps ---

    def _after(self) -> None:
        """After giving the turn back: see to what was cancelled meanwhile."""
        for job in [*self.running, *self.waiting]:
            if job.cancelled:
                self.cancel(job)

    def _serve(self) -> None:
        worked = monotonic()
        while True:
            with self.steps:
                busy = not self.closed and self.step()
            self._after()
            if busy:
                worked = monotonic()
                continue
            with self._state:
                if self.closed or monotonic() - worked > IDLE_SECONDS:
                    self._thread = None
                    return
                self._state.wait(0.05 if self.running or self.waiting else 1.0)

    def nudge(self) -> None:
        """Tell the background thread that somebody can go on."""
        with self._state:
            self._state.notify()

    @contextmanager
    def exclusive(self) -> Iterator[Engine]:
        """The engine for another use, between steps; ClosedError after close()."""
        with self.steps:
            if self.closed:
                raise ClosedError("LLM: used after close(); open the model again")
            yield self.engine
        self._after()

    def __del__(self) -> None:
        # here and not in LLM: a stream keeps its scheduler alive, and the LLM may be dropped before it
        with suppress(Exception):
            if not self.closed:
                self.closed = True
                self.engine.close()

    def close(self) -> None:
        """After the step in progress, end all answers and close the engine."""
        with self.steps:
            if self.closed:
                return
            with self._state:
                self.closed = True
                jobs = [*self.running, *self.waiting]
                self.running.clear()
                self.waiting.clear()
                self._state.notify_all()
            for job in jobs:
                job.answer.fail(ClosedError("LLM: used after close(); open the model again"))
                for loop, wake in job.answer.take_wakers():
                    loop.call_soon_threadsafe(wake)
            self.engine.close()
