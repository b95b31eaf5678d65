"""The memory of a GPU's part of a graph: values between kernels, the KV cache, and what a step tells the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...formats.config import ModelConfig
from ..cpu.layout import KV_BLOCK
from ..graph import Graph, memory_of
from ..vram import MAX_SEQUENCES, STEP_FIELDS
from .device import Device


class Buffers:
    """Device arrays by name, made when first asked for. sizes: the most "tokens" and "outputs" of one step."""

    def __init__(
        self, device: Device, graph: Graph, config: ModelConfig, n_blocks: int, n_ctx: int, sizes: dict[str, int]
    ) -> None:
        self.device, self.config, self.sizes, self.n_blocks = device, config, sizes, n_blocks
        self._values = {value: width for value, width in graph.widths.items() if value.startswith("gpu.")}
        self._flat: dict[str, Any] = {}
        self._views: dict[str, Any] = {}
        n = sizes["tokens"]
        self._fields = device.pinned((STEP_FIELDS, n), np.int32)
        self._tables = device.pinned((MAX_SEQUENCES, -(-n_ctx // KV_BLOCK)), np.int32)
        self._on_device = device.allocate((STEP_FIELDS, n), np.int32)
        self.tables = device.allocate(self._tables.shape, np.int32)
        self.positions, self.slots, self.sequences, self.out_rows = (
            self._on_device[i : i + 1].reshape(n) for i in range(STEP_FIELDS)
        )
        self.all_rows = device.upload(np.arange(n, dtype=np.int32))
        self.counts = device.upload(np.zeros(config.n_layer, np.int64))
        self.none = device.upload(np.zeros(1, np.float32))  # where a kernel has no bias, cut or scores
        self.no_scores = device.upload(np.zeros((1, 1), np.float32))

    def rows(self, value: str) -> int:
        """The most rows of a value."""
        return self.sizes["outputs" if value in ("gpu.logits", "gpu.y") else "tokens"]

    def value(self, value: str) -> Any:
        """A value, float32 [rows, width]; those that share memory are views of it."""
        if value not in self._views:
            memory, rows = memory_of(value), self.rows(memory_of(value))
            if memory not in self._flat:
                most = max(width for name, width in self._values.items() if memory_of(name) == memory)
                self._flat[memory] = self.device.allocate((rows * most,), np.float32)
            width = self._values[value]
            self._views[value] = self._flat[memory][: rows * width].reshape(rows, width)
        return self._views[value]

    def cache(self) -> tuple[Any, Any]:
        """Keys and values of a layer, flat float16, in KVCache's order."""
        c, n = self.config, self.n_blocks * KV_BLOCK
        keys = self.device.allocate((n * c.n_head_kv * c.head_dim_k,), np.float16)
        return keys, self.device.allocate((n * c.n_head_kv * c.head_dim_v,), np.float16)

    def tell(self, tokens: np.ndarray, n_tok: int, tables: list[np.ndarray], lengths: list[int], stream: Any) -> None:
        """Copy a step's positions, slots and out_rows (rows 1 to 3 of tokens), and block tables, to the device."""
        positions, slots, sequences, out_rows = self._fields
        positions[:n_tok], slots[:n_tok] = tokens[1, :n_tok], tokens[2, :n_tok]
        out_rows[:] = tokens[3]
        sequences[:n_tok] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        for i, table in enumerate(tables):
            self._tables[i] = table
        self._on_device.copy_to_device(self._fields, stream=stream)
        n = len(tables)
        self.tables[:n].copy_to_device(self._tables[:n], stream=stream)
