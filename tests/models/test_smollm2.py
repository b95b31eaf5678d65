"""The real default model: our greedy tokens must be those of an independent runtime, stored as data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hotcold import Engine
from hotcold.formats.tokenizer import Tokenizer, load_tokenizer
from hotcold.runtime.models import resolve

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("smollm2_golden.json").read_text(encoding="utf-8"))
N_COMPARED = 16
CASES = pytest.mark.parametrize("case", GOLDEN["prompts"], ids=lambda case: str(case["text"])[:16])


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(resolve("smollm2"), n_ctx=512, n_threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokenizer(engine: Engine) -> Tokenizer:
    return load_tokenizer(engine.file)


def greedy(engine: Engine, prompt_ids: list[int], n: int) -> list[int]:
    sequence = engine.new_sequence()
    try:
        ids = [int(engine.eval(sequence, prompt_ids)[-1].argmax())]
        while len(ids) < n:
            ids.append(int(engine.eval(sequence, ids[-1:])[-1].argmax()))
        return ids
    finally:
        sequence.close()


def test_the_golden_data_is_large_enough() -> None:
    assert len(GOLDEN["prompts"]) == 5
    for case in GOLDEN["prompts"]:
        assert len(case["ids"]) >= N_COMPARED
        # Activations in 8 bits move logits by 0.3 in the mean; a smaller gap would make equality a matter of luck.
        assert case["smallest_gap_of_16"] >= 0.4


@CASES
def test_prompt_ids(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    assert tokenizer.encode(case["prompt"], add_bos=False, special=True) == case["prompt_ids"]


@CASES
def test_greedy_tokens(engine: Engine, case: dict[str, Any]) -> None:
    assert greedy(engine, case["prompt_ids"], N_COMPARED) == case["ids"][:N_COMPARED]


@CASES
def test_text(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    ids = [token for token in case["ids"] if token != tokenizer.eos_id]
    assert tokenizer.decode(ids) == case["text"]


def test_stored_continuation_is_likely(engine: Engine) -> None:
    """The peer's whole answer, scored in one batch: its tokens stay at or next to our best ones."""
    for case in GOLDEN["prompts"]:
        ids = case["prompt_ids"] + case["ids"]
        sequence = engine.new_sequence()
        logits = engine.eval(sequence, ids, all_logits=True)[len(case["prompt_ids"]) - 1 : -1]
        sequence.close()
        chosen = logits[np.arange(len(logits)), case["ids"]]
        assert np.all(logits.max(axis=1) - chosen < 0.5)
