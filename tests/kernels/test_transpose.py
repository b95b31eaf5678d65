"""ffn_down by neurons, made at load: floats bit for bit, quantised types to half a step of Q8_0.

A block's step is its largest |weight| / 127. It is stored as float16, which is off by 2**-11 of it (or 2**-25 where it
is that small), up to 127 times in a weight.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kernel_harness import FLOATS, LEVELS, PLAIN, QUANTS, Array, dequantize, weights, with_quants
from tiny import make_tiny_model

from hotcold.formats.errors import UnsupportedError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.types import GGMLType
from hotcold.runtime.down_t import add_down_t
from hotcold.runtime.tensors import Tensors

NAME = "blk.{}.ffn_down"


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction-set level, which kernels loaded in the test are of."""
    monkeypatch.setenv("HOTCOLD_ISA", request.param)
    return str(request.param)


def transposed(kinds: list[str], layers: list[Array], k: int, n_threads: int = 1) -> list[tuple[str, Array]]:
    """The type and raw rows of each layer's transpose; layers: raw rows of k weights."""
    tensors = Tensors()
    for layer, (kind, raw) in enumerate(zip(kinds, layers, strict=True)):
        tensors.add(f"{NAME.format(layer)}.weight", (k, len(raw)), GGMLType[kind], raw.reshape(-1))
    add_down_t(tensors, range(len(layers)), n_threads)
    found = []
    for layer, raw in enumerate(layers):
        name = f"{NAME.format(layer)}_t.weight"
        info = tensors.info(name)
        assert info.shape == (len(raw), k) and info.nbytes == tensors.data(name).nbytes == k * info.row_size
        found.append((info.type.name, tensors.data(name).reshape(k, -1)))
    return found


def assert_near(raw: Array, kind: str, got: Array) -> None:
    """got: rows of Q8_0."""
    wanted = dequantize(kind, raw).T
    step = np.abs(wanted).reshape(len(wanted), -1, 32).max(axis=2) / 127
    scale = np.ascontiguousarray(got.reshape(*step.shape, 34)[:, :, :2]).view(np.float16)[:, :, 0]
    rounding = np.maximum(step * 2.0**-11, 2.0**-25) * 1.001
    assert (np.abs(scale - step) <= rounding).all()
    bound = np.repeat(0.5001 * step + 127 * rounding, 32, axis=1)
    assert (np.abs(dequantize("Q8_0", got) - wanted) <= bound).all()


