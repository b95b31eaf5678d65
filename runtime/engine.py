"""The engine: token ids in, logits out. It knows nothing of text."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from ..formats.config import ModelConfig
from ..formats.errors import ClosedError, ParameterError, UnsupportedError
from ..formats.gguf import GGUFFile
from ..formats.section import Section, find_section
from .bands import add_bands, check_load
from .cpu.layout import KV_BLOCK, ROWS_MAX, TILE_MIN
from .cpu.threads import default_threads
from .decoder import Split, build
from .down_t import add_down_t
from .embedding import final_norm
from .executor import CPUExecutor, Observer
from .graph import Graph
from .hot_cold import add_cold, check_placement
from .hybrid import HybridExecutor
from .kv_cache import KVCache, Sequence
from .kv_types import PLAIN, KVTypes
from .lora import Wanted, adapt, changes
from .lora import check as check_lora
from .memory import available_bytes, total_bytes
from .parts import parts
from .sampler import check_int
from .schedule import schedule
from .sparsity import Sparsity, plan
from .state import Saved, Snapshot
from .tensors import Tensors
from .usage import Usage, usage

if TYPE_CHECKING:
    from ..formats.section import Placement
    from .trace import Trace

MAX_CONTEXT = 2**30  # positions and cache slots are 32-bit integers
MAX_THREADS = 1024
MICRO_BATCH = 512  # tokens evaluated in one step
SPARE = 8192  # tokens of the cache, at most, that are for embeddings alone
MAX_OUTPUTS = 128  # rows of logits that one step returns
_KV_SHARE = 0.5  # of the free memory, the most that a context not asked for may take


class Engine:
    """A model ready to compute.

    model: a path or an open GGUFFile (which the engine then owns). n_ctx: tokens a sequence may hold; default the
    model's own, less where memory is short. n_threads: default, the cores of this process. sparsity: auto, dense,
    exact, threshold=D or predict (sparsity.py); plan is what came of it, None for a dense engine. use_section: look for
    the model's section. n_parallel: sequences that have room for n_ctx tokens at the same time. placement: what runs on
    the GPU; without one, all runs on the CPU. trace: notes what ran when. lora: adapters (GGUF) as paths or pairs
    (path, scale), added to the matrices that they name; on the CPU alone. Of a relufy adapter the merged model is
    opened (merged.py). load: copy quantised matrices into memory in the form that kernels like best (copy), read them
    where the file is mapped (mmap), or copy if memory allows (auto): bands.py. cache_type_k, cache_type_v: keys and
    values are kept as f16, q8_0 or q4_0 (kv_types.py). progress: called with a line while kernels compile. Not
    thread-safe: one call at a time.
    """

    def __init__(
        self,
        model: str | Path | GGUFFile,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        sparsity: str = "auto",
        use_section: bool = True,
        placement: Placement | None = None,
        n_parallel: int = 1,
        trace: Trace | None = None,
        lora: Wanted = (),
        load: str = "auto",
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self._load = check_load(load)
        if n_threads is not None:
            n_threads = check_int("n_threads", n_threads, 1, MAX_THREADS)
        if n_ctx is not None:
            n_ctx = check_int("n_ctx", n_ctx, 1, MAX_CONTEXT)
        wanted, self.lora = Sparsity.parse(sparsity), check_lora(lora)
        self.kv_types = KVTypes.parse(cache_type_k, cache_type_v)
        if self.kv_types.quantised and placement is not None:
            raise UnsupportedError("cache_type_k, cache_type_v: a GPU keeps keys and values as f16; leave them out")
        self.file = model if isinstance(model, GGUFFile) else GGUFFile(model)
        self.section: Section | None = None
        self.closed = False
        try:
            if self.lora:
                from .merged import opened

                self.file, self.lora = opened(self.file, self.lora, n_threads, progress)
            if self.lora and placement is not None:
                raise UnsupportedError("lora: adapters run on the CPU alone; open the model without a VRAM budget")
            self.config = ModelConfig.from_gguf(self.file)
            self.kv_types.check(self.config.name, self.config.head_dim_k, self.config.head_dim_v)
            self.n_ctx = n_ctx or default_context(self.config, n_parallel, self.kv_types)
            _check_context(self.config, self.n_ctx, n_parallel, self.kv_types)
            self.n_threads = n_threads or default_threads()
            self.n_vocab = self.config.n_vocab
            if self.file.powerinfer and not use_section:
                raise UnsupportedError(f"{self.file.path}: a PowerInfer file: `hotcold convert` it first")
            if use_section:
                self.section = find_section(self.file, self.config)
            self.changes = changes(self.file, self.lora)
            self.plan = plan(wanted, self.config, self.section)
            by_choice = wanted.kind in ("auto", "dense") and not self.file.powerinfer
            if by_choice and any(".ffn_" in name and ".ffn_bypass." not in name for name in self.changes):
                self.plan = None  # only dense FFNs can be adapted
            self._tensors = Tensors(self.file, *([self.section.image] if self.section else []))
            per_sequence = -(-self.n_ctx // KV_BLOCK) + 1  # one to copy to, where a begun block is shared
            on_cpu = placement is None
            spare = min(per_sequence, SPARE // KV_BLOCK) if on_cpu else 0
            n_blocks = n_parallel * per_sequence
            self.cache = KVCache(self.config, n_blocks, copyable=on_cpu, n_spare=spare, types=self.kv_types)
            self._executor = self._cpu(progress) if placement is None else self._hybrid(placement, trace, progress)
        except BaseException as error:
            self._close_files()
            self.closed = True
            if isinstance(error, MemoryError):
                raise ParameterError(f"n_ctx: got {self.n_ctx}, wanted less: out of memory ({error})") from error
            raise

    def _cpu(self, progress: Callable[[str], None] | None) -> CPUExecutor:
        if self.plan and not self.plan.dense_from_t and not self.config.n_expert:
            add_down_t(self._tensors, range(self.config.n_layer), self.n_threads, progress)
        graph = build(self.config, self.plan, self._ranks())
        return self._lower(adapt(graph, self._tensors, self.changes), progress)

    def _hybrid(
        self, placement: Placement, trace: Trace | None, progress: Callable[[str], None] | None
    ) -> HybridExecutor:
        from .cuda.load import load  # Numba's CUDA half, which a run without a GPU does not import

        c, n_hot = self.config, tuple(map(len, placement.hot))
        check_placement(placement, c)
        whole, from_t = (0, c.n_ff), self.plan is not None and self.plan.dense_from_t
        wanted = [layer for layer in range(c.n_layer) if self.plan or n_hot[layer] not in whole]
        if c.n_expert:  # the CPU never computes experts by neurons, and the GPU makes what it needs
            wanted = []
        if not from_t:
            add_down_t(self._tensors, wanted, self.n_threads, progress)
        mapped = placement.cold == "mapped"
        if not mapped:
            add_cold(self._tensors, c, placement.hot)
        graph = build(c, self.plan, self._ranks(), Split(placement.attention, n_hot, placement.head, mapped))
        cpu = self._lower(graph, progress)
        sizes = {"tokens": MICRO_BATCH, "outputs": MAX_OUTPUTS}
        try:
            segments = schedule(graph)
            n_blocks = self.cache.n_blocks
            numbers = n_blocks, self.n_ctx, self.n_threads
            gpu = load(segments, graph, self._tensors, c, cpu, placement, *numbers, sizes, trace, progress)
        except BaseException:
            cpu.close()
            raise
        if not from_t:  # its rows are in the two memories by now
            for layer in wanted:
                if n_hot[layer]:
                    self._tensors.drop(f"blk.{layer}.ffn_down_t.weight")
        computed = tuple(c.n_ff if n and mapped else n for n in n_hot)
        return HybridExecutor(segments, cpu, gpu, computed, trace)

    def _lower(self, graph: Graph, progress: Callable[[str], None] | None) -> CPUExecutor:
        add_bands(graph, self._tensors, self._load, self.n_threads, self.cache.nbytes, progress)
        return CPUExecutor(
            graph,
            self._tensors,
            self.config,
            self.cache,
            self.n_ctx,
            self.n_threads,
            MICRO_BATCH,
            MAX_OUTPUTS,
            progress,
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes of a full KV cache."""
        self._check_open()
        return self.cache.nbytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.file.tensors.values())

    @property
    def usage(self) -> Usage:
        """What the FFNs have read and which neurons were active, since the engine was made."""
        self._check_open()
        run = self._executor
        return usage(run.tape, self._tensors, self.config, self.plan, run.steps, run.gpu_usage)

    def new_sequence(self, guest: bool = False) -> Sequence:
        """An empty sequence; several share the cache, whose size is that of n_parallel full contexts.

        guest: one for a short use beside the others, whose room it leaves alone; all guests have room for SPARE tokens.
        """
        self._check_open()
        return Sequence(self.cache, self.n_ctx, guest)

    def eval(self, sequence: Sequence, ids: Seq[int] | np.ndarray, all_logits: bool = False) -> np.ndarray:
        """Append tokens to a sequence and return their logits.

        ids: at least one token id. Returns float32 [1, n_vocab] for the last token, or with all_logits
        [len(ids), n_vocab]; the next call may overwrite it. ParameterError for bad ids, ContextLengthError past
        n_ctx. An interrupt leaves the sequence with the tokens of the micro-batches evaluated so far.
        """
        self._check_open()
        tokens = self._tokens(ids)
        sequence.reserve(len(tokens))
        size = MAX_OUTPUTS if all_logits else MICRO_BATCH
        kept = np.empty((len(tokens), self.n_vocab), np.float32) if all_logits and len(tokens) > size else None
        for part in parts(len(tokens), size):
            rows = np.arange(part.stop - part.start)
            if not all_logits:
                rows = rows[-1:] if part.stop == len(tokens) else rows[:0]
            logits = self._executor.run([(sequence, tokens[part])], rows)
            if kept is not None:
                kept[part] = logits
        return logits if kept is None else kept

    @property
    def max_rows(self) -> int:
        """Most tokens that one step computes by rows."""
        return TILE_MIN - 1 if self.plan else ROWS_MAX

    def eval_batch(
        self,
        batch: Seq[tuple[Sequence, Seq[int] | np.ndarray]],
        outputs: Seq[int] | None = None,
        by_rows: bool | None = None,
    ) -> np.ndarray:
        """Append tokens to several sequences in one step; by default, the logits of each one's last token.

        batch: different sequences, each with at least one token id; at most MAX_OUTPUTS sequences and MICRO_BATCH
        tokens. outputs: of how many of each sequence's last tokens logits are wanted. by_rows: the kernels of single
        tokens (True; max_rows tokens at most), or of prompts (False); None: by the number of tokens. With either, a
        token's numbers do not depend on the others in its step. Returns float32 [sum(outputs), n_vocab]; the next call
        may overwrite it. Errors as of eval.
        """
        self._check_open()
        given = [(sequence, self._tokens(ids)) for sequence, ids in batch]
        lengths = [len(tokens) for _, tokens in given]
        wanted = [1] * len(given) if outputs is None else list(outputs)
        if not 0 < len(given) <= MAX_OUTPUTS or len({id(sequence) for sequence, _ in given}) < len(given):
            raise ParameterError(f"batch: got {len(given)} sequences, wanted 1 to {MAX_OUTPUTS} different ones")
        if sum(lengths) > MICRO_BATCH:
            raise ParameterError(f"batch: got {sum(lengths)} tokens, wanted at most {MICRO_BATCH} in one step")
        if (
            len(wanted) != len(given)
            or sum(wanted) > MAX_OUTPUTS
            or any(not 0 <= n <= length for n, length in zip(wanted, lengths, strict=True))
        ):
            raise ParameterError(f"outputs: got {wanted}, wanted at most {MAX_OUTPUTS}, of tokens that are given")
        tile_min = TILE_MIN
        if by_rows is not None:
            if by_rows and sum(lengths) > self.max_rows:
                raise ParameterError(f"batch: got {sum(lengths)} tokens, wanted at most {self.max_rows} by rows")
            tile_min = MICRO_BATCH + 1 if by_rows else 0
        for sequence, tokens in given:
            sequence.reserve(len(tokens))
        ends = np.cumsum(lengths).tolist()
        rows = [np.arange(end - n, end) for end, n in zip(ends, wanted, strict=True)]
        return self._executor.run(given, np.concatenate(rows), tile_min=tile_min)

    def observe(self, sequence: Sequence, ids: Seq[int] | np.ndarray, see: Observer) -> None:
        """Append tokens to a sequence as eval does, and show every layer's FFN at work instead of logits.

        see(layer, x, f, gate, up) gets float32 views that are valid during the call only: the residual that the FFN
        adds to, what it reads of it (normed) [n, n_embd], the raw gate and up projections [n, n_ff], of up to
        MICRO_BATCH tokens at a time. An FFN without a gate shows the up projection as its gate, and ones as up.
        """
        self._check_open()
        if self.config.n_expert:
            name = self.config.name
            raise ParameterError(
                f"observe: {name!r:.60} is a mixture of experts; usage.experts says how often each was chosen"
            )
        if self.plan is not None or isinstance(self._executor, HybridExecutor):
            raise ParameterError("observe needs a dense engine: Engine(..., sparsity='dense', use_section=False)")
        tokens = self._tokens(ids)
        sequence.reserve(len(tokens))
        for part in parts(len(tokens), MICRO_BATCH):
            self._executor.run([(sequence, tokens[part])], np.arange(0), see)

    def embed(self, sequence: Sequence, ids: Seq[int] | np.ndarray) -> np.ndarray:
        """Append tokens to a sequence as eval does; their hidden states instead of logits: float32 [len(ids), n_embd].

        These are what the output head reads: the residual after the last block, normed, not multiplied by the model's
        logit scale. UnsupportedError where they stay on the GPU.
        """
        self._check_open()
        tokens = self._tokens(ids)
        sequence.reserve(len(tokens))
        found = [self.embed_batch([(sequence, tokens[part])]) for part in parts(len(tokens), MICRO_BATCH)]
        return np.concatenate(found)

    def embed_batch(self, batch: Seq[tuple[Sequence, Seq[int] | np.ndarray]]) -> np.ndarray:
        """As embed, several sequences in one step: float32 [all tokens, n_embd]; bounds and errors as of eval_batch."""
        self._check_open()
        if not any(node.weight == "output_norm.weight" for node in self._executor.tape.nodes):
            raise UnsupportedError("embeddings: the model's output is on the GPU; open it without a VRAM budget")
        self.eval_batch(batch, [0] * len(batch), by_rows=False)
        n_tok = sum(len(ids) for _, ids in batch)
        x = self._executor.tape.buffers["x"].view(np.float32)[: n_tok * self.config.n_embd]
        return final_norm(x.reshape(n_tok, -1), self.config, self._tensors)

    def snapshot(self) -> Snapshot:
        """What the cache has that other prompts may begin with, to be written to a file; to be closed."""
        self._check_open()
        self._check_state()
        return Snapshot(self)

    def saved(self, path: Path) -> Saved:
        """A snapshot's file, checked, whose restore() fills the cache; to be closed. FormatError if it does not fit."""
        self._check_open()
        self._check_state()
        return Saved(path, self)

    def _check_state(self) -> None:
        if not self.cache.copyable:
            raise UnsupportedError("state: keys and values are on the GPU too; open the model without a VRAM budget")

    def _ranks(self) -> tuple[int, ...]:
        """The predictors' ranks by layer, if the plan has predictors."""
        predictors = self.section.predictors() if self.section and self.plan and self.plan.predictor else None
        return predictors.ranks if predictors else ()

    def _tokens(self, ids: Seq[int] | np.ndarray) -> np.ndarray:
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
            raise ParameterError(f"token ids: got {ids!r:.60}, wanted a non-empty list of integers")
        bad = (tokens < 0) | (tokens >= self.n_vocab)
        if bad.any():
            raise ParameterError(f"token ids: got {tokens[bad][0]}, wanted 0 to {self.n_vocab - 1}")
        return tokens.astype(np.int32)

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("this engine is closed; make another")

    def close(self) -> None:
        """End the threads and free the mapping; again is no error."""
        if not self.closed:
            self.closed = True
            self._executor.close()
            del self._executor, self.cache, self._tensors
            self._close_files()

    def _close_files(self) -> None:
        self.file.close()
        if self.section:
            self.section.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def token_bytes(config: ModelConfig, types: KVTypes = PLAIN) -> int:
    """Bytes of one token in the KV cache and the table of rotations."""
    kv = config.n_layer * config.n_head_kv * types.row_bytes(config.head_dim_k, config.head_dim_v)
    return kv + config.rope_dim * 4 * (2 if config.local_base else 1)


