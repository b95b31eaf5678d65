"""Running the GPU's segments of a graph: kernels, and copies between the two memories, on one stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from ...formats.config import ModelConfig
from ...formats.errors import ParameterError
from ..executor import Batch
from ..graph import Graph, Node
from ..schedule import Segment
from ..tensors import Tensors
from ..vram import MAX_SEQUENCES
from .buffers import Buffers
from .device import Device
from .lower import Launch, Lowering


class GPUExecutor:
    """Loads what a graph's GPU nodes need and launches them by segment (runtime/hybrid.py says how).

    host: the CPU's values by name, float32, flat, which sends and fetches copy. hot: neurons on the GPU, by layer.
    tokens: the step's ids, positions, slots and out_rows, as CPUExecutor has them. trace: time the segments.
    """

    def __init__(
        self,
        segments: list[Segment],
        graph: Graph,
        tensors: Tensors,
        config: ModelConfig,
        device: Device,
        host: dict[str, np.ndarray],
        tokens: np.ndarray,
        rope_tables: tuple[np.ndarray, np.ndarray],
        hot: tuple[np.ndarray, ...],
        n_blocks: int,
        n_ctx: int,
        n_threads: int,
        sizes: dict[str, int],
        trace: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.device, self._segments, self._host, self._tokens = device, segments, host, tokens
        self._trace, self._n_tok, self._n_out = trace, 0, 0
        self._spans: list[tuple[str, Any, Any]] = []
        with device.check("loading the model"):
            self._buffers = Buffers(device, graph, config, n_blocks, n_ctx, sizes)
            lowering = Lowering(tensors, config, device, self._buffers, rope_tables, hot, n_ctx, n_threads, progress)
            self._pinned: dict[str, tuple[np.ndarray, Any]] = {}
            self._launches = {
                segment.index: [self._copy(node) or lowering.launch(node) for node in segment.nodes]
                for segment in segments
                if segment.unit == "gpu"
            }
            device.synchronize()

    @property
    def active(self) -> np.ndarray:
        """Active (token, neuron) pairs of each layer's hot neurons so far."""
        with self.device.check("counting neurons"):
            return np.asarray(self._buffers.counts.copy_to_host())

    def begin(self, batch: Batch, n_tok: int, outputs: np.ndarray) -> None:
        """Copy what the kernels need to know of a step."""
        if len(batch) > MAX_SEQUENCES:
            raise ParameterError(f"batch: got {len(batch)} sequences, wanted at most {MAX_SEQUENCES} on a GPU")
        self._n_tok, self._n_out = n_tok, len(outputs)
        with self.device.check("starting a step"):
            tables, lengths = [sequence.table for sequence, _ in batch], [len(tokens) for _, tokens in batch]
            if self._trace:
                self._spans = []
                self._base = self._event()
            self._buffers.tell(self._tokens, n_tok, tables, lengths, self.device.stream)

    def launch(self, index: int) -> None:
        """Enqueue a segment."""
        segment = self._segments[index]
        with self.device.check(segment.name):
            start = self._event() if self._trace else None
            for run in self._launches[index]:
                run(self._n_tok, self._n_out)
            if self._trace:
                self._spans.append((segment.name, start, self._event()))

    def reached(self, index: int) -> bool:
        """Whether finish would not have to wait."""
        _, event = self._pinned[self._segments[index].nodes[-1].writes[0]]
        with self.device.check("asking for progress"):
            return bool(event.query())

    def finish(self, index: int) -> None:
        """Wait for a fetch and put it where the CPU reads it."""
        node = self._segments[index].nodes[-1]
        pinned, event = self._pinned[node.writes[0]]
        n = self._rows(node) * self._width(node.reads[0])
        with self.device.check(f"fetching {node.writes[0]}"):
            event.synchronize()
        self._host[node.writes[0]][:n] = pinned[:n]

    def spans(self) -> list[tuple[str, float, float]]:
        """Segments of the last step: name, start and end in seconds since begin, by the device's clock."""
        with self.device.check("reading times"):
            self.device.synchronize()
            since = self.device.seconds_between
            return [(name, since(self._base, start), since(self._base, end)) for name, start, end in self._spans]

    def close(self) -> None:
        """Free the device's memory."""
        with suppress(Exception), self.device.current():
            self._launches.clear()
            self._pinned.clear()
            self._spans.clear()
            del self._buffers
        self.device.close()

    def _event(self) -> Any:
        event = self.device.event()
        event.record(self.device.stream)
        return event

    def _rows(self, node: Node) -> int:
        return self._n_out if node.rows == "outputs" else self._n_tok

    def _width(self, value: str) -> int:
        return int(self._buffers.value(value).shape[1])

    def _copy(self, node: Node) -> Launch | None:
        """What runs a send or a fetch, None for other nodes; each goes through pinned memory of its own."""
        if node.op not in ("send", "fetch"):
            return None
        stream = self.device.stream
        here, there = (node.reads[0], node.writes[0]) if node.op == "send" else (node.writes[0], node.reads[0])
        array = self._buffers.value(there)
        width = int(array.shape[1])
        flat = array.reshape(array.shape[0] * width)
        key = there if node.op == "send" else here
        if key not in self._pinned:
            self._pinned[key] = self.device.pinned((flat.shape[0],), np.float32), self.device.event()
        pinned, event = self._pinned[key]
        host = self._host[here]

        def send(n_tok: int, n_out: int) -> None:
            n = self._rows(node) * width
            event.synchronize()  # the copy before this one has left the pinned memory
            pinned[:n] = host[:n]
            flat[:n].copy_to_device(pinned[:n], stream=stream)
            event.record(stream)

        def fetch(n_tok: int, n_out: int) -> None:
            if n := self._rows(node) * width:
                flat[:n].copy_to_host(pinned[:n], stream=stream)
            event.record(stream)

        return send if node.op == "send" else fetch
