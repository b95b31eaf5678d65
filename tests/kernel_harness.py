"""Running single kernels from NumPy arrays: argument records, a short tape, threads, and guards around every array."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import naive
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from hotcold.runtime.cpu import isa, jit
from hotcold.runtime.cpu.layout import BLOCK_BYTES, PANEL_TOKENS, TILE_MIN, Choice, Pack, Row, Step, Weave, packed_bytes
from hotcold.runtime.cpu.threads import ThreadPool
from hotcold.runtime.memory import aligned

Array = np.ndarray
LEVELS = isa.available()
TYPES = [kind.name for kind in naive.COMPUTED_TYPES]
QUANTS = [kind.name for kind in naive.QUANT_TYPES]
PLAIN = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]  # blocks of 32
FLOATS = [kind.name for kind in naive.FLOAT_TYPES]
KV_PAIRS = [
    *(("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0")),
    *(("q8_0", "q4_0"), ("q4_0", "f16"), ("f16", "q8_0")),
]
KERNELS = [
    *("walk", "norm:rms", "norm:layer", "pack", "rope:norm", "rope:neox"),
    *(f"attention:{keys}-{values}" for keys, values in KV_PAIRS),
    *("select:gates", "select:scores", "add_parts", "read", "peak"),
    *("route", "combine"),
    *(f"{family}:{name}" for family in ("activate", "rows:F32") for name in naive.ACTIVATIONS),
    *(f"{family}:{kind}" for family in ("matmul", "embed", "rows", "down", "matmul_t", "experts") for kind in TYPES),
    *(f"{family}:{kind}" for family in ("weave", "bands") for kind in QUANTS),
]
_GUARD = 256  # bytes on each side of a buffer
_SLOTS = 32  # int64 slots of an argument record, as the engine has them
SCRATCH = 1 << 20  # bytes a thread: far more than the sizes here need

# Where a block's scales and minima are; the rest of its bytes are quants.
_SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), [(0, 2)]),
    **dict.fromkeys(("Q4_1", "Q5_1"), [(0, 4)]),
    **dict.fromkeys(("Q4_K", "Q5_K"), [(0, 16)]),
    "Q2_K": [(0, 16), (80, 84)],
    "Q3_K": [(96, 110)],
    "Q6_K": [(192, 210)],
}


@lru_cache
def _family(level: str, family: str) -> dict[str, int]:
    """Addresses of a family's kernels at a level; those that the cache lacks are compiled side by side."""
    return jit.load([name for name in KERNELS if name.partition(":")[0] == family], level)


def kernel(level: str, name: str) -> int:
    """Address of a kernel."""
    return _family(level, name.partition(":")[0])[name]


class Buffer:
    """An array between two guard zones, which hold NaNs for whoever reads them and must not be written.

    memory: another allocator of bytes, for instance one that puts a forbidden page behind them.
    """

    def __init__(self, data: Any, memory: Callable[[int], Array] | None = None) -> None:
        data = np.asarray(data)
        guard = 0 if memory else _GUARD
        self._raw = (memory or aligned)(data.nbytes + 2 * guard)
        self._raw[:] = 0xFF
        self._zones = self._raw[:guard], self._raw[guard + data.nbytes :]
        self.array: Array = self._raw[guard : guard + data.nbytes].view(data.dtype).reshape(data.shape)
        self.array[:] = data

    @classmethod
    def full(cls, shape: int | tuple[int, ...], dtype: Any = np.float32, value: Any = np.nan) -> Buffer:
        return cls(np.full(shape, value, dtype))

    def check(self) -> None:
        for zone in self._zones:
            assert (zone == 0xFF).all(), "a kernel wrote outside its array"


class Op(NamedTuple):
    """One row of a tape; the fields are numbers or buffers. Skipped unless the integer at `when` is `want`."""

    kernel: str
    layout: Any
    fields: dict[str, Any]
    when: Buffer | int = 0
    want: int = 0
    barrier: bool = True


