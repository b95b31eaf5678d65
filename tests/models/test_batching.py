"""Several answers at once over the real engine: each gets to the bit what it would get alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hotcold import LLM, Engine
from hotcold.runtime.answer import Answer

Make = Callable[..., Path]
RANDOM = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
KINDS: dict[str, dict[str, Any]] = {
    "float": {},
    "q4_0": {"qtype": "Q4_0"},
    "q4_k": {"qtype": "Q4_K", "n_embd": 256, "n_ff": 256},
    "window": {"qtype": "Q8_0", "sliding_window": 20},
    "experts": {"qtype": "Q4_0", "arch": "qwen3moe", "n_expert": 8, "n_expert_used": 3, "head_dim": 32},
    "gelu": {"arch": "qwen2", "n_embd": 96, "n_head": 3, "n_head_kv": 1},
}


SPARSE = {"qtype": "Q8_0", "metadata": {"llama.hidden_activation": "relu"}}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tiny_model: Make) -> Path:
    return tiny_model(n_ctx_train=900, n_layer=2, **KINDS[request.param])


def prompts(n: int) -> list[list[int]]:
    """Some go on from others, two are equal, all have other lengths."""
    base = np.random.default_rng(1).integers(3, 300, 700).tolist()
    found = [base[:40], base[:75], base[:33] + base[400:420], base[:600], base[9:10], base[100:164], base[:40]]
    return [*found, base[7:300]][:n]


def noted(llm: LLM, ids: list[int], seen: list[bytes], n: int = 14, **options: Any) -> Answer:
    """An answer that notes the scores behind each of its tokens."""

    def note(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        seen.append(scores.tobytes())
        return scores

    return llm.ask(ids, n, logits_processor=note, **{**RANDOM, "seed": len(ids), **options})


def alone(model: Path, ids: list[int], **options: Any) -> tuple[list[int], list[bytes]]:
    with LLM(model, n_threads=2, n_parallel=8) as llm:  # which chooses its kernels
        seen: list[bytes] = []
        answer = noted(llm, ids, seen, **options)
        list(answer)
        return answer.tokens, seen


def test_eight_answers_at_once_are_what_each_is_alone(model: Path) -> None:
    wanted = [alone(model, ids) for ids in prompts(8)]
    with LLM(model, n_threads=2, n_parallel=8) as llm:
        for late in (False, True):
            seen: list[list[bytes]] = [[] for _ in wanted]
            answers = [noted(llm, ids, own) for ids, own in zip(prompts(8), seen, strict=True)]
            for answer in answers:
                answer.start()
                if late:  # they join in the midst of others
                    with llm.scheduler.steps:
                        llm.scheduler.step()
            for answer in answers:
                list(answer)
            assert [(answer.tokens, own) for answer, own in zip(answers, seen, strict=True)] == wanted
        cache = llm.engine.cache
        assert cache.n_used == cache.n_idle, "all blocks are back"


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.7, "top_k": 3}], ids=["greedy", "seeded"])
def test_lookup_gives_the_same_text_in_fewer_steps(model: Path, sampling: dict[str, Any]) -> None:
    # no text of such a model repeats: a bias has it say a few tokens again and again
    bias = {token: 20.0 for token in range(40, 43)}
    found, steps = [], []
    for lookup in (0, 3, 16):
        with LLM(model, n_threads=2, n_parallel=3, lookup=lookup) as llm:
            answers = [llm.ask(ids, 60, seed=3, logit_bias=bias, **sampling) for ids in prompts(3)]
            for answer in answers:
                answer.start()
            for answer in answers:
                list(answer)
            found.append([answer.tokens for answer in answers])
            steps.append(sum(answer.stats.decode_steps for answer in answers))
            assert llm.engine.cache.n_used == llm.engine.cache.n_idle
    assert found[0] == found[1] == found[2]
    assert steps[0] == sum(len(tokens) - 1 for tokens in found[0])
    assert steps[1] < 0.8 * steps[0] and steps[2] < 0.8 * steps[0]


def test_an_answer_that_lost_its_blocks_goes_on_to_the_bit(model: Path) -> None:
    ids = prompts(2)[1]
    wanted = alone(model, ids, n=120)
    with LLM(model, n_threads=2, lookup=4) as llm:
        seen: list[bytes] = []
        answer = noted(llm, ids, seen, n=120)
        pieces = iter(answer)
        next(pieces)
        for i in range(3):
            next(pieces)
            others = [llm.ask(own, 40, seed=i) for own in prompts(8)[3:]]
            for other in others:
                list(other)
            assert all(job.sequence is None for job in llm.scheduler.waiting)
            llm.engine.cache.prefixes.clear()
        list(pieces)
        assert (answer.tokens, seen) == wanted


def test_prompts_in_parts_of_any_size_give_the_same_bits(model: Path) -> None:
    ids = prompts(4)[3]
    with Engine(model, n_threads=2) as engine:
        seen: dict[int, set[bytes]] = {}  # the logits of each token that was some part's last
        for size in (512, 100, 32, 7, 1):
            sequence = engine.new_sequence()
            for at in range(0, len(ids) if size > 8 else 130, size):
                row = engine.eval_batch([(sequence, ids[at : at + size])], by_rows=False)
                seen.setdefault(len(sequence), set()).add(row.tobytes())
            sequence.close()
    assert [len(seen[n]) for n in (32, 96, 100, 512, 600)] == [1] * 5
    assert all(len(rows) == 1 for rows in seen.values())


def test_rows_are_the_same_in_every_company(model: Path) -> None:
    """One to 32 tokens by rows, of one sequence and of several."""
    ids = prompts(2)[1]
    with Engine(model, n_threads=2, n_parallel=8) as engine:
        sequence = engine.new_sequence()
        wanted = [engine.eval_batch([(sequence, [token])], by_rows=True)[0].tobytes() for token in ids]
        for n in range(2, engine.max_rows + 1):
            sequence.truncate(n % 5)
            got = engine.eval_batch([(sequence, ids[n % 5 : n % 5 + n])], [n], by_rows=True)
            assert [row.tobytes() for row in got] == wanted[n % 5 : n % 5 + n]
        several = [engine.new_sequence() for _ in range(min(7, engine.max_rows))]
        for i, one in enumerate(several):
            engine.eval_batch([(one, ids[: i + 1])], [0], by_rows=True)
        for _ in range(9):
            ends = [len(one) for one in several]
            got = engine.eval_batch([(one, [ids[len(one)]]) for one in several], by_rows=True)
            assert [row.tobytes() for row in got] == [wanted[end] for end in ends]


def test_threads_with_answers_of_their_own(model: Path) -> None:
    wanted = [alone(model, ids)[0] for ids in prompts(6)]
    with LLM(model, n_threads=2, n_parallel=3, lookup=2) as llm:
        found: dict[int, list[int]] = {}

        def work(i: int) -> None:
            for _ in range(3):
                answer = noted(llm, prompts(6)[i], [])
                list(answer)
                found[i] = answer.tokens

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert [found.get(i) for i in range(6)] == wanted
        assert llm.engine.cache.n_used == llm.engine.cache.n_idle


@pytest.mark.parametrize("sparsity", ["exact", "dense"])
def test_with_sparsity_company_costs_rounding(tiny_model: Make, sparsity: str) -> None:
    """A step's tokens share one list of neurons there, and its sums go by that list."""
    ids = prompts(2)[1]
    with Engine(tiny_model(n_ctx_train=900, **SPARSE), n_threads=2, n_parallel=8, sparsity=sparsity) as engine:
        several = [engine.new_sequence() for _ in range(6)]
        alone = engine.new_sequence()
        for i, sequence in enumerate(several):
            engine.eval_batch([(sequence, ids[: 9 * i + 1])], [0], by_rows=False)
        got = engine.eval_batch([(one, [ids[len(one)]]) for one in several], by_rows=True).copy()
        for i, row in enumerate(got):
            alone.truncate(0)
            engine.eval_batch([(alone, ids[: 9 * i + 1])], [0], by_rows=False)
            wanted = engine.eval_batch([(alone, [ids[9 * i + 1]])], by_rows=True)[0]
            # a rounding that falls on the other side changes an activation's 8 bits by one step
            error = float(np.sqrt(np.mean(np.square(row - wanted))) / wanted.std())
            assert error < (0.03 if sparsity == "exact" else 1e-30)
