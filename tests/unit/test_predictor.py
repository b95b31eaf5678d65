"""Predictors without PyTorch: cut-offs against an exhaustive search, ranks, quality, the section, recordings."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner
from watched import WatchedEngine

from hotcold.formats.errors import StorageError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import find_section
from hotcold.formats.section_file import update_section
from hotcold.formats.types import GGMLType
from hotcold.solver import predictor, recording, transpose
from hotcold.solver.corpus import Corpus
from hotcold.solver.predictor import PRESENCE, PRICES, Prices, Quality, Trained, Truth, Weights
from hotcold.solver.profile import LayerStats
from hotcold.tools.cli import app

Make = Callable[..., Path]


def made(n_tok: int = 60, n_ff: int = 8, noise: float = 0.5, seed: int = 0) -> tuple[np.ndarray, Truth]:
    """Scores that tell neurons' activity up to noise, and that activity; the last neuron is never active."""
    rng = np.random.default_rng(seed)
    gate = rng.normal(-0.5, 1, (n_tok, n_ff))
    gate[:, -1] = -1
    energy = np.where(gate > 0, gate**2 * rng.lognormal(0, 1, gate.shape), 0) / n_ff
    scores = gate + rng.normal(0, noise, gate.shape)
    return scores.astype(np.float32), Truth(gate > 0, energy.astype(np.float32))


def test_every_price_has_its_best_cuts() -> None:
    scores, truth = made()
    found = predictor.choices(scores, truth)
    assert found.live == truth.active.sum() and found.energy == pytest.approx(truth.energy.sum(), rel=1e-6)
    worth = truth.energy * 8 + truth.active * PRESENCE
    for price, choice in zip(PRICES, found.by_price, strict=True):
        said = scores >= choice.cut
        assert choice.predicted == said.sum() and choice.found == (said & truth.active).sum()
        assert choice.strong == pytest.approx(truth.energy[said].sum(), rel=1e-4, abs=1e-6)
        for j in range(8):  # no other cut-off of this neuron is better
            tried = [worth[scores[:, j] >= cut, j].sum() - price * (scores[:, j] >= cut).sum() for cut in scores[:, j]]
            got = worth[said[:, j], j].sum() - price * said[:, j].sum()
            assert got >= max(0.0, *tried) - 1e-3
        assert price > 1e-3 or not said[:, 7].all()
    assert all(choice.cut[7] == np.inf for choice in found.by_price)  # never active: never predicted
    predicted = [choice.predicted for choice in found.by_price]
    assert predicted == sorted(predicted) and predicted[0] < predicted[-1]


def test_perfect_scores_predict_just_what_is_active() -> None:
    scores, truth = made(noise=0)
    found = predictor.choices(scores, truth)
    number = predictor.settle([found], 0.999, 0.999)
    cut = found.by_price[number].cut
    assert predictor.quality(scores, cut, truth) == Quality(
        1.0, pytest.approx(1.0), 1.0, truth.active.mean(), truth.active.mean()
    )


def test_one_price_settles_all_layers() -> None:
    parts = [made(seed=1), made(seed=2, noise=1.0)]
    parts[1][1].energy[:] *= 0.01  # a layer that hardly matters
    layers = [predictor.choices(*part) for part in parts]
    for recall, energy in ((0.5, 0.5), (0.8, 0.99), (0.3, 0.999), (0.95, 0.5)):
        number = predictor.settle(layers, recall, energy)

        def shares(at: int) -> tuple[float, float]:
            found = sum(layer.by_price[at].found for layer in layers)
            strong = sum(layer.by_price[at].strong for layer in layers)
            return found / sum(layer.live for layer in layers), strong / sum(layer.energy for layer in layers)

        assert shares(number)[0] >= recall and shares(number)[1] >= energy
        assert number == 0 or shares(number - 1)[0] < recall or shares(number - 1)[1] < energy
    number = predictor.settle(layers, 0.3, 0.99)
    first, second = (layer.by_price[number].found / layer.live for layer in layers)
    assert first > second + 0.15
    assert predictor.settle(layers, 2.0, 0.5) == len(PRICES) - 1  # more than there is


def test_quality_by_hand() -> None:
    scores = np.array([[1, 5], [3, 1], [2, 2]], np.float32)
    active = np.array([[True, True], [True, False], [False, True]])
    energy = np.array([[1, 2], [3, 9], [9, 4]], np.float32)
    got = predictor.quality(scores, np.array([2, 2], np.float32), Truth(active, energy))
    assert got == Quality(recall=3 / 4, energy=pytest.approx(9 / 10), precision=3 / 4, predicted=4 / 6, active=4 / 6)
    nothing = predictor.quality(scores, np.full(2, np.inf, np.float32), Truth(active & False, energy))
    assert (nothing.recall, nothing.precision, nothing.predicted) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["relu", "dejavu"])
def test_scores(kind: str) -> None:
    rng = np.random.default_rng(0)
    a, b, x = rng.normal(size=(5, 7)), rng.normal(size=(9, 5)), rng.normal(size=(4, 7))
    middle = np.maximum(x @ a.T, 0) if kind == "relu" else x @ a.T
    np.testing.assert_allclose(Weights(kind, a, b).scores(x), middle @ b.T)


