"""Running a graph on the CPU: the step record, the tape and the threads that walk it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np

from ..formats.config import ModelConfig
from .cpu.jit import Progress
from .cpu.layout import TILE_MIN, Step, query_tile
from .cpu.lower import lower
from .cpu.threads import ThreadPool
from .graph import Graph
from .kv_cache import KVCache, Sequence
from .memory import aligned
from .rope_table import rope_tables
from .tensors import Tensors

# Called with a layer's number, the residual that its FFN adds to and what it reads (normed) [n_tok, n_embd], and the
# raw gate and up projections [n_tok, n_ff], all float32 and valid only during the call. Without a gate, that of up is
# in its place and up is 1.
Observer = Callable[[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]
# Sequences, and the tokens (int32) that each shall be given.
Batch = Seq[tuple[Sequence, np.ndarray]]


class CPUExecutor:
    """Lowers a graph once and runs it for any batch of up to max_tokens tokens, max_outputs of them with logits.

    tape: what it walks; steps: how often it has. tokens: the step's ids,
    positions, slots and out_rows, int32 [4, max_tokens].
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Tensors,
        config: ModelConfig,
        cache: KVCache,
        n_ctx: int,
        n_threads: int,
        max_tokens: int,
        max_outputs: int,
        progress: Progress | None = None,
    ) -> None:
        self.ropes = rope_tables(config, n_ctx, tensors)
        sizes = {"tokens": max_tokens, "outputs": max_outputs}
        global_table, local_table = (rope.table.ctypes.data for rope in self.ropes)
        tables = global_table, local_table
        self.tape, walker = lower(graph, tensors, config, cache, tables, n_threads, sizes, progress)
        self._pool = ThreadPool(walker, n_threads)
        # also when this object is dropped or the interpreter ends: no thread may outlive the buffers
        self._end_threads = weakref.finalize(self, self._pool.close)
        self.steps = 0
        self._n_embd, self._n_ff, self._softcap = config.n_embd, config.n_ff, np.float32(config.logit_softcap)
        self._gated = config.gated
        self._query_tile = query_tile(config.n_head // config.n_head_kv)
        self.tokens = np.zeros((4, max_tokens), np.int32)  # ids, positions, slots, out_rows
        self._tiles = np.zeros((max_tokens, 3), np.int32)
        self._tables = np.zeros(max_tokens, np.int64)
        self._step = np.zeros(len(Step), np.int64)
        for name, array in zip(("ids", "positions", "slots", "out_rows"), self.tokens, strict=True):
            self._step[getattr(Step, name) // 8] = array.ctypes.data
        self._step[Step.tiles // 8] = self._tiles.ctypes.data
        self._step[Step.tables // 8] = self._tables.ctypes.data
        if "logits" not in self.tape.buffers:  # they come from the GPU
            self.tape.buffers["logits"] = aligned(max_outputs * config.n_vocab * 4)
        self._logits = self.tape.buffers["logits"].view(np.float32).reshape(-1, config.n_vocab)

    @property
    def gpu_usage(self) -> None:
        """None: there is no GPU at work."""
        return None

    def run(
        self, batch: Batch, outputs: np.ndarray, see: Observer | None = None, tile_min: int = TILE_MIN
    ) -> np.ndarray:
        """One step: append each sequence's tokens (int32) and return the logits of the rows `outputs`.

        Rows number the batch's tokens in order. Returns float32 [len(outputs), n_vocab], a view that the next run
        overwrites. The sequences must have reserved their room. see: called in the midst of each layer
        (Observer). tile_min: fewer tokens or outputs are computed by rows, others by tiles.
        """
        n_tok = self.begin(batch, outputs, tile_min)
        if see is None:
            self.walk(0, len(self.tape.rows))
        else:
            self._walk_by_layer(n_tok, see)
        return self.end(batch, outputs)

    def begin(self, batch: Batch, outputs: np.ndarray, tile_min: int = TILE_MIN) -> int:
        """Tell the kernels of a step; returns its tokens."""
        ids, positions, slots, out_rows = self.tokens
        row = n_tiles = 0
        for index, (sequence, tokens) in enumerate(batch):
            first, n = len(sequence), len(tokens)
            ids[row : row + n] = tokens
            positions[row : row + n] = np.arange(first, first + n)
            slots[row : row + n] = sequence.slots(first, n)
            self._tables[index] = sequence.table.ctypes.data
            for rope in self.ropes:
                rope.upto(first + n)
            for start in range(0, n, self._query_tile):
                self._tiles[n_tiles] = row + start, min(self._query_tile, n - start), index
                n_tiles += 1
            row += n
        out_rows[: len(outputs)] = outputs
        self.steps += 1
        step = self._step
        step[Step.n_tok // 8], step[Step.n_out // 8], step[Step.n_tiles // 8] = row, len(outputs), n_tiles
        step[Step.tile_min // 8] = tile_min
        return row

    def end(self, batch: Batch, outputs: np.ndarray) -> np.ndarray:
        """Note that the step's tokens are in their sequences; its logits."""
        for sequence, tokens in batch:
            sequence.tokens.extend(tokens.tolist())
        logits = self._logits[: len(outputs)]
        if cap := self._softcap:
            np.tanh(np.divide(logits, cap, out=logits), out=logits)
            logits *= cap
        return logits

    def walk(self, first: int, end: int) -> None:
        """Run some rows of the tape; a step walks all of them once, in order."""
        rows = self.tape.rows
        self._pool.run(rows[first:].ctypes.data, end - first, self._step.ctypes.data)

    def _walk_by_layer(self, n_tok: int, see: Observer) -> None:
        """One step that halts before each FFN's activation."""
        normed = "f" if "f" in self.tape.buffers else "x"  # it has no norm of its own
        names = ("x", normed, "gate", "up" if self._gated else "gate")
        values = [self.tape.buffers[name].view(np.float32) for name in names]
        widths = (self._n_embd, self._n_embd, self._n_ff, self._n_ff)
        ends = [*self.tape.activations, len(self.tape.rows)]
        begin, layer = 0, 0
        try:
            for layer, end in enumerate(ends):
                self.walk(begin, end)
                begin = end
                if end < len(self.tape.rows):
                    x, f, gate, up = (
                        v[: n_tok * width].reshape(n_tok, width) for v, width in zip(values, widths, strict=True)
                    )
                    see(layer, x, f, gate, up if self._gated else np.broadcast_to(np.float32(1), gate.shape))
        except BaseException:
            for end in ends[layer:]:  # all rows must have been walked equally often
                if begin < end:
                    self.walk(begin, end)
                    begin = end
            raise

    def close(self) -> None:
        """End the threads; the buffers go with the object."""
        self._end_threads()
