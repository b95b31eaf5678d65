"""Lowering: each GPU node of a graph becomes a launch or two of kernels, with their arguments already in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ...formats.config import ModelConfig
from ...formats.errors import UnsupportedError
from ..down_t import add_down_t
from ..graph import Node
from ..hot_cold import others
from ..sparsity import gate_range
from ..tensors import Tensors
from ..vram import down_floats
from . import down, ffn, jit, matmul, norm
from .attention_launch import Heads, attention_launch, part_floats
from .buffers import Buffers
from .device import Device
from .repack import KINDS, pack

# Enqueues a node's kernels for so many tokens and outputs.
Launch = Callable[[int, int], None]


def _layer(tensor: str) -> int:
    """N of `blk.N.name`."""
    return int(tensor.split(".")[1])


class Lowering:
    """Makes launches.

    rope_tables: for layers without and with a window. hot: by layer, the neurons that `@hot` tensors have (int32,
    sorted). n_ctx: of a sequence. n_threads: of the CPU, for what has to be made.
    """

    def __init__(
        self,
        tensors: Tensors,
        config: ModelConfig,
        device: Device,
        buffers: Buffers,
        rope_tables: tuple[np.ndarray, np.ndarray],
        hot: tuple[np.ndarray, ...],
        n_ctx: int,
        n_threads: int,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.progress, self._compiled = progress, set[str]()
        self.tensors, self.config, self.device, self.buffers = tensors, config, device, buffers
        self.hot, self.n_ctx, self.n_threads, self.stream = hot, n_ctx, n_threads, device.stream
        self._rope_tables, self._tables = rope_tables, dict[int, Any]()
        self._attention_parts: Any = None
        self._down_parts: Any = None
        self._views: dict[tuple[int, tuple[int, ...]], Any] = {}
        self._caches: dict[int, tuple[Any, Any]] = {}
        self._weights: dict[str, tuple[str, tuple[Any, ...], int, int]] = {}
        self._lowerings: dict[str, Callable[[Node], Launch]] = {
            "norm": self._norm,
            "pack": self._pack,
            "matmul": self._matmul,
            "rope": self._rope,
            "attention": self._attention,
            "route": self._route,
            "ffn": self._ffn,
            "down": self._down,
            "merge": self._merge,
        }

    def launch(self, node: Node) -> Launch:
        """What runs a node."""
        return self._lowerings[node.op](node)

    def _compile(self, names: Iterable[str]) -> None:
        """Have kernels ready before the first step: they take seconds, and memory that the budget must hold."""
        for name in names:
            if self.progress and not jit.simulated() and name not in self._compiled:
                self.progress(f"compiling {name} for the GPU")
            self._compiled.add(name)
            jit.load(name)

    def _count(self, node: Node) -> Callable[[int, int], int]:
        return (lambda n_tok, n_out: n_out) if node.rows == "outputs" else (lambda n_tok, n_out: n_tok)

    def _weight(self, name: str) -> tuple[str, tuple[Any, ...], int, int]:
        """A matrix on the device: type, arrays, rows and row length."""
        if name not in self._weights:
            base, _, part = name.partition("@")
            made = base not in self.tensors
            if made:  # only for as long as it takes: those of all layers may be more than there is memory
                add_down_t(self.tensors, [_layer(base)], self.n_threads, self.progress)
            info = self.tensors.info(base)
            kind, k = info.type.name, info.shape[0]
            if kind not in KINDS:
                raise UnsupportedError(
                    f"{self.tensors.source(base)}: tensor {base} has type {kind}, which hotcold does not compute on a "
                    f"GPU; supported: {', '.join(KINDS)}"
                )
            data = self.tensors.data(base).reshape(info.n_rows, -1)
            data = data[self._ids(base, part)] if part else data
            put = self._map if part == "cold" else self.device.upload
            self._weights[name] = kind, tuple(map(put, pack(kind, data, k))), len(data), k
            if made:
                self.tensors.drop(base)
        return self._weights[name]

    def _ids(self, tensor: str, part: str) -> np.ndarray:
        """The hot or cold neurons of a tensor's layer."""
        hot = self.hot[_layer(tensor)]
        return hot if part == "hot" else others(hot, self.config.n_ff)

    def _map(self, array: np.ndarray) -> Any:
        """An array that stays in the host's memory, where kernels read it."""
        mapped = self.device.mapped(array.shape, array.dtype)
        self.device.host_view(mapped)[:] = array
        return mapped

    def _vector(self, name: str) -> Any:
        """A float32 vector on the device."""
        base, _, part = name.partition("@")
        values = np.ascontiguousarray(self.tensors.dequantized(base), np.float32).reshape(-1)
        return self.device.upload(values[self._ids(base, part)] if part else values)

    def _bias(self, name: str) -> Any:
        """A bias, or an array that takes its place where there is none."""
        return self._vector(name) if name else self.buffers.none

    def _norm(self, node: Node) -> Launch:
        name = f"norm:{node.function}"
        self._compile([name])
        kernel, stream, count = jit.load(name), self.stream, self._count(node)
        rows = self.buffers.out_rows if node.rows == "outputs" else self.buffers.all_rows
        x, out = self.buffers.value(node.reads[0]), self.buffers.value(node.writes[0])
        weight, bias = self._vector(node.weight), self._bias(node.bias)
        k = int(x.shape[1])
        group = node.group or k
        mode = (norm.ADD if node.adds else 0) | (norm.BIAS if node.bias else 0)
        numbers = np.float32(node.eps), np.float32(node.gain), group, mode

        def run(n_tok: int, n_out: int) -> None:
            if n := count(n_tok, n_out):
                kernel((n, k // group), stream, x, rows, weight, bias, out, *numbers)

        return run

    def _pack(self, node: Node) -> Launch:
        """A copy: the residual may change before all that read it as it was have done so."""
        self._compile(["pack"])
        kernel, stream = jit.load("pack"), self.stream
        x, out = self.buffers.value(node.reads[0]), self.buffers.value(node.writes[0])

        def run(n_tok: int, n_out: int) -> None:
            kernel(n_tok, stream, x, out)

        return run

    def _matmul(self, node: Node) -> Launch:
        kind, arrays, n, k = self._weight(node.weight)
        x, out = self.buffers.value(node.reads[0]), self.buffers.value(node.writes[0])
        bias = self._bias(node.bias)
        mode = matmul.ADD if node.adds else matmul.RELU if node.function == "relu" else matmul.SET
        mode |= matmul.BIAS if node.bias else 0
        stream, count = self.stream, self._count(node)
        self._compile(matmul.launch(kind, n, m)[0] for m in (1, 2))

        def run(n_tok: int, n_out: int) -> None:
            if m := count(n_tok, n_out):
                name, grid = matmul.launch(kind, n, m)
                jit.load(name)(grid, stream, *arrays, x, out, bias, n, k, m, mode)

        return run

    def _rope(self, node: Node) -> Launch:
        c, b, stream = self.config, self.buffers, self.stream
        table = self._table(node.layer)
        keys, values = self._caches[node.layer] = b.cache()
        q, k, v = (b.value(name) for name in node.reads)
        kernel = jit.load(f"rope:{c.rope_style}")
        sizes = c.n_head, c.n_head_kv, c.head_dim_k, c.head_dim_v, c.rope_dim

        def run(n_tok: int, n_out: int) -> None:
            grid = (n_tok, c.n_head_kv)
            kernel(grid, stream, q, k, v, b.positions, b.slots, table, keys, values, *sizes, n_tok)

        return run

    def _table(self, layer: int) -> Any:
        """The rotations of a layer; where nothing turns, any array."""
        table = self._rope_tables[self.config.windows[layer] > 0]
        if not table.size:
            return self.buffers.no_scores
        if id(table) not in self._tables:
            self._tables[id(table)] = self.device.upload(table)
        return self._tables[id(table)]

    def _attention(self, node: Node) -> Launch:
        c, b, stream = self.config, self.buffers, self.stream
        sizes = c.n_head, c.n_head_kv, c.head_dim_k, c.head_dim_v
        heads = Heads(*sizes, capped=c.attn_softcap > 0)
        processors, n_ctx = self.device.processors, self.n_ctx
        keys, values = self._caches[node.layer]
        q, out = b.value(node.reads[0]), b.value(node.writes[0])
        if self._attention_parts is None:
            n = part_floats(heads, b.sizes["tokens"], n_ctx, processors)
            self._attention_parts = self.device.allocate((n,))
        parts = self._attention_parts
        numbers = (*sizes, np.float32(c.attn_scale), np.float32(c.attn_softcap), c.windows[node.layer])
        self._compile([*(attention_launch(heads, m, n_ctx, processors).name for m in (1, 2)), "attention_merge"])

        def run(n_tok: int, n_out: int) -> None:
            how = attention_launch(heads, n_tok, n_ctx, processors)
            shape = (n_tok, how.splits, c.n_head, c.head_dim_v + 2) if how.splits > 1 else (1, 1, 1, 1)
            share = self._view(parts, shape)
            where = b.tables, b.sequences, b.positions
            jit.load(how.name)(how.grid, stream, q, keys, values, *where, out, share, *numbers, n_tok)
            if how.splits > 1:
                jit.load("attention_merge")(how.merge_grid, stream, share, out, n_tok)

        return run

    def _route(self, node: Node) -> Launch:
        c, stream = self.config, self.stream
        logits, shares = self.buffers.value(node.reads[0]), self.buffers.value(node.writes[0])
        base, _, part = node.weight.partition("@")
        neurons = self._ids(base, part) if part else np.arange(c.n_ff)
        experts = self.device.upload((neurons[:: c.expert_neurons] // c.expert_neurons).astype(np.int32))
        normed = int(c.weights_norm)
        self._compile(["route"])
        kernel = jit.load("route")

        def run(n_tok: int, n_out: int) -> None:
            kernel(n_tok, stream, logits, experts, shares, c.n_expert_used, normed)

        return run

    def _ffn(self, node: Node) -> Launch:
        c, b, stream = self.config, self.buffers, self.stream
        kind, gate, n, k = self._weight(node.weight)
        other, up, _, _ = self._weight(node.up) if node.up else ("", (), n, k)
        x, h = b.value(node.reads[0]), b.value(node.writes[0])
        scored = len(node.reads) > 1
        scores = b.value(node.reads[1]) if scored else b.no_scores
        cut = self._vector(node.cut) if node.cut else b.none
        shares = scored and not node.cut
        mode = ffn.SCORES if node.cut else 0
        mode |= (ffn.GATE_BIAS if node.bias else 0) | (ffn.UP_BIAS if node.up_bias else 0)
        counts = b.counts[node.layer : node.layer + 1]
        given = x, scores, cut, self._bias(node.bias), self._bias(node.up_bias), h, counts
        per = c.expert_neurons if c.n_expert else 1
        rule = tuple(map(np.float32, gate_range(node.function, node.threshold)))
        self._compile(ffn.launch(kind, other, node.function, n, m, shares)[0] for m in (1, 2))

        def run(n_tok: int, n_out: int) -> None:
            name, grid = ffn.launch(kind, other, node.function, n, n_tok, shares)
            jit.load(name)(grid, stream, *gate, *up, *given, n, k, n_tok, per, mode, *rule)

        return run

    def _parts(self, n_tok: int) -> Any:
        """Where the hot neurons' sums of n_tok tokens are kept until they are merged, [parts, n_tok, n_embd]."""
        if self._down_parts is None:
            self._down_parts = self.device.allocate((down_floats(self.config, self.buffers.sizes["tokens"]),))
        return self._view(self._down_parts, (down.part_count(n_tok), n_tok, self.config.n_embd))

    def _view(self, flat: Any, shape: tuple[int, ...]) -> Any:
        """The beginning of a flat array in a shape; kept, as every layer of every step asks for it."""
        key = id(flat), shape
        if key not in self._views:
            self._views[key] = flat[: math.prod(shape)].reshape(*shape)
        return self._views[key]

    def _down(self, node: Node) -> Launch:
        kind, arrays, n, k = self._weight(node.weight)
        h, stream = self.buffers.value(node.reads[0]), self.stream
        self._parts(1)  # so that it is counted before the first step
        self._compile([*(down.launch(kind, k, m)[0] for m in (1, 2)), down.merge_launch(k, 1)[0]])

        def run(n_tok: int, n_out: int) -> None:
            name, grid = down.launch(kind, k, n_tok)
            jit.load(name)(grid, stream, *arrays, h, self._parts(n_tok), n, k, n_tok)

        return run

    def _merge(self, node: Node) -> Launch:
        """The parts of a down projection, and what else is read; without that, their sum replaces what there was."""
        first, out = node.reads[0], self.buffers.value(node.writes[0])
        mode = (down.BASE if first != "gpu.parts" else 0) | (down.BIAS if node.bias else 0)
        base = self.buffers.value(first) if mode & down.BASE else out
        bias, stream, k = self._bias(node.bias), self.stream, self.config.n_embd

        def run(n_tok: int, n_out: int) -> None:
            name, grid = down.merge_launch(k, n_tok)
            jit.load(name)(grid, stream, base, self._parts(n_tok), bias, out, n_tok, mode)

        return run