def _slot(value: Any) -> int:
    if isinstance(value, Buffer):
        return int(value.array.ctypes.data)
    if isinstance(value, float):
        return int(struct.unpack("q", struct.pack("d", value))[0])
    return int(value)


class Tape:
    """Ops, and the threads that walk them; use with `with`. The last op must have a barrier."""

    def __init__(self, level: str, ops: list[Op], n_threads: int = 1) -> None:
        self._scratch = aligned(n_threads * SCRATCH)
        self._scratch[:] = 0xFF
        self._records = aligned(len(ops) * _SLOTS * 8, zero=True).view(np.int64).reshape(-1, _SLOTS)
        self._done = aligned(len(ops) * 64, zero=True)
        self._rows = np.zeros((len(ops), len(Row)), np.int64)
        self._ops = ops
        segment = 0
        for i, (name, layout, fields, when, want, barrier) in enumerate(ops):
            fields = {"done": self._done.ctypes.data + 64 * segment, **fields}
            if hasattr(layout, "scratch"):
                fields = {"scratch": self._scratch.ctypes.data, "scratch_bytes": SCRATCH, **fields}
            for field, value in fields.items():
                self._records[i, getattr(layout, field) // 8] = _slot(value)
            self._rows[i] = kernel(level, name), self._records[i].ctypes.data, barrier, _slot(when), want, 0
            segment += barrier
        self._pool = ThreadPool(kernel(level, "walk"), n_threads)

    def walk(self, **step: Any) -> None:
        """One step with the given fields of its record."""
        record = np.zeros(len(Step), np.int64)
        record[Step.tile_min // 8] = TILE_MIN
        for name, value in step.items():
            record[getattr(Step, name) // 8] = _slot(value)
        self._pool.run(self._rows.ctypes.data, len(self._rows), record.ctypes.data)
        for value in (*step.values(), *(value for op in self._ops for value in op.fields.values())):
            if isinstance(value, Buffer):
                value.check()

    @property
    def ticks(self) -> Array:
        """Clock ticks of each op so far, int64."""
        return np.array(self._rows[:, Row.ticks // 8])

    def __enter__(self) -> Tape:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.close()


def run(level: str, *ops: Op, n_threads: int = 1, **step: Any) -> None:
    """Walk ops once, as a tape of their own."""
    with Tape(level, list(ops), n_threads) as tape:
        tape.walk(**step)


# --- lists of neurons ----------------------------------------------------------------------------------------------


def choice(count: int = 0, sparse: int = 1) -> Buffer:
    """A layer's Choice record."""
    record = Buffer(np.zeros(len(Choice), np.int64))
    record.array[Choice.count // 8], record.array[Choice.sparse // 8] = count, sparse
    return record


def some(n: int, count: int, rng: np.random.Generator) -> Array:
    """A sorted list of `count` of n neurons, int32."""
    return np.sort(rng.choice(n, count, replace=False)).astype(np.int32)


# --- activations ---------------------------------------------------------------------------------------------------


def packed_blocks(k: int, n_tok: int) -> dict[str, Any]:
    """Fields of an op that packs n_tok tokens of k activations in blocks."""
    return {"xb": Buffer(np.zeros(n_tok * k // 32 * BLOCK_BYTES, np.uint8)), "quantised": 0, "floats": 0}


def woven(level: str, kind: str, raw: Array) -> Array:
    """Raw rows, uint8 (n, bytes of a row), in bands."""
    n, row_bytes = raw.shape
    lanes = isa.LEVELS[level].lanes
    out = Buffer(np.zeros(-(-n // lanes) * lanes * row_bytes, np.uint8))
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    run(level, Op(f"weave:{kind}", Weave, {"w": Buffer(raw), "out": out, "k": row_bytes // size * block, "n": n}))
    return out.array


def packed(k: int, n_tok: int, quantised: bool, floats: bool) -> dict[str, Any]:
    """Fields of an op that packs up to n_tok tokens of k activations; quants and scales begin as zero."""
    fields: dict[str, Any] = {"quantised": int(quantised), "floats": int(floats)}
    for wanted, kind in ((quantised, True), (floats, False)):
        if wanted:
            for name, nbytes in packed_bytes(k, n_tok, kind).items():
                fields[name] = Buffer(np.zeros(nbytes, np.uint8))
    return fields


def pack_op(x: Buffer, fields: dict[str, Any], segment: int = 512) -> Op:
    """The op that packs x float32 (n_tok, k)."""
    k = x.array.shape[1]
    return Op("pack", Pack, {"src": x, "k": k, "stride": k, "count": Step.n_tok, "segment": segment, **fields})


def panel_tokens(level: str) -> int:
    """Tokens of a panel at a level: PANEL_TOKENS at most."""
    return PANEL_TOKENS if isa.LEVELS[level].vector_bytes == 64 else PANEL_TOKENS // 2


def exact_activations(n_tok: int, k: int, rng: np.random.Generator, power: int = -6) -> Array:
    """Random float32 (n_tok, k) that 8-bit blocks hold exactly: integers up to 127, times a power of two."""
    q = rng.integers(-127, 128, (n_tok, k))
    q[:, ::32] = np.where(rng.integers(0, 2, q[:, ::32].shape) == 0, 127, -127)
    return np.ldexp(q.astype(np.float32), power)


# --- weights -------------------------------------------------------------------------------------------------------


def weights(kind: str, n: int, k: int, rng: np.random.Generator) -> Array:
    """Random raw rows, uint8 (n, bytes of a row)."""
    return naive.random_blocks(GGMLQuantizationType[kind], n, k, rng)


def dequantize(kind: str, raw: Array) -> Array:
    """float64 (n, k)."""
    return naive.dequantize(raw, GGMLQuantizationType[kind]).astype(np.float64)


def with_quants(kind: str, raw: Array, byte: int) -> Array:
    """Raw rows with every quant byte replaced; scales and minima stay."""
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    blocks = raw.reshape(-1, size)
    out = np.full_like(blocks, byte)
    for start, end in _SCALES[kind]:
        out[:, start:end] = blocks[:, start:end]
    return out.reshape(raw.shape)


def magnitude(kind: str, raw: Array) -> Array:
    """float64 (n, k): size of the terms that kernels add up for a weight, |scale * unsigned quant| + |minimum|."""
    exact = np.abs(dequantize(kind, raw))
    if kind in FLOATS:
        return exact
    minimum = np.abs(dequantize(kind, with_quants(kind, raw, 0x80 if kind == "Q8_0" else 0)))
    return exact + 2 * minimum


# --- products ------------------------------------------------------------------------------------------------------

TOLERANCE = 2e-6  # of a product, as a share of the sum of its terms' magnitudes (test_matmul.py says why)


def widths(kind: str) -> tuple[int, ...]:
    """Lengths of rows to test: whole blocks, and for floats odd ones."""
    if kind in FLOATS:
        return 1, 7, 33, 100
    return (32, 96, 224, 288) if kind in PLAIN else (256, 768)


def inputs(kind: str, n_tok: int, k: int, rng: np.random.Generator) -> Array:
    """Activations float32 (n_tok, k) that packing does not round."""
    return rng.standard_normal((n_tok, k), np.float32) if kind in FLOATS else exact_activations(n_tok, k, rng)


def assert_product(kind: str, raw: Array, x: Array, got: Array, plus: Any = 0.0) -> None:
    """got float32 (n_tok, rows) is x times the rows, plus something, but for float32 rounding."""
    wanted = x.astype(np.float64) @ dequantize(kind, raw).T + plus
    terms = np.abs(x.astype(np.float64)) @ magnitude(kind, raw).T + np.abs(plus)
    assert np.isfinite(got).all()
    assert (np.abs(got - wanted) <= TOLERANCE * np.maximum(terms, 1e-30)).all()
