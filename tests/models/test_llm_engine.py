"""LLM over the real engine: equal seeds give equal text, to the bit, whatever was asked before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hotcold import LLM

Make = Callable[..., Path]
RANDOM = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 4}


def answer(llm: LLM, prompt: list[int], n: int = 12) -> list[bytes]:
    """The scores behind each token of an answer."""
    seen: list[bytes] = []

    def note(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        seen.append(scores.tobytes())
        return scores

    llm.generate(prompt, max_tokens=n, logits_processor=note, **RANDOM)
    return seen


@pytest.mark.parametrize("options", [{}, {"qtype": "Q4_0"}, {"qtype": "Q4_0", "sliding_window": 7}], ids=str)
def test_a_repeated_call_gives_the_same_bits(tiny_model: Make, options: dict[str, object]) -> None:
    path = tiny_model(n_ctx_train=600, n_layer=1, **options)
    rng = np.random.default_rng(1)
    base = rng.integers(3, 300, 530).tolist()
    prompts = [base[:n] for n in (1, 5, 8, 9, 17, 40, 515)] + [base[:20] + base[50:60], base[100:103]]
    with LLM(path, n_threads=2) as warm:
        fresh = []
        for prompt in prompts:
            with LLM(path, n_threads=2) as llm:
                fresh.append(answer(llm, prompt))
        for which in (0, 1, 3, 4, 4, 5, 7, 5, 6, 6, 2, 8, 1, 7, 0, 0):
            assert answer(warm, prompts[which]) == fresh[which]


def test_a_second_answer_to_a_later_turn_equals_the_first(tiny_model: Make) -> None:
    with LLM(tiny_model(qtype="Q4_0"), n_threads=2) as llm:
        talk = [{"role": "user", "content": "hello"}]
        talk += [{"role": "assistant", "content": llm.chat(talk, max_tokens=9, seed=1)}]
        talk += [{"role": "user", "content": "the world"}]
        first = llm.chat(talk, max_tokens=20, seed=2)
        assert llm.stats().reused_tokens > 8
        llm.chat("something else", max_tokens=3)
        assert llm.chat(talk[:1], max_tokens=9, seed=1) == talk[1]["content"]
        assert llm.chat(talk, max_tokens=20, seed=2) == first
