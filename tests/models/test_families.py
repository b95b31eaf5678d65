"""Every family's checkpoint, converted, gives transformers' logits: a prompt, token by token, three sequences at once.

The tolerance is relative to the largest logit. Keys and values in float16 alone move the logits by up to 6e-4
(tests/families/README.md); a mistake in what a family has moves them by 5e-3 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES, Family, relative_error

from hotcold import Engine
from hotcold.solver.convert import convert

TOLERANCE = 1e-3
Prompts = list[tuple[np.ndarray, np.ndarray]]


def one_by_one(engine: Engine, family: Family) -> np.ndarray:
    """The prompt's logits, evaluated by one token each."""
    with closing(engine.new_sequence()) as sequence:
        return np.concatenate([engine.eval(sequence, [id]).copy() for id in family.prompt])


def together(engine: Engine, prompts: Prompts, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(logits, expected) of each step of a batch: `first` tokens of every prompt, then one each until they end."""
    sequences = [engine.new_sequence() for _ in prompts]
    for start, end in [(0, first), *((i, i + 1) for i in range(first, max(len(ids) for ids, _ in prompts)))]:
        going = [i for i, (ids, _) in enumerate(prompts) if start < len(ids)]
        logits = engine.eval_batch([(sequences[i], prompts[i][0][start:end]) for i in going])
        yield logits, np.stack([prompts[i][1][min(end, len(prompts[i][0])) - 1] for i in going])
    for sequence in sequences:
        sequence.close()


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_logits(family: Family, tmp_path: Path) -> None:
    path = convert(family.folder, tmp_path / "model.gguf", "f32").path
    with Engine(path, n_ctx=family.n_ctx, n_threads=2, sparsity="dense") as engine:
        with closing(engine.new_sequence()) as sequence:
            whole = engine.eval(sequence, family.prompt, all_logits=True).copy()
        assert relative_error(whole, family.logits) < TOLERANCE
        assert relative_error(one_by_one(engine, family), family.logits) < TOLERANCE
        # The cache of a context of 16 has room for one sequence only.
        for batch in [family.batch] if family.n_ctx > 16 else [[pair] for pair in family.batch]:
            for first in (1, 5):  # row by row, and three prompts in one tile
                for got, expected in together(engine, batch, first):
                    assert relative_error(got, expected) < TOLERANCE
