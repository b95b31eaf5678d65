"""Continuous batching on a fake engine: who is in which step, who waits, and what ends whom."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from fakes import N_VOCAB, FakeEngine, FakeTokenizer, saying

from hotcold.formats.chat_template import CHATML, ChatTemplate
from hotcold.formats.errors import BusyError, ClosedError, HotcoldError
from hotcold.runtime.answer import UNREAD, Answer
from hotcold.runtime.batch import PROMPT_LEAST, PROMPT_STEP
from hotcold.runtime.cpu.layout import KV_BLOCK
from hotcold.runtime.llm import LLM

Hook = Callable[[int], None]


class Watched(FakeEngine):
    """Remembers its steps: (by rows, tokens of each sequence); `before` and `after` are called with their number."""

    def __init__(self, next_token: Callable[[list[int]], int | None] = lambda tokens: None, n_ctx: int = 4000) -> None:
        super().__init__(next_token, n_ctx)
        self.steps: list[tuple[bool, list[int]]] = []
        self.before: Hook = lambda step: None
        self.after: Hook = lambda step: None
        self.sequences: list[Any] = []

    def new_sequence(self, guest: bool = False) -> Any:
        self.sequences.append(super().new_sequence(guest))
        return self.sequences[-1]

    def row(self, tokens: list[int]) -> np.ndarray:  # long prompts are many tokens to seed noise with
        return super().row([len(tokens), sum(tokens), *tokens[-8:]] if self.next_token(tokens) is None else tokens)

    def eval_batch(self, batch: Any, outputs: Any, by_rows: bool) -> np.ndarray:
        step = len(self.steps)
        self.steps.append((by_rows, [len(ids) for _, ids in batch]))
        self.before(step)
        rows = super().eval_batch(batch, outputs, by_rows)
        self.after(step)
        return rows


def watched(n_parallel: int = 4, engine: Watched | None = None, **options: Any) -> tuple[LLM, Watched]:
    engine = engine or Watched()
    template = ChatTemplate(CHATML, "<s>", "<|im_end|>")
    given: Any = engine
    tokenizer: Any = FakeTokenizer()
    return LLM.from_engine(given, tokenizer, template, n_parallel=n_parallel, **options), engine


def step(llm: LLM, n: int = 1) -> None:
    for _ in range(n):
        with llm.scheduler.steps:
            llm.scheduler.step()


def text(answer: Answer) -> str:
    return "".join(piece.text for piece in answer)


def started(llm: LLM, prompt: str | list[int], **options: Any) -> Answer:
    answer = llm.ask(prompt, **{"max_tokens": 12, "seed": 5, **options})
    answer.start()
    return answer


def alone(prompt: str | list[int], **options: Any) -> str:
    llm, _ = watched(1)
    return text(llm.ask(prompt, **{"max_tokens": 12, "seed": 5, **options}))


def all_free(llm: LLM, engine: Watched) -> bool:
    at_rest = not llm.scheduler.running and not llm.scheduler.waiting
    return at_rest and all(sequence.closed for sequence in engine.sequences)


@contextmanager
def thread(work: Callable[[], object]) -> Iterator[threading.Thread]:
    worker = threading.Thread(target=work)
    worker.start()
    yield worker
    worker.join(30)
    assert not worker.is_alive()


# --- steps ---


def test_answers_join_and_leave_at_every_step() -> None:
    llm, engine = watched(8)
    prompts, limits = [f"prompt {i}" for i in range(8)], [12, 3, 9, 1, 7, 5, 11, 2]
    answers: list[Answer] = []
    for prompt, limit in zip(prompts, limits, strict=True):
        answers.append(started(llm, prompt, max_tokens=limit))
        step(llm)
    step(llm, 12)
    assert all_free(llm, engine)
    wanted = [alone(prompt, max_tokens=limit) for prompt, limit in zip(prompts, limits, strict=True)]
    assert [text(answer) for answer in answers] == wanted
    # answer i is given its prompt in step i and has its first token then: another one in each of the next steps
    ends = [i + limit for i, limit in enumerate(limits)]
    at_work = [sum(i < now < end for i, end in enumerate(ends)) for now in range(20)]
    assert [sum(sizes) for by_rows, sizes in engine.steps if by_rows] == [n for n in at_work if n]
    assert [answer.stats.decode_steps for answer in answers] == [limit - 1 for limit in limits]


def test_more_answers_than_rows_take_several_evaluations() -> None:
    llm, engine = watched(40)
    engine.max_rows = 7
    answers = [started(llm, [i, 3], max_tokens=4) for i in range(40)]
    step(llm, 4)
    assert [sizes for by_rows, sizes in engine.steps if by_rows] == 3 * [*[[1] * 7] * 5, [1] * 5]
    assert [text(answer) for answer in answers] == [alone([i, 3], max_tokens=4) for i in range(40)]


def test_a_long_prompt_holds_nobody_up_by_more_than_a_bounded_step() -> None:
    llm, engine = watched(2)
    running = started(llm, "a", max_tokens=30)
    step(llm)
    long = started(llm, [7] * 2000, max_tokens=1)
    del engine.steps[:]
    step(llm, 29)
    rows, prompts = engine.steps[0::2], engine.steps[1::2]
    assert rows[:3] == [(True, [1])] * 3 and all(not by_rows for by_rows, _ in prompts[:3])
    assert PROMPT_LEAST <= max(sizes[0] for _, sizes in prompts[:3]) <= PROMPT_STEP
    assert text(running) == alone("a", max_tokens=30) and text(long) == alone([7] * 2000, max_tokens=1)


def test_prompts_get_equal_shares_and_short_ones_end_first() -> None:
    llm, engine = watched(4)
    lengths = [2000, 40, 1500, 1400]
    answers = [started(llm, [i + 1] * n, max_tokens=1) for i, n in enumerate(lengths)]
    step(llm)
    assert engine.steps == [(False, [40, 157, 157, 158])]
    step(llm, 10)
    assert all(sum(sizes) <= PROMPT_STEP for _, sizes in engine.steps)
    assert sum(sum(sizes) for _, sizes in engine.steps) == sum(lengths)
    assert all(max(sizes) - min(sizes) <= 1 for _, sizes in engine.steps[1:4])
    assert [answer.finish_reason for answer in answers] == ["length"] * 4


@pytest.mark.parametrize("n_prompt", [2000, 1984, 33, 32, 20])
def test_equal_prompts_are_computed_once(n_prompt: int) -> None:
    llm, engine = watched(8)
    prompt = np.random.default_rng(1).integers(0, 256, n_prompt).tolist()
    answers = [started(llm, prompt, max_tokens=5, seed=seed) for seed in range(8)]
    step(llm)
    assert engine.steps[0][1][0] == min(PROMPT_STEP, n_prompt), "the first has the step for itself"
    step(llm, 20)
    computed = sum(sum(sizes) for by_rows, sizes in engine.steps if not by_rows)
    assert n_prompt <= computed <= n_prompt + 7 * (KV_BLOCK + 1)
    assert [text(answer) for answer in answers] == [alone(prompt, max_tokens=5, seed=seed) for seed in range(8)]
    reused = sorted(answer.stats.reused_tokens for answer in answers)
    assert reused[0] == 0 and reused[1] >= (n_prompt - 1) // KV_BLOCK * KV_BLOCK


def test_prompts_whose_scores_are_wanted_share_the_rows_of_a_step() -> None:
    llm, engine = watched(4)
    prompts = [np.random.default_rng(i).integers(0, 256, 300).tolist() for i in range(3)]
    answers = [started(llm, ids, logprobs=1, prompt_logprobs=True, max_tokens=2) for ids in (*prompts, prompts[0])]
    other = started(llm, [9] * 700, max_tokens=1)
    sizes = []
    while any(not answer.ended for answer in answers):
        step(llm)
        sizes += [sum(own) for by_rows, own in engine.steps[-2:] if not by_rows]
    step(llm, 10)
    singles = []
    for ids in prompts:
        single, _ = watched(1)
        singles.append(single.ask(ids, 2, logprobs=1, prompt_logprobs=True, seed=5))
        text(singles[-1])
    for answer, wanted in zip(answers, [*singles, singles[0]], strict=True):
        assert answer.prompt_scores == wanted.prompt_scores and len(answer.prompt_scores) == 300
    assert other.finish_reason == "length" and max(sizes) <= PROMPT_STEP


# --- the queue ---


def test_the_queue_is_bounded() -> None:
    llm, engine = watched(2, n_queue=3)
    answers = [started(llm, f"{i}") for i in range(5)]
    with pytest.raises(BusyError, match="0 answers are running and 5 waiting") as caught:
        started(llm, "one too many")
    assert caught.value.retry_after > 0
    step(llm)
    assert len(llm.scheduler.running) == 2 and len(llm.scheduler.waiting) == 3
    with pytest.raises(BusyError, match="2 answers are running and 3 waiting"):
        next(iter(llm.ask("and again")))
    answers[4].close()
    assert text(started(llm, "now there is room")) == alone("now there is room")
    assert [text(answer) for answer in answers[:4]] == [alone(f"{i}") for i in range(4)]
    assert all_free(llm, engine)
    full, _ = watched(1, n_queue=0)
    first = started(full, "a")
    with pytest.raises(BusyError):
        started(full, "b")
    assert text(first) == alone("a") and text(started(full, "b")) == alone("b")


def test_the_queue_is_first_in_first_out() -> None:
    llm, _ = watched(1)
    answers = [started(llm, f"{i}", max_tokens=2) for i in range(4)]
    ended = []
    for _ in range(20):
        step(llm)
        ended += [i for i, answer in enumerate(answers) if answer.ended and i not in ended]
    assert ended == [0, 1, 2, 3]


@pytest.mark.parametrize("when", ["waiting", "prompt", "answer", "ended"])
def test_a_closed_answer_frees_its_place(when: str) -> None:
    llm, engine = watched(2)
    other = started(llm, "other")
    closed = started(llm, [5] * (2000 if when == "prompt" else 4), max_tokens=6)
    after = started(llm, "after")
    step(llm, {"waiting": 0, "prompt": 2, "answer": 2, "ended": 10}[when])
    closed.close()
    closed.close()
    assert closed.ended and len(llm.scheduler.running) + len(llm.scheduler.waiting) <= 2
    assert sum(not sequence.closed for sequence in engine.sequences) == len(llm.scheduler.running)
    step(llm)
    assert len(llm.scheduler.running) == 2 or when == "ended"
    assert (text(other), text(after)) == (alone("other"), alone("after"))
    assert text(closed) in alone([5] * (2000 if when == "prompt" else 4), max_tokens=6)
    assert all_free(llm, engine)


def test_an_answer_may_be_closed_by_another_thread_in_the_midst_of_a_step() -> None:
    llm, engine = watched(2)
    closed, other = started(llm, "closed"), started(llm, "other")

    def close(step: int) -> None:
        if step == 3:
            with thread(closed.close):  # it does not wait for the step
                pass
            assert closed.ended and len(llm.scheduler.running) == 2

    engine.before = close
    assert text(other) == alone("other")
    assert [len(sizes) for by_rows, sizes in engine.steps if by_rows] == [2, 2, 2, *[1] * 8]
    assert alone("closed").startswith(text(closed)) and all_free(llm, engine)


def test_an_answer_may_be_closed_while_another_use_has_the_turn() -> None:
    llm, engine = watched(2)
    answer = started(llm, "a")
    step(llm)
    with pytest.raises(ZeroDivisionError), llm.scheduler.exclusive():
        with thread(answer.close):
            pass
        assert len(llm.scheduler.running) == 1
        raise ZeroDivisionError
    assert all_free(llm, engine)


def test_answers_may_be_closed_from_within_a_logits_processor() -> None:
    llm, engine = watched(3)
    answers: list[Answer] = []

    def close(which: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        def processor(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
            if len(ids) > 5:
                answers[which].close()
            return scores

        return processor

    answers += [started(llm, "a", logits_processor=close(0)), started(llm, "b"), started(llm, "c")]
    answers[2].close()
    answers[2] = started(llm, "c", logits_processor=close(1))
    assert text(answers[2]) == alone("c")
    assert alone("a").startswith(text(answers[0])) and alone("b").startswith(text(answers[1]))
    assert all_free(llm, engine)


def test_a_logits_processor_cannot_ask_the_model_that_waits_for_it() -> None:
    llm, engine = watched(2)

    def nested(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        llm.generate("b")
        return scores

    other = started(llm, "other")
    with pytest.raises(HotcoldError, match="in the midst of a step"):
        llm.generate("a", logits_processor=nested)
    assert text(other) == alone("other") and all_free(llm, engine)


# --- unread answers ---


def test_unread_answers_pause_give_their_place_and_go_on() -> None:
    llm, engine = watched(2)
    answers = [started(llm, f"{i}", max_tokens=100) for i in range(2)]
    step(llm, 200)
    assert not any(answer.room for answer in answers) and len(llm.scheduler.running) == 2
    assert all(UNREAD <= len(answer.tokens) < 2 * UNREAD for answer in answers)
    steps = len(engine.steps)
    step(llm)
    assert len(engine.steps) == steps, "nobody can go on"
    third = started(llm, "third", max_tokens=100)
    assert text(third) == alone("third", max_tokens=100)
    assert len(llm.scheduler.running) + len(llm.scheduler.waiting) == 2
    fourth, fifth = started(llm, "fourth"), started(llm, "fifth")
    assert text(fifth) == alone("fifth") and text(fourth) == alone("fourth")
    assert not llm.scheduler.running, "both gave their places"
    assert [text(answer) for answer in answers] == [alone(f"{i}", max_tokens=100) for i in range(2)]
    assert all_free(llm, engine)


def test_places_are_not_taken_for_others_who_cannot_go_on() -> None:
    llm, _ = watched(1)
    first = started(llm, "first", max_tokens=100)
    step(llm, 50)
    second = started(llm, "second", max_tokens=100)
    step(llm, 50)
    assert not first.room and not second.room
    third = started(llm, "third", max_tokens=3)
    step(llm)
    assert len(llm.scheduler.running) == 1 and text(third) == alone("third", max_tokens=3)
    step(llm)
    assert [text(a) for a in (second, first)] == [alone(p, max_tokens=100) for p in ("second", "first")]


def test_an_answer_that_nobody_holds_ends() -> None:
    llm, engine = watched(1, n_queue=1)
    for _ in range(3):
        dropped = [started(llm, "dropped"), started(llm, "dropped too")]
        step(llm, 3)
        dropped.clear()
        step(llm)
        assert all_free(llm, engine)


# --- what fails ---


class Broken:
    def __init__(self, where: str) -> None:
        self.where, self.calls = where, 0

    def __call__(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return self.fail("processor") or scores

    def apply(self, scores: np.ndarray) -> None:
        self.fail("apply")

    def accept(self, token: int) -> None:
        self.fail("accept")

    def fail(self, where: str) -> None:
        self.calls += 1
        if where == self.where and self.calls > 4:
            raise ZeroDivisionError(where)


@pytest.mark.parametrize("where", ["processor", "apply", "accept"])
def test_a_broken_callback_fails_its_own_answer_alone(where: str) -> None:
    llm, engine = watched(3)
    first, last = started(llm, "first"), started(llm, "last")
    broken = Broken(where)
    given: dict[str, Any] = {"logits_processor": broken} if where == "processor" else {"constraint": broken}
    failing = started(llm, "failing", **given)
    step(llm, 20)
    with pytest.raises(ZeroDivisionError, match=where):
        text(failing)
    assert len(failing.tokens) >= 2 and isinstance(failing.error, ZeroDivisionError)
    assert (text(first), text(last)) == (alone("first"), alone("last"))
    assert all_free(llm, engine)


def test_a_failing_engine_fails_the_answers_of_that_evaluation() -> None:
    llm, engine = watched(4)

    def fail(step: int) -> None:
        if step in failing:
            raise RuntimeError(f"evaluation {step}")

    engine.before, failing = fail, {3}
    both = [started(llm, f"{i}") for i in range(2)]
    step(llm, 2)
    assert [sizes for _, sizes in engine.steps] == [[2, 2], [1, 1]]
    late = started(llm, "late")
    step(llm)  # evaluation 2 is of the two answers, and 3 of the new prompt
    assert isinstance(late.error, RuntimeError) and not any(answer.ended for answer in both)
    again = started(llm, "late")
    failing = {4}
    step(llm)
    assert all(isinstance(answer.error, RuntimeError) for answer in both)
    for answer in (*both, late):
        with pytest.raises(RuntimeError, match="evaluation"):
            text(answer)
    assert text(again) == alone("late")
    assert all_free(llm, engine)


@pytest.mark.parametrize("lookup", [0, 4])
@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_in_the_thread_that_steps_costs_the_others_nothing(when: str, lookup: int) -> None:
    prompts: list[Any] = [list(range(KV_BLOCK)), [*range(KV_BLOCK)] * 2, "c"]
    scored = list(range(40, 80))
    wanted = [alone(prompt) for prompt in prompts]
    single, _ = watched(1)
    plain = single.ask(scored, 3, logprobs=1, prompt_logprobs=True, seed=5)
    text(plain)
    for at in (0, 1, 2, 3, 5, 8):
        llm, engine = watched(6, lookup=lookup)

        def strike(step: int, at: int = at) -> None:
            if step == at:
                raise KeyboardInterrupt

        setattr(engine, when, strike)
        others = [started(llm, prompt) for prompt in prompts]
        others.append(started(llm, scored, logprobs=1, prompt_logprobs=True, max_tokens=3))
        mine = started(llm, "mine", max_tokens=30)
        with pytest.raises(KeyboardInterrupt):
            text(mine)
        assert mine.ended and len(llm.scheduler.running) <= 4
        assert [text(answer) for answer in others[:3]] == wanted
        assert text(others[3]) == text(plain) or plain.tokens == others[3].tokens
        assert others[3].prompt_scores == plain.prompt_scores
        assert all_free(llm, engine)


@pytest.mark.parametrize("when", ["waiting", "prompt", "answer"])
def test_close_ends_everybody(when: str) -> None:
    llm, engine = watched(2)
    answers = [started(llm, [7] * (3000 if when == "prompt" else 9)) for _ in range(3)]
    step(llm, 0 if when == "waiting" else 2)
    errors: list[BaseException] = []

    def read(answer: Answer) -> None:
        try:
            text(answer)
        except BaseException as error:
            errors.append(error)

    seen, go = threading.Event(), threading.Event()

    def hold(step: int) -> None:
        seen.set()
        go.wait(30)

    engine.before = hold
    with thread(lambda: read(answers[0])), thread(lambda: read(answers[1])), thread(lambda: read(answers[2])):
        assert seen.wait(30)
        with thread(llm.close):
            assert not engine.closed
            go.set()
    assert engine.closed and [type(error) for error in errors] == [ClosedError] * 3
    assert all_free(llm, engine)
    with pytest.raises(ClosedError):
        llm.ask("a").start()


# --- guesses ---


def test_guesses_save_steps_and_change_nothing() -> None:
    said = b"one two three one two three one two three one two three one two three"
    found = {}
    for lookup in (0, 5):
        llm, engine = watched(2, Watched(saying(*said)), lookup=lookup)
        answers = [started(llm, "go?", max_tokens=None, temperature=0), started(llm, "and?", max_tokens=None)]
        for answer in answers:
            assert text(answer) == said.decode()
        found[lookup] = len(engine.steps)
        stats = answers[0].stats
        assert stats.decode_steps + stats.right_guesses == len(said)  # the first token comes with the prompt, and the
        assert stats.right_guesses <= stats.guessed_tokens  # end token is no part of the answer
        assert all_free(llm, engine)
    assert found[5] < 0.5 * found[0]


def test_guesses_leave_room_for_everybody_in_a_step() -> None:
    cycle = dict(zip(b"abc", b"bca", strict=True))
    llm, engine = watched(8, Watched(lambda tokens: cycle.get(tokens[-1])), lookup=16)
    answers = [started(llm, [i, *b"abcabc"], max_tokens=20, temperature=0) for i in range(8)]
    step(llm, 25)
    rows = [sizes for by_rows, sizes in engine.steps if by_rows]
    assert rows == [[4] * 8] * 4 + [[3] * 8], "four rows for each, and no more than the answer may have"
    assert [text(answer) for answer in answers] == ["abcabcabcabcabcabcab"] * 8


# --- threads ---


def test_many_threads_many_answers() -> None:
    llm, engine = watched(4)
    found: dict[int, str] = {}

    def work(i: int) -> None:
        for turn in range(4):
            if turn == i % 4:
                for _ in llm.ask(f"left {i}", 12, seed=1):
                    break  # and it is dropped
            found[i] = text(llm.ask(f"prompt {i % 5}", 12, seed=5))
            assert llm.logits([i]).shape == (1, N_VOCAB)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    gc.collect()
    assert found == {i: alone(f"prompt {i % 5}") for i in range(12)}
    assert not llm.scheduler.running and not llm.scheduler.waiting
