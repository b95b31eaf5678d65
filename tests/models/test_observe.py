"""Engine.observe: what it shows of each layer's FFN, against the NumPy forward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import naive
import numpy as np
import pytest

from hotcold import Engine

IDS = list(range(7, 107))


class Recorder(naive.Model):
    """Keeps the normed input of every FFN."""

    def _ffn(self, layer: int, x: np.ndarray) -> np.ndarray:
        self.__dict__.setdefault("inputs", []).append(x)
        return super()._ffn(layer, x)


@pytest.mark.parametrize("n_tok", [1, 3, 100])
def test_it_shows_residual_gate_and_up(tiny_model: Callable[..., Path], n_tok: int) -> None:
    path = tiny_model()
    oracle = Recorder(**vars(naive.load(path, kv_f16=True)))
    oracle.forward(IDS[:n_tok])
    seen: list[int] = []

    def see(layer: int, x: np.ndarray, normed: np.ndarray, gate: np.ndarray, up: np.ndarray) -> None:
        seen.append(layer)
        f = oracle.__dict__["inputs"][layer]
        got = naive.rmsnorm(x.astype(np.float64), oracle.tensors[f"blk.{layer}.ffn_norm.weight"], oracle.eps)
        np.testing.assert_allclose(got, f, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(normed, f, rtol=1e-3, atol=1e-3)
        for name, value in (("gate", gate), ("up", up)):
            np.testing.assert_allclose(value, f @ oracle.tensors[f"blk.{layer}.ffn_{name}.weight"].T, atol=3e-3)

    with Engine(path, n_ctx=128, n_threads=2) as engine:
        engine.observe(engine.new_sequence(), IDS[:n_tok], see)
    assert seen == [0, 1]


def test_it_changes_nothing(tiny_model: Callable[..., Path]) -> None:
    with Engine(tiny_model(), n_ctx=512, n_threads=2) as engine:
        plain, watched = engine.new_sequence(), engine.new_sequence()
        engine.eval(plain, IDS)
        wanted = np.array(engine.eval(plain, [9]))
        engine.observe(watched, IDS, lambda *_: None)
        np.testing.assert_array_equal(engine.eval(watched, [9]), wanted)


def test_an_error_in_the_observer_leaves_the_engine_sound(tiny_model: Callable[..., Path]) -> None:
    with Engine(tiny_model(), n_ctx=512, n_threads=2) as engine:
        sequence = engine.new_sequence()
        wanted = np.array(engine.eval(sequence, IDS))

        def fail(layer: int, *_: np.ndarray) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.observe(engine.new_sequence(), IDS, fail)
        np.testing.assert_array_equal(engine.eval(engine.new_sequence(), IDS), wanted)
