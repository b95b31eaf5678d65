"""Synthetic ReLU models: neurons active at the prescribed rates, predictors that know them, valid files."""

from __future__ import annotations

from pathlib import Path

import naive
import numpy as np
import pytest
from gguf import GGUFReader

from hotcold import Engine
from hotcold.formats.errors import ParameterError
from hotcold.solver.synthetic import TYPES, Shape, write_model
from hotcold.solver.synthetic_relu import ReluWeights

SMALL = {"n_embd": 256, "n_ff": 1024, "n_layer": 2, "n_head": 4, "n_head_kv": 2, "n_vocab": 320}
IDS = np.random.default_rng(0).integers(3, 320, 200).tolist()


def make(path: Path, kind: str = "Q8_0", active: float = 0.1, skew: float = 0.8) -> Path:
    shape = Shape(TYPES[kind], **SMALL)
    write_model(path, shape, relu=ReluWeights(shape, active, skew, 128, 0))
    return path


@pytest.mark.parametrize(("kind", "active"), [("Q8_0", 0.1), ("Q4_0", 0.3), ("F16", 0.05)])
def test_neurons_are_active_at_the_rate(tmp_path: Path, kind: str, active: float) -> None:
    path = make(tmp_path / "m.gguf", kind, active)
    counts = np.zeros((2, 1024))
    with Engine(path, n_ctx=256, sparsity="dense", use_section=False) as engine:

        def see(layer: int, x: np.ndarray, f: np.ndarray, gate: np.ndarray, up: np.ndarray) -> None:
            counts[layer] += (gate > 0).sum(axis=0)

        engine.observe(engine.new_sequence(), IDS, see)
    rates = counts / len(IDS)
    np.testing.assert_allclose(rates.mean(axis=1), active, rtol=0.15)
    ordered = -np.sort(-rates, axis=1)
    assert (ordered[:, :102].sum(axis=1) > 0.25 * ordered.sum(axis=1)).all()  # a tenth gives far more than a tenth


def test_predictors_find_the_active_neurons(tmp_path: Path) -> None:
    """And exact mode agrees with an independent forward pass of the file."""
    path = make(tmp_path / "m.gguf", "F32")
    wanted = naive.forward(path, IDS[:20], kv_f16=True)
    for mode, tolerance in (("exact", 5e-4), ("predict", 0.02)):
        with Engine(path, n_ctx=64, sparsity=mode) as engine:
            sequence = engine.new_sequence()
            got = np.concatenate([np.array(engine.eval(sequence, [token])) for token in IDS[:20]])
            density = engine.usage.density
        assert np.sqrt(((got - wanted) ** 2).mean()) / wanted.std() < tolerance
        assert 0.05 < density < 0.2


def test_the_file_is_an_ordinary_one(tmp_path: Path) -> None:
    first, second = (make(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert first.read_bytes() == second.read_bytes()
    reader = GGUFReader(first)
    assert reader.fields["llama.hidden_activation"].contents() == "relu"
    assert not [tensor.name for tensor in reader.tensors if "pred" in tensor.name or "down_t" in tensor.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"active": 0.0}, "active: got 0, wanted a share from 0.001 to 0.9"),
        ({"skew": -1.0}, "skew: got -1, wanted a power from 0 to 4"),
        ({"rank": 100}, "rank: got 100, wanted a multiple of 64 up to twice n_embd = 256"),
        ({"kind": "Q4_K"}, "type of a ReLU model: got Q4_K"),
    ],
)
def test_what_cannot_be(change: dict[str, float | str], message: str) -> None:
    settings = {"kind": "Q8_0", "active": 0.1, "skew": 0.8, "rank": 128, **change}
    with pytest.raises(ParameterError, match=message):
        shape = Shape(TYPES[str(settings["kind"])], **SMALL)
        ReluWeights(shape, float(settings["active"]), float(settings["skew"]), int(settings["rank"]), 0)
