"""The cold neurons of split layers: which rows and entries the CPU is given, and which placements fit a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hotcold.formats.errors import ParameterError
from hotcold.formats.section import Placement
from hotcold.formats.types import GGMLType
from hotcold.runtime.hot_cold import add_cold, check_placement
from hotcold.runtime.tensors import Tensors

N_FF, N_EMBD = 96, 8
HOT = np.sort(np.random.default_rng(0).permutation(N_FF)[:32]).astype(np.int32)
COLD = np.setdiff1d(np.arange(N_FF), HOT)


def config(n_layer: int, n_expert: int = 0) -> Any:
    each = N_FF // n_expert if n_expert else 0
    return SimpleNamespace(n_layer=n_layer, n_ff=N_FF, n_expert=n_expert, expert_neurons=each)


def placement(*hot: np.ndarray) -> Placement:
    parts = tuple(ids.astype(np.int32) for ids in hot)
    return Placement(parts, (False,) * len(hot), False, 64, 1 << 20, 32, "cpu", "ours", "none")


def made(kind: GGMLType, **values: np.ndarray) -> Tensors:
    """Tensors of layer 1, `NAME_weight` and `NAME_bias` for `NAME.weight` and `NAME.bias`."""
    tensors = Tensors()
    for key, array in values.items():
        name, _, what = key.rpartition("_")
        shape = array.shape[::-1]
        own = GGMLType.F32 if what == "bias" else kind
        tensors.add(f"blk.1.{name}.{what}", shape, own, np.ascontiguousarray(array).view(np.uint8).reshape(-1))
    return tensors


def test_rows_and_biases_of_an_ffn_without_a_gate() -> None:
    """Of the split layer only; biases as float32, as the CPU reads them."""
    rng = np.random.default_rng(1)
    up, down = (rng.standard_normal((N_FF, N_EMBD)).astype(np.float16) for _ in range(2))
    bias = rng.standard_normal(N_FF).astype(np.float32)
    given = {"ffn_up_weight": up, "ffn_up_bias": bias, "ffn_down_t_weight": down, "ffn_down_bias": bias[:N_EMBD]}
    tensors = made(GGMLType.F16, **given)
    everything = np.arange(N_FF, dtype=np.int32)
    copied = add_cold(tensors, config(3), (everything[:0], HOT, everything))
    for name, values in (("ffn_up", up), ("ffn_down_t", down)):
        info = tensors.info(f"blk.1.{name}.weight@cold")
        assert (info.shape, info.type) == ((N_EMBD, len(COLD)), GGMLType.F16)
        got = tensors.data(f"blk.1.{name}.weight@cold").view(np.float16).reshape(-1, N_EMBD)
        np.testing.assert_array_equal(got, values[COLD])
    np.testing.assert_array_equal(tensors.dequantized("blk.1.ffn_up.bias@cold"), bias[COLD])
    assert tensors.info("blk.1.ffn_up.bias@cold").type == GGMLType.F32
    assert "blk.1.ffn_down.bias@cold" not in tensors and "blk.0.ffn_up.weight@cold" not in tensors
    assert copied == len(COLD) * (2 * 2 * N_EMBD + 4)


def test_experts_are_marked_and_not_copied() -> None:
    tensors = Tensors()
    hot = np.concatenate([np.arange(12, 24), np.arange(48, 72)]).astype(np.int32)
    assert add_cold(tensors, config(2, 8), (np.arange(N_FF, dtype=np.int32), hot)) == 0
    np.testing.assert_array_equal(tensors.data("blk.1.experts@cold"), [1, 0, 1, 1, 0, 0, 1, 1])
    assert tensors.data("blk.1.experts@cold").dtype == np.uint8 and "blk.0.experts@cold" not in tensors


def test_what_fits_a_mixture_of_experts() -> None:
    whole = np.arange(N_FF)
    check_placement(placement(whole, whole[:0], whole[12:36]), config(3, 8))
    with pytest.raises(ParameterError, match="layer 1: got 11 hot neurons of expert 3, wanted none or all 12"):
        check_placement(placement(whole, whole[24:47]), config(2, 8))
    with pytest.raises(ParameterError, match="layer 0: got ids from 12 to 96, wanted 0 to 95, ascending"):
        check_placement(placement(np.arange(12, 97), whole), config(2, 8))


def test_what_fits_a_layer_of_neurons() -> None:
    check_placement(placement(HOT, COLD), config(2))
    with pytest.raises(ParameterError, match="layer 1: got 31 hot neurons, wanted a multiple of 32"):
        check_placement(placement(HOT, HOT[1:]), config(2))
    with pytest.raises(ParameterError, match="got 1 layers, wanted 2"):
        check_placement(placement(HOT), config(2))