def default_context(config: ModelConfig, n_parallel: int = 1, types: KVTypes = PLAIN) -> int:
    """The model's context, or what fits n_parallel times into a share of the free memory, but never nothing."""
    free = available_bytes()
    if free is None:
        return min(config.n_ctx_train, config.n_positions or MAX_CONTEXT, MAX_CONTEXT)
    fits = int(free * _KV_SHARE) // n_parallel // token_bytes(config, types) // KV_BLOCK * KV_BLOCK
    return min(config.n_ctx_train, config.n_positions or MAX_CONTEXT, MAX_CONTEXT, max(KV_BLOCK, fits))


def _check_context(config: ModelConfig, n_ctx: int, n_parallel: int, types: KVTypes) -> None:
    """Raise ParameterError for a context that could never be filled."""
    if config.n_positions and n_ctx > config.n_positions:
        raise ParameterError(
            f"n_ctx: got {n_ctx}, wanted at most {config.n_positions}: {config.name!r:.60} has no positions beyond"
        )
    total, each = total_bytes(), token_bytes(config, types) * n_parallel
    if total is not None and n_ctx > total // each:
        raise ParameterError(
            f"n_ctx: got {n_ctx}, wanted at most {total // each}: each token takes {each} bytes, "
            f"and all the memory is {total / 2**30:.1f} GiB"
        )
