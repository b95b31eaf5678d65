"""One step of several answers on one engine: the tokens that were chosen last, then parts of the prompts that wait.

Both kinds of tokens have kernels of their own, in which a token's numbers do not depend on the others in its step.
"""

from __future__ import annotations

import weakref
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .cpu.layout import KV_BLOCK
from .prompt_lookup import PromptLookup

if TYPE_CHECKING:
    from .answer import Answer
    from .engine import Engine
    from .kv_cache import Sequence as Tokens

PROMPT_STEP = 512  # prompt tokens of one step, at most
PROMPT_ROWS = 128  # of these with logits, at most
PROMPT_SECONDS = 0.1  # for how long prompts may hold up answers that are running
PROMPT_LEAST = 32  # but so many of their tokens always may


class Job:
    """An answer in the scheduler: its sequence while it has a place. It ends with the last who could read it."""

    def __init__(self, answer: Answer, unit: object) -> None:
        self._answer = weakref.ref(answer)
        self.unit = unit  # the same for answers that were queued together
        self.sequence: Tokens | None = None
        self.cancelled = False
        self.lookup = PromptLookup()

    @property
    def answer(self) -> Answer | None:
        """None where nobody holds it any more."""
        return self._answer()

    @property
    def over(self) -> bool:
        """Whether nobody waits for more of it."""
        answer = self._answer()
        return self.cancelled or answer is None or answer.ended or answer.abandoned


