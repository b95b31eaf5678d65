"""The memory of a tape: values between ops, their packed forms, converted vectors and scratch."""

from __future__ import annotations

import numpy as np

from ...formats.config import ModelConfig
from ...formats.errors import UnsupportedError
from ..graph import Graph, memory_of
from ..memory import aligned
from ..tensors import Tensors
from .layout import (
    BLOCK_BYTES,
    KV_PART,
    KV_SPAN,
    PANEL_TOKENS,
    ROWS_MAX,
    SPLIT_TILES,
    TILE_MIN,
    Choice,
    Item,
    Routing,
    attention_bytes,
    packed_bytes,
    panel_bytes,
    part_bytes,
)

FLOATS = ("F32", "F16", "BF16")
GROUPS = dict.fromkeys(FLOATS, 0) | dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K"), 32)
GROUPS |= dict.fromkeys(("Q2_K", "Q3_K", "Q6_K"), 16)
BLOCKS = {kind: 256 if kind.endswith("_K") else 32 if group else 1 for kind, group in GROUPS.items()}  # weights
MATMULS = ("matmul", "matmul_t", "rows", "experts")  # ops that read packed activations
CHUNK_BYTES = 48 << 10  # of weight rows that a thread takes at a time, at least: a few microseconds' reading
SEGMENT = 512  # activations that a thread takes at a time
PANEL_CACHE = 512 << 10  # bytes of unpacked weights that a thread keeps at hand (half of a common L2 cache)


