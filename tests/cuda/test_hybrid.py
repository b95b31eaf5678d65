"""The hybrid engine on tiny models: whatever is placed where, it computes what the CPU alone computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_simulator  # noqa: F401
import numpy as np
import pytest
import tiny

from hotcold import Engine
from hotcold.formats.section import Placement
from hotcold.runtime.trace import Trace

N_FF = 96
SIZES: dict[str, Any] = {"n_embd": 32, "n_head": 2, "n_head_kv": 1, "n_ff": N_FF}  # the simulator is slow
PLACES = {  # attention by layer, hot neurons by layer, head
    "all on the GPU": ("gg", (96, 96), True),
    "split": ("gg", (32, 64), True),
    "head on the CPU": ("gg", (64, 32), False),
    "attention on the CPU": ("cc", (32, 96), False),
    "one layer each": ("gc", (96, 0), False),
    "mixed": ("cg", (0, 64), True),
}


def placed(where: str, seed: int = 0, budget: int = 1 << 30) -> Placement:
    attention, counts, head = PLACES[where]
    rng = np.random.default_rng(seed)
    hot = tuple(np.sort(rng.permutation(N_FF)[:n]).astype(np.int32) for n in counts)
    on_gpu = tuple(c == "g" for c in attention)
    return Placement(hot, on_gpu, head, 64, budget, 32, "cpu", "ours", "simulator")


def run(path: Path, mode: str, placement: Placement | None, tokens: int = 2, trace: Trace | None = None) -> np.ndarray:
    """Logits of a prompt and of a few greedy tokens after it, float32 [tokens + 1, n_vocab]."""
    with Engine(path, n_ctx=64, n_threads=2, sparsity=mode, placement=placement, trace=trace) as engine:
        sequence = engine.new_sequence()
        rows = [engine.eval(sequence, np.arange(5, 8))[-1].copy()]
        for _ in range(tokens):
            rows.append(engine.eval(sequence, [int(rows[-1].argmax())])[-1].copy())
        return np.array(rows)


def close(got: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    assert (got.argmax(1) == wanted.argmax(1)).all()
    assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("hybrid")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """A SwiGLU model."""
    return tiny.make_tiny_model(folder / "plain.gguf", **SIZES)


@pytest.fixture(scope="module")
def relu(folder: Path) -> Path:
    """A ReLU model."""
    return tiny.make_tiny_model(
        folder / "relu.gguf", metadata={"llama.hidden_activation": "relu"}, seed=3, **SIZES
    )


@pytest.mark.parametrize("where", PLACES)
def test_a_dense_model_is_the_cpus(plain: Path, where: str) -> None:
    close(run(plain, "dense", placed(where)), run(plain, "dense", None), 1e-4)


@pytest.mark.parametrize("where", ["all on the GPU", "split", "mixed"])
def test_an_exact_model_is_the_cpus(relu: Path, where: str) -> None:
    close(run(relu, "exact", placed(where)), run(relu, "exact", None), 1e-4)


def test_a_timeline_shows_both_units(plain: Path, tmp_path: Path) -> None:
    trace = Trace()
    run(plain, "dense", placed("split"), 1, trace)
    assert trace.spans("cpu") and trace.spans("gpu")
    trace.write(tmp_path / "trace.json")
    assert '"CPU"' in (tmp_path / "trace.json").read_text()
