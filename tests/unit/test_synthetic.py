"""Synthetic models: valid files, sane weights, nothing left behind on failure."""

from __future__ import annotations

from pathlib import Path

import naive
import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import ParameterError, StorageError
from hotcold.formats.gguf import GGUFFile
from hotcold.solver.synthetic import TYPES, Shape, tensors, vocabulary, write_model
from hotcold.tools.synthetic import synthesize

SMALL = {"n_embd": 256, "n_ff": 512, "n_layer": 2, "n_head": 4, "n_head_kv": 2, "n_vocab": 320}


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_a_valid_model(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, Shape(TYPES[name], **SMALL))
    with GGUFFile(path) as file:
        assert file.get("general.name").startswith("synthetic")
        assert file.tensors["output.weight"].type == TYPES[name]
        assert file.tensors["output_norm.weight"].type == TYPES["F32"]
    for tensor in GGUFReader(path).tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(weights).all()
        if "norm" not in tensor.name:
            scaled = weights * weights.shape[1] ** 0.5
            assert 0.9 < scaled.std() < 1.1
            assert abs(scaled.mean()) < 0.05
    logits = naive.forward(path, [1, 270, 300, 5])
    assert logits.shape == (4, 320)
    assert 0.5 < logits.std() < 2


def test_experts(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, Shape(TYPES["Q8_0"], **SMALL, n_expert=4, n_expert_used=2))
    with GGUFFile(path) as file:
        config = ModelConfig.from_gguf(file)
        assert (config.n_expert, config.n_expert_used, config.expert_neurons) == (4, 2, SMALL["n_ff"])
        assert file.tensors["blk.0.ffn_gate_inp.weight"].type == TYPES["F32"]
        assert file.tensors["blk.0.ffn_down_exps.weight"].shape == (SMALL["n_ff"], SMALL["n_embd"], 4)
    assert 0.5 < naive.forward(path, [1, 270, 300, 5]).std() < 2
    with pytest.raises(ParameterError, match="experts used: got 5, wanted 1 to 4, the experts"):
        Shape(TYPES["Q8_0"], **SMALL, n_expert=4, n_expert_used=5)
    with pytest.raises(ParameterError, match="experts used: got 0"):
        Shape(TYPES["Q8_0"], **SMALL, n_expert=4)


def test_same_arguments_same_bytes_and_progress(tmp_path: Path) -> None:
    shape = Shape(TYPES["Q4_0"], **SMALL)
    seen: list[tuple[int, int | None]] = []
    write_model(tmp_path / "a.gguf", shape, progress=lambda what, done, total: seen.append((done, total)))
    write_model(tmp_path / "b.gguf", shape)
    write_model(tmp_path / "c.gguf", shape, seed=1)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert (tmp_path / "a.gguf").read_bytes() != (tmp_path / "c.gguf").read_bytes()
    assert len(seen) == len(list(tensors(shape)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_vocabulary_is_distinct() -> None:
    pieces, scores, kinds = vocabulary(32000)
    assert len(pieces) == len(set(pieces)) == len(scores) == len(kinds) == 32000


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n_embd": 100}, "n_embd"),
        ({"n_ff": 33}, "n_ff"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_head_kv": 3}, "n_head"),
        ({"n_head": 3}, "n_embd"),
        ({"n_vocab": 100}, "n_vocab"),
        ({"type": "Q9_9"}, "Q9_9"),
    ],
    ids=str,
)
def test_impossible_sizes(tmp_path: Path, change: dict[str, int], word: str) -> None:
    with pytest.raises(ParameterError, match=word):
        synthesize(tmp_path / "x.gguf", **{**SMALL, **change})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_no_place_to_write(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="missing"):
        write_model(tmp_path / "missing" / "x.gguf", Shape(TYPES["F32"], **SMALL))


def test_interruption_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"precious")

    def interrupt(what: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_model(path, Shape(TYPES["F32"], **SMALL), progress=interrupt)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]
    assert path.read_bytes() == b"precious"