class Buffers:
    """Buffers by name, made when first asked for.

    kinds: by memory, the types of the weights that it meets; widths: the most that is kept there. sizes: the most
    "tokens" and "outputs" of one step. positions: of pairs, the most that a step has.
    """

    def __init__(
        self, graph: Graph, tensors: Tensors, config: ModelConfig, n_threads: int, sizes: dict[str, int]
    ) -> None:
        self.nodes = [node for node in graph.nodes if node.unit == "cpu"]
        self.tensors, self.config, self.sizes = tensors, config, sizes
        self.arrays: dict[str, np.ndarray] = {}
        self.widths: dict[str, int] = {}
        for value, width in graph.widths.items():
            self.widths[memory_of(value)] = max(width, self.widths.get(memory_of(value), 0))
        n_pairs = sizes["tokens"] * config.n_expert_used
        self.positions = n_pairs + min(n_pairs, config.n_expert) * (PANEL_TOKENS - 1)
        self.by_pair: set[str] = set()  # values with a row for each position
        self.by_blocks: set[str] = set()  # values that bands meet
        self.kinds: dict[str, set[str]] = {}
        self.pair_kinds: dict[str, set[str]] = {}  # of weights that meet pairs
        for node in self.nodes:
            if node.rows == "pairs":
                self.by_pair.update(memory_of(name) for name in node.writes)
            if node.op in MATMULS:
                value, kind = memory_of(node.reads[0]), self.kind(node.weight)
                if node.op == "matmul" and tensors.bands(node.weight) is not None:
                    self.by_blocks.add(value)
                    continue
                self.kinds.setdefault(value, set()).add(kind)
                if node.op == "experts":
                    self.pair_kinds.setdefault(value, set()).add(kind)
        self.scratch_bytes = self._scratch()
        self.arrays["scratch"] = aligned(n_threads * self.scratch_bytes)

    def kind(self, tensor: str) -> str:
        """Type name of a weight, refused if no kernel computes it."""
        name = self.tensors.info(tensor).type.name
        if name not in GROUPS:
            raise UnsupportedError(
                f"{self.tensors.source(tensor)}: tensor {tensor} has type {name}, which hotcold does not compute; "
                f"supported: {', '.join(GROUPS)}"
            )
        return name

    def floats(self, value: str) -> int:
        """Address of a float32 value [tokens, width]."""
        value = memory_of(value)
        if value not in self.arrays:
            n_rows = {"logits": self.sizes["outputs"], "picked": TILE_MIN}.get(value, self.sizes["tokens"])
            n_rows = self.positions if value in self.by_pair else n_rows
            self.arrays[value] = aligned(n_rows * self.widths[value] * 4)
        return self.arrays[value].ctypes.data

    def packed(self, value: str, pairs: bool = False) -> dict[str, int]:
        """Addresses of a packed value's arrays, and which of them its readers need; of pairs, those of experts."""
        value = memory_of(value)
        kinds = self.kinds.get(value, set())
        n_rows = ROWS_MAX * (self.config.n_expert_used if value in self.by_pair else 1)
        by_pair = [kind in FLOATS for kind in self.pair_kinds.get(value, ())]
        kinds = self.pair_kinds[value] if pairs else kinds
        out = {"quantised": int(any(k not in FLOATS for k in kinds)), "floats": int(any(k in FLOATS for k in kinds))}
        for want, quantised in (("quantised", True), ("floats", False)):
            if out[want]:
                tokens = self.positions if (not quantised) in by_pair else self.sizes["tokens"]
                for name, nbytes in packed_bytes(self.widths[value], tokens, quantised, n_rows).items():
                    key = f"{value}.{name}"
                    if key not in self.arrays:
                        self.arrays[key] = aligned(nbytes, zero=True)
                    out[name] = self.arrays[key].ctypes.data
        if value in self.by_blocks and not pairs:
            key = f"{value}.xb"
            if key not in self.arrays:
                self.arrays[key] = aligned(self.sizes["tokens"] * self.widths[value] // 32 * BLOCK_BYTES)
            out["xb"] = self.arrays[key].ctypes.data
        return out

    def claims(self, op: int, n_threads: int) -> int:
        """Address of the words of an op's regions, a cache line each (take_near in tape.py)."""
        key = f"claims.{op}"
        self.arrays[key] = aligned(64 * n_threads, zero=True)
        return int(self.arrays[key].ctypes.data)

    def vector(self, tensor: str) -> int:
        """Address of a float32 vector (norm weights, biases); other float types are converted once."""
        if self.tensors.info(tensor).type.name == "F32":
            return self.tensors.address(tensor)
        key = f"vector.{tensor}"
        if key not in self.arrays:
            self.arrays[key] = np.ascontiguousarray(self.tensors.dequantized(tensor), np.float32)
        return self.arrays[key].ctypes.data

    def choice(self, layer: int) -> int:
        """Address of a layer's Choice record."""
        if "choices" not in self.arrays:
            self.arrays["choices"] = aligned(self.config.n_layer * 8 * len(Choice), zero=True)
        return int(self.arrays["choices"].ctypes.data) + layer * 8 * len(Choice)

    def routing(self, layer: int) -> dict[str, int]:
        """What a layer's router says: its Routing record, and lists that the layers share (route.py)."""
        n_pairs, c = self.sizes["tokens"] * self.config.n_expert_used, self.config
        sizes = {
            "routing": c.n_layer * 8 * len(Routing),
            "heat": c.n_layer * 8 * c.n_expert,
            "items": 8 * len(Item) * c.n_expert,
            "pairs": 4 * self.positions,
            "slots": 4 * n_pairs,
            "weights": 4 * n_pairs,
            "spare": 8 * c.n_expert,
        }
        for name, nbytes in sizes.items():
            if name not in self.arrays:
                self.arrays[name] = aligned(nbytes, zero=True)
        found = {name: int(self.arrays[name].ctypes.data) for name in sizes}
        found["routing"] += layer * 8 * len(Routing)
        found["heat"] += layer * 8 * c.n_expert
        return found

    def list(self) -> int:
        """Address of the list of active neurons, int32; layers share it."""
        if "list" not in self.arrays:
            self.arrays["list"] = aligned(4 * self.config.n_ff)
        return int(self.arrays["list"].ctypes.data)

    def parts(self, n: int) -> int:
        """Address of n sums of the down projection for each of a few tokens."""
        if "parts" not in self.arrays:
            self.arrays["parts"] = aligned(4 * n * (TILE_MIN - 1) * self.config.n_embd)
        return int(self.arrays["parts"].ctypes.data)

    def attention_parts(self, n_blocks: int) -> dict[str, int]:
        """What attention leaves of parts that are computed apart: room for a token in each sequence of a full cache."""
        n_parts = self.config.n_head * (n_blocks // (KV_SPAN * KV_PART) + SPLIT_TILES)
        if "parts.attention" not in self.arrays:
            self.arrays["parts.attention"] = aligned(n_parts * part_bytes(self.config.head_dim_v))
            self.arrays["parts.counts"] = aligned(8 * SPLIT_TILES * self.config.n_head_kv, zero=True)
        parts, counts = (int(self.arrays[name].ctypes.data) for name in ("parts.attention", "parts.counts"))
        return {"parts": parts, "n_parts": n_parts, "counts": counts}

    def zeros(self, n: int) -> int:
        """Address of n float32 zeros."""
        if "zeros" not in self.arrays:
            self.arrays["zeros"] = aligned(4 * n, zero=True)
        return self.arrays["zeros"].ctypes.data

    def _scratch(self) -> int:
        """Scratch bytes a thread: the largest of what any op needs."""
        c, need = self.config, max(self.widths.values()) * 4
        for node in self.nodes:
            if node.op in ("matmul", "matmul_t", "experts"):
                info = self.tensors.info(node.weight)
                k, group = info.shape[0], GROUPS[self.kind(node.weight)]
                if node.op == "matmul_t":
                    k, panels = info.n_rows, t_panels(self.kind(node.weight))
                    need = max(need, panels * panel_bytes(k, min(group, 1) * 32) + 32 * 256 * 4)
                need = max(need, PANEL_CACHE, panel_bytes(k, group))
        return -(-(max(need, attention_bytes(c.head_dim_k, c.head_dim_v)) + 4096) // 4096) * 4096

    def scratch(self) -> dict[str, int]:
        """The fields of an op that uses scratch."""
        return {"scratch": self.arrays["scratch"].ctypes.data, "scratch_bytes": self.scratch_bytes}


def t_panels(kind: str) -> int:
    """Panels that matmul_t makes at a time, at most: those of a whole block of columns, by the smallest vectors."""
    return -(-BLOCKS[kind] // 8)