class Live:
    """An answer for the length of a step, with its sequence."""

    def __init__(self, job: Job, answer: Answer) -> None:
        assert job.sequence is not None
        self.answer, self.sequence, self.lookup = answer, job.sequence, job.lookup

    @property
    def ids(self) -> list[int]:
        """The prompt, then the answer so far."""
        return self.answer.ids

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that are not evaluated."""
        return max(0, len(self.answer.request.ids) - len(self.sequence))

    @property
    def echoes(self) -> bool:
        """Whether its prompt's own log probabilities are wanted: a row of logits for each token."""
        return self.answer.request.prompt_logprobs

    def rewind(self) -> None:
        """Forget what was evaluated for nothing, because Ctrl-C came before anybody used it."""
        answer, held = self.answer, len(self.sequence)
        if answer.tokens:
            self.sequence.truncate(len(self.ids) - 1)
            return
        used = len(self.ids) - 1  # the last one's logits choose the first token
        if self.echoes:
            used = max(0, min(used, len(answer.prompt_scores) - 1))
        if held > used:
            self.sequence.truncate(used // KV_BLOCK * KV_BLOCK)  # what is left of a block may be others' too


class Batch:
    """Steps of one engine. lookup: tokens to guess from the text so far for each that is chosen."""

    def __init__(self, engine: Engine, lookup: int = 0) -> None:
        self.engine, self.lookup = engine, lookup
        self._prompt_speed = 1000.0  # tokens a second, as measured

    def step(self, lives: list[Live]) -> None:
        """One step for all of these, who have room for more."""
        for live in lives:
            live.rewind()
        prompts = [live for live in lives if live.prompt_left]
        chosen = [live for live in lives if not live.prompt_left]
        self._decode(chosen)
        self._prefill(prompts, self._patience() if chosen else PROMPT_STEP)

    # --- answers ---

    def _decode(self, lives: list[Live]) -> None:
        """Evaluate what was chosen last, by rows; with guesses of what comes next, as far as a step has room."""
        most = self.engine.max_rows
        share = max(1, most // max(1, len(lives)))
        parts: list[list[tuple[Live, list[int], int]]] = []  # of tokens, and how many of them are guesses
        size = most
        for live in lives:
            tokens, guesses = live.ids[len(live.sequence) :], []
            if len(tokens) == 1 and self.lookup:
                room = min(self.lookup, share - 1, live.answer.left - 1)
                guesses = live.lookup.guess(live.ids, room) if room > 0 else []
            tokens = (tokens + guesses)[:most]
            if size + len(tokens) > most:
                parts.append([])
                size = 0
            parts[-1].append((live, tokens, len(guesses)))
            size += len(tokens)
        for part in parts:
            began = perf_counter()
            rows = self._evaluate([(live, tokens, 1 + n) for live, tokens, n in part], by_rows=True)
            if rows is None:
                continue
            seconds, at = perf_counter() - began, 0
            for live, tokens, n in part:
                self._hand_out(live, tokens[len(tokens) - n :], rows[at : at + 1 + n], seconds)
                at += 1 + n

    def _hand_out(self, live: Live, guesses: list[int], rows: NDArray[np.float32], seconds: float) -> None:
        """Let an answer choose its next tokens; guesses that are not chosen are forgotten."""
        answer, ids = live.answer, live.ids
        if len(live.sequence) < len(ids):  # it comes back to its place, and not all of it is evaluated again
            return
        answer.count_step(seconds, len(guesses))
        before = len(ids)
        for i, row in enumerate(rows):
            before = len(ids)
            answer.take(row)
            if answer.ended or len(ids) == before or i == len(guesses) or ids[-1] != guesses[i]:
                break
            answer.stats.right_guesses += 1
        # the token chosen last is not evaluated, unless it ended the answer and is no part of it
        live.sequence.truncate(len(ids) - 1 if len(ids) > before else len(ids))

    # --- prompts ---

    def _prefill(self, lives: list[Live], budget: int) -> None:
        """Evaluate parts of prompts, by tiles."""
        parts = self._parts(self._firsts(lives), budget)
        if not parts:
            return
        wanted = [self._rows_wanted(live, len(tokens)) for live, tokens in parts]
        began = perf_counter()
        batch = [(live, tokens, n) for (live, tokens), n in zip(parts, wanted, strict=True)]
        rows = self._evaluate(batch, by_rows=False)
        if rows is None:
            return
        seconds = max(1e-9, perf_counter() - began)
        self._prompt_speed = 0.5 * self._prompt_speed + 0.5 * sum(len(tokens) for _, tokens in parts) / seconds
        at = 0
        for live, tokens, n in batch:
            answer, sequence = live.answer, live.sequence
            answer.stats.prompt_s += seconds
            if live.echoes:
                answer.take_prompt(rows[at : at + n], len(sequence) - len(tokens))
            if n and not live.prompt_left and not answer.tokens:
                answer.take(rows[at + n - 1])
            sequence.share()
            at += n

    def _firsts(self, lives: list[Live]) -> list[Live]:
        """Who has a part of a prompt to evaluate that nobody else evaluates now; those with little left first."""
        for live in lives:
            if not live.echoes:
                reused = live.sequence.adopt(live.answer.request.ids)
                if not live.answer.tokens:
                    live.answer.stats.reused_tokens += reused
        firsts, begun = [], set()
        for live in sorted(lives, key=lambda live: live.prompt_left):
            end = len(live.sequence) // KV_BLOCK * KV_BLOCK + KV_BLOCK
            head = tuple(live.answer.request.ids[:end])
            if head in begun and not live.echoes:  # it can take that block when it is full
                continue
            if len(head) == end:
                begun.add(head)
            firsts.append(live)
        return firsts

    def _parts(self, lives: list[Live], budget: int) -> list[tuple[Live, list[int]]]:
        """Equal shares of a step."""
        parts, rows = [], PROMPT_ROWS - len(lives)
        echoing = sum(live.echoes for live in lives)
        for index, live in enumerate(lives):
            size = min(live.prompt_left, budget, max(1, budget // (len(lives) - index)))
            if live.echoes:
                size = min(size, 1 + rows // echoing)
                rows, echoing = rows - (size - 1), echoing - 1
            if size:
                held = len(live.sequence)
                parts.append((live, live.answer.request.ids[held : held + size]))
                budget -= size
        return parts

    def _rows_wanted(self, live: Live, n: int) -> int:
        if live.echoes:
            return n
        return int(n == live.prompt_left and not live.answer.tokens)

    def _patience(self) -> int:
        """Prompt tokens that keep running answers waiting for about PROMPT_SECONDS."""
        return int(min(PROMPT_STEP, max(PROMPT_LEAST, self._prompt_speed * PROMPT_SECONDS)))

    def _evaluate(self, batch: list[tuple[Live, list[int], int]], by_rows: bool) -> NDArray[np.float32] | None:
        """Logits of the last tokens of each, as many as it wants; None if that failed, which ends their answers."""
        try:
            given = [(live.sequence, tokens) for live, tokens, _ in batch]
            return self.engine.eval_batch(given, [n for _, _, n in batch], by_rows)
        except Exception as error:
            for live, _, _ in batch:
                live.answer.fail(error)
            return None
