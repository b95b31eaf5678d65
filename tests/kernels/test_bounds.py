"""Kernels read no byte past a tensor: in a file it may end where the mapping ends.

Weights lie before a page that may not be touched. A kernel that does ends the process, so it runs in a child.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
from kernel_harness import (
    FLOATS,
    LEVELS,
    PLAIN,
    QUANTS,
    TYPES,
    Array,
    Buffer,
    Op,
    choice,
    pack_op,
    packed,
    packed_blocks,
    run,
    weights,
    woven,
)

from hotcold.formats.types import GGMLType
from hotcold.runtime.cpu import isa
from hotcold.runtime.cpu.buffers import t_panels
from hotcold.runtime.cpu.layout import ARRAYS, Bands, Down, Embed, MatMul, Norm, Routing, Rows, Select, Step, Weave
from hotcold.runtime.down_t import add_down_t
from hotcold.runtime.tensors import Tensors

_KEEP: list[mmap.mmap] = []


def before_a_forbidden_page(nbytes: int) -> Array:
    """Bytes that end where reading is forbidden."""
    page = mmap.PAGESIZE
    size = -(-nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    _KEEP.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + size), page, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    return np.frombuffer(memory, np.uint8)[size - nbytes : size]


def touch_listed(level: str, kind: str, k: int) -> None:
    """The kernels of listed rows, the last one among them, and those that read rows as columns."""
    rng = np.random.default_rng(2)
    n, floats = 64, kind in FLOATS
    w = Buffer(weights(kind, n, k, rng), before_a_forbidden_page)
    for count in (1, 4, 7):
        last = np.arange(n - count, n, dtype=np.int32)
        listed = {"list": Buffer(last, before_a_forbidden_page), "choice": choice(count), "ahead": 2}
        listed |= {"w": w, "row_bytes": w.array.shape[1]}
        fields = packed(k, 1, not floats, floats)
        rows = {"out": Buffer.full((1, n)), "k": k, "out_stride": n, "parts": 8, **listed}
        rows |= {name: value for name, value in fields.items() if name in ARRAYS}
        x = Buffer(np.ones((1, k), np.float32))
        run(level, pack_op(x, fields), Op(f"rows:{kind}", Rows, rows), n_tok=1)
        h = Buffer(np.ones((1, count), np.float32), before_a_forbidden_page)
        down = {"out": Buffer.full((2, 1, k)), "h": h, "h_stride": count, "n": k, "parts": 2, **listed}
        run(level, Op(f"down:{kind}", Down, down), n_tok=1)
    fields = packed(n, 9, not floats, floats)
    product = {"w": w, "out": Buffer.full((9, k)), "k": n, "n": k, "row_bytes": w.array.shape[1], "out_stride": k}
    product |= {"bias": 0, "add": 0, "count": Step.n_tok, "panels": t_panels(kind)}
    product |= {name: value for name, value in fields.items() if name in ARRAYS}
    x = Buffer(np.ones((9, n), np.float32))
    run(level, pack_op(x, fields), Op(f"matmul_t:{kind}", MatMul, product), n_tok=9)
    tensors = Tensors()
    tensors.add("blk.0.ffn_down.weight", (k, n), GGMLType[kind], w.array.reshape(-1))
    add_down_t(tensors, [0], 1)


def touch_selections(level: str) -> None:
    for n in (33, 64):
        gates, cut = (Buffer(np.ones(shape, np.float32), before_a_forbidden_page) for shape in ((2, n), n))
        fields = {"src": gates, "cut": cut, "n": n, "choice": choice(), "limit": n, "low": 0.0, "high": 0.0, "top": 1.0}
        fields["list"] = Buffer(np.zeros(n, np.int32), before_a_forbidden_page)
        fields["picked"] = Buffer(np.zeros((2, n), np.float32), before_a_forbidden_page)
        for rule in ("gates", "scores"):
            run(level, Op(f"select:{rule}", Select, fields), n_tok=2)


def touch(level: str) -> None:
    """Run every kernel that reads weights, and what makes and follows lists of them."""
    os.environ["HOTCOLD_ISA"] = level  # of kernels that the engine loads itself
    touch_selections(level)
    rng = np.random.default_rng(1)
    for kind in TYPES:
        k = 33 if kind in FLOATS else 96 if kind in PLAIN else 256
        raw = weights(kind, 5, k, rng)
        w = Buffer(raw, before_a_forbidden_page)
        bias = Buffer(np.zeros(5, np.float32), before_a_forbidden_page)
        shared = {"w": w, "k": k, "row_bytes": raw.shape[1]}
        for n_tok in (1, 9):
            fields = packed(k, n_tok, kind in QUANTS, kind in FLOATS)
            product = {"n": 5, "out": Buffer.full((n_tok, 5)), "out_stride": 5, "bias": bias, "count": Step.n_tok}
            product |= {"add": 0, "chunk": 8, "panels": 1}
            product |= {name: value for name, value in fields.items() if name in ARRAYS}
            x = Buffer(np.ones((n_tok, k), np.float32))
            run(level, pack_op(x, fields), Op(f"matmul:{kind}", MatMul, {**shared, **product}), n_tok=n_tok)
            if kind in QUANTS:
                lanes = isa.LEVELS[level].lanes
                blocks = packed_blocks(k, n_tok)
                own = {"w": Buffer(woven(level, kind, raw), before_a_forbidden_page), "xb": blocks["xb"], "large": 1}
                own |= {"band_bytes": raw.shape[1] * lanes, "chunk": 1, "k": k, "regions": 1}
                own |= {"n": 5, "out": Buffer.full((n_tok, 5)), "out_stride": 5, "bias": bias, "count": Step.n_tok}
                own |= {"add": 0, "claims": Buffer(np.zeros(8, np.int64))}
                run(level, pack_op(x, blocks), Op(f"bands:{kind}", Bands, own), n_tok=n_tok)
                woven_to = Buffer(np.zeros(lanes * raw.shape[1], np.uint8), before_a_forbidden_page)
                run(level, Op(f"weave:{kind}", Weave, {"w": w, "out": woven_to, "k": k, "n": 5}))
            # The same rows as those of the last expert.
            routing = np.zeros(len(Routing), np.int64)
            routing[Routing.experts // 8] = 1
            two = Buffer(np.concatenate([raw, raw]), before_a_forbidden_page)
            lists = {"w": two, "routing": Buffer(routing), "items": Buffer(np.array([1, 0, n_tok])), "pairs": 0}
            run(level, pack_op(x, fields), Op(f"experts:{kind}", MatMul, {**shared, **product, **lists}), n_tok=n_tok)
        own = {"out": Buffer.full((1, k)), "gain": 1.0, "at": Step.ids}
        embed = Op(f"embed:{kind}", Embed, {**shared, **own})
        run(level, embed, n_tok=1, ids=Buffer(np.array([4], np.int32)))
        touch_listed(level, kind, k)
    for k in (33, 96):
        weight = Buffer(np.ones(k, np.float32), before_a_forbidden_page)
        fields = packed(k, 1, False, True)
        fields |= {"src": Buffer(np.ones((1, k), np.float32)), "weight": weight}
        fields |= {"k": k, "group": k, "n_weight": k, "eps": 1e-5, "gain": 1.0, "count": Step.n_tok}
        bias = Buffer(np.ones(k, np.float32), before_a_forbidden_page)
        run(level, Op("norm:rms", Norm, fields), n_tok=1)
        run(level, Op("norm:layer", Norm, fields | {"bias": bias}), n_tok=1)


def in_a_child(what: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run([sys.executable, __file__, what], env=environment, capture_output=True, text=True)


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect through ctypes was tried on Linux")


@LINUX
@pytest.mark.parametrize("level", LEVELS)
def test_weights_are_not_read_past_their_end(level: str) -> None:
    child = in_a_child(level)
    assert child.returncode == 0, f"exit status {child.returncode}: {child.stderr}"
    assert child.stdout == "untouched\n"


@LINUX
def test_the_page_is_forbidden() -> None:
    """The test above would notice: reading one byte further ends a child."""
    child = in_a_child("past the end")
    assert child.returncode < 0 and child.stdout == "read 5\n"


if __name__ == "__main__":
    if sys.argv[1] in LEVELS:
        touch(sys.argv[1])
        print("untouched")
    else:
        at = before_a_forbidden_page(5).ctypes.data
        for size in (5, 6):
            print("read", len(ctypes.string_at(at, size)), flush=True)