@pytest.mark.parametrize("kind", QUANTS)
def test_quantised(level: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    for n in (32, 96):
        for k in (32, 96, 160) if kind in PLAIN else (256, 768):
            raw = weights(kind, n, k, rng)
            ((made, alone),) = transposed([kind], [raw], k)
            assert made == "Q8_0"
            assert_near(raw, kind, alone)
            for n_threads in (2, 5):
                np.testing.assert_array_equal(transposed([kind], [raw], k, n_threads)[0][1], alone)


@pytest.mark.parametrize("kind", QUANTS)
def test_extreme_quants(level: str, kind: str) -> None:
    rng = np.random.default_rng(2)
    k = 96 if kind in PLAIN else 256
    raw = weights(kind, 64, k, rng)
    for byte in (0x00, 0xFF, 0x80, 0x7F):
        extreme = with_quants(kind, raw, byte)
        assert_near(extreme, kind, transposed([kind], [extreme], k)[0][1])


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_are_moved_alone(kind: str) -> None:
    """NaNs and all."""
    bits = np.uint32 if kind == "F32" else np.uint16
    for n, k in ((1, 1), (5, 7), (33, 100)):
        raw = np.random.default_rng(n).integers(0, 256, (n, k * np.dtype(bits).itemsize), np.uint8)
        ((made, got),) = transposed([kind], [raw], k)
        assert made == kind
        np.testing.assert_array_equal(got.view(bits), raw.view(bits).T)


def test_blocks_of_nothing_and_of_little(level: str) -> None:
    """All zero, and weights whose step is below float16's normal range, or below all that it can say."""
    rng = np.random.default_rng(3)
    blocks = weights("Q8_0", 96, 96, rng).reshape(96, 3, 34)
    for rows, scale in ((slice(0, 32), 0), (slice(32, 64), 1), (slice(64, 96), 0x0123)):
        blocks[rows, :, :2] = np.array([scale], np.uint16).view(np.uint8)
    raw = blocks.reshape(96, -1)
    ((_, got),) = transposed(["Q8_0"], [raw], 96)
    assert_near(raw, "Q8_0", got)
    assert not got.reshape(96, 3, 34)[:, 0].any()


def test_layers_of_several_types(level: str) -> None:
    """As in files where a few layers' ffn_down is in more bits."""
    rng = np.random.default_rng(4)
    kinds = ["Q4_0", "F16", "Q6_K", "Q4_0"]
    layers = [weights(kind, 64, 256, rng) for kind in kinds]
    found = transposed(kinds, layers, 256, 2)
    assert [kind for kind, _ in found] == ["Q8_0", "F16", "Q8_0", "Q8_0"]
    for i in (0, 2, 3):
        assert_near(layers[i], kinds[i], found[i][1])
    np.testing.assert_array_equal(found[1][1].view(np.uint16), layers[1].view(np.uint16).T)


@pytest.mark.parametrize(("kind", "n"), [("Q4_0", 64), ("Q6_K", 32), ("F16", 5)])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_each_expert_as_if_alone(kind: str, n: int, n_threads: int) -> None:
    n_expert, k = 5, 256
    raw = weights(kind, n_expert * n, k, np.random.default_rng(5))
    alone = [got for _, got in transposed([kind] * n_expert, list(raw.reshape(n_expert, n, -1)), k)]
    tensors = Tensors()
    tensors.add("blk.0.ffn_down_exps.weight", (k, n, n_expert), GGMLType[kind], raw.reshape(-1))
    add_down_t(tensors, [0], n_threads)
    name = "blk.0.ffn_down_exps_t.weight"
    info = tensors.info(name)
    assert info.shape == (n, k, n_expert) and info.type.name == ("F16" if kind == "F16" else "Q8_0")
    assert info.nbytes == tensors.data(name).nbytes
    np.testing.assert_array_equal(tensors.data(name).reshape(n_expert * k, -1), np.concatenate(alone))


def test_outputs_that_are_no_whole_blocks(tmp_path: Path) -> None:
    """Q8_0 cannot hold them; float16 can."""
    down = {f"{NAME.format(layer)}.weight": "Q4_0" for layer in range(2)}
    with GGUFFile(make_tiny_model(tmp_path / "m.gguf", n_embd=40, types=down)) as file:
        tensors = Tensors(file)
        add_down_t(tensors, range(2), 1)
        for layer in range(2):
            name = f"{NAME.format(layer)}_t.weight"
            assert (tensors.info(name).type, tensors.info(name).shape) == (GGMLType.F16, (40, 96))
            wanted = dequantize("Q4_0", tensors.data(f"{NAME.format(layer)}.weight").reshape(40, -1))
            np.testing.assert_array_equal(tensors.data(name).view(np.float16).reshape(96, 40), wanted.T.astype("f2"))


def test_a_type_without_kernels_is_named(tmp_path: Path) -> None:
    with GGUFFile(make_tiny_model(tmp_path / "m.gguf")) as file:
        tensors = Tensors(file)
        tensors.add("blk.0.ffn_down.weight", (96, 64), GGMLType.IQ4_NL, np.zeros(64 * 54, np.uint8))
        with pytest.raises(UnsupportedError, match="tensor blk.0.ffn_down.weight has type IQ4_NL, which hotcold does"):
            add_down_t(tensors, [0], 1)