# ranks


def test_the_ladder() -> None:
    assert predictor.ladder(100) == [32, 64, 96] and predictor.ladder(1) == [32]
    ranks = np.array(predictor.ladder(2048))
    assert (ranks % 32 == 0).all() and (np.diff(ranks) <= np.maximum(32, ranks[:-1] // 8)).all() and ranks[-1] > 1800


@pytest.mark.parametrize("best", [32, 96, 160, 512, 900])
@pytest.mark.parametrize("first", [32, 200, 1000])
def test_the_search_finds_the_cheapest(best: int, first: int) -> None:
    tried: list[int] = []

    def cost(rank: int) -> float:
        tried.append(rank)
        return abs(rank - best)

    assert abs(predictor.search_rank(first, 2000, cost) - best) <= 64
    assert len(tried) == len(set(tried)) < 25
    assert predictor.search_rank(first, 100, lambda rank: -rank) == 96  # as far as is allowed
    assert predictor.search_rank(first, 0, lambda rank: -rank) == 32


def test_where_the_search_starts_and_what_a_predictor_costs() -> None:
    def first(density: float, skew: float) -> int:
        return predictor.first_rank(LayerStats(density, skew, 0), 4096)

    assert first(0.1, 0.3) < first(0.4, 0.3) < first(0.4, 0.7) and first(0.0, 0.0) == 32
    assert first(0.4, 0.7) % 32 == 0
    assert Prices(rank=10, neuron=3).of(64, 0.25, 1000) == 640 + 750


# the section


def test_predictors_go_into_the_section(tiny_model: Make, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_model(metadata={"llama.hidden_activation": "relu"}).read_bytes())
    rng, layers, plain = np.random.default_rng(0), [], []
    for rank in (32, 64):
        a, b = rng.normal(size=(rank, 64)).astype(np.float32), rng.normal(size=(96, rank)).astype(np.float32)
        cut = rng.normal(size=96).astype(np.float32)
        cut[:2] = np.inf, -np.inf
        encoded = (transpose.encoded(m, GGMLType.Q8_0) for m in (a, b))
        layers.append(Trained(rank, *encoded, cut, Quality(1, 1, 1, 1, 1)))
        plain.append((a, b, cut))
        assert layers[-1].nbytes == rank * (64 + 96) // 32 * 34 + 96 * 4
    update_section(path, predictor.contents(layers, "dejavu", GGMLType.Q8_0, 64))
    with GGUFFile(path) as file:
        section = find_section(file)
        assert section is not None
        with section:
            found = section.predictors()
            assert found is not None
            assert (found.kind, found.input, found.ranks) == ("dejavu", "ffn_norm", (32, 64))
            for n, (a, b, cut) in enumerate(plain):
                np.testing.assert_array_equal(section.cut(n), cut)
                np.testing.assert_allclose(section.image.dequantized(f"blk.{n}.ffn_pred_a.weight"), a, atol=0.02)
                np.testing.assert_allclose(section.image.dequantized(f"blk.{n}.ffn_pred_b.weight"), b, atol=0.02)


# recordings


def test_a_recording_is_the_normed_input() -> None:
    engine: Any = WatchedEngine(n_embd=64)
    ids = np.arange(150, dtype=np.int32)
    with recording.Recording(engine.config, 150) as recorded:
        told: list[int] = []
        first, rest = Corpus("x", ids, None).split(50)
        recorded.run(engine, first, told.append)
        recorded.run(engine, rest, told.append)
        assert told == [64, 100, 150] and recorded.inputs.dtype == np.float16
        for layer in range(3):
            x, f = (np.array([engine.values(int(i), layer)[part] for i in ids], np.float64) for part in (0, 1))
            np.testing.assert_allclose(recorded.inputs[layer], f, rtol=2e-3, atol=1e-3)
            np.testing.assert_allclose(recorded.sizes[layer], (x**2).sum(axis=1), rtol=1e-5)
    assert recording.nbytes(engine.config, 150) == 3 * 150 * 64 * 2


def test_a_recording_that_does_not_fit_the_disk(tmp_path: Path) -> None:
    config: Any = WatchedEngine().config
    with pytest.raises(StorageError, match="--tokens"):
        recording.Recording(config, 2**50, tmp_path)
    assert list(tmp_path.iterdir()) == []


# the command


def test_pytorch_is_asked_for_in_one_line(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else real(name, *rest))
    result = CliRunner().invoke(app, ["train-predictor", str(tiny_model())])
    assert result.exit_code == 1 and result.stderr.endswith("pip install 'hotcold[train]'\n")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", ["--recall", "--energy"])
def test_shares_that_make_no_sense(tiny_model: Make, option: str) -> None:
    result = CliRunner().invoke(app, ["train-predictor", str(tiny_model()), option, "1.5"])
    assert result.exit_code == 1 and f"{option}: got 1.5, wanted a number between 0 and 1" in result.stderr
