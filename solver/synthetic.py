"""Llama models of any size and type with random weights, for benchmarks.

Speed does not depend on what weights say, so such a file stands in for a download of gigabytes. Where it depends on
which neurons are active, synthetic_relu.py makes weights that prescribe it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..formats.errors import ParameterError, StorageError
from ..formats.pages import forget
from ..formats.section_file import update_section
from ..formats.types import GGMLType

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter

    from ..formats.section_file import Contents

Progress = Callable[[str, int, int], None]

N_SPECIAL = 3 + 256  # <unk>, <s>, </s>, then one token a byte
N_CTX_TRAIN = 4096
LETTERS = "▁etaoinshrdlucmfwygpbvkxqjz"
# By block format: byte offset of the f16 scale; offset of the f16 minimum and the minimum over the scale that
# centres uniform quants on zero (or None: then every other scale is negative); deviation of the quants.
BLOCKS: dict[GGMLType, tuple[int, tuple[int, float] | None, float]] = {
    GGMLType.Q4_0: (0, None, 4.61),
    GGMLType.Q4_1: (0, (2, -7.5), 4.61),
    GGMLType.Q5_0: (0, None, 9.23),
    GGMLType.Q5_1: (0, (2, -15.5), 9.23),
    GGMLType.Q8_0: (0, None, 73.9),
    GGMLType.Q2_K: (80, (82, 1.5), 13.5),
    GGMLType.Q3_K: (108, None, 43.5),
    GGMLType.Q4_K: (0, (2, 7.5), 258.0),
    GGMLType.Q5_K: (0, (2, 15.5), 534.0),
    GGMLType.Q6_K: (208, None, 1366.0),
}
ROUTER = "ffn_gate_inp.weight"  # always F32, as in real files
TYPES = {kind.name: kind for kind in (GGMLType.F32, GGMLType.F16, GGMLType.BF16, *BLOCKS)}


def random_weights(kind: GGMLType, n_rows: int, n_cols: int, rng: np.random.Generator) -> np.ndarray:
    """Random weights of standard deviation 1 / sqrt(n_cols) and mean 0, as uint8 (n_rows, bytes of a row)."""
    import numpy as np

    std = n_cols**-0.5
    if kind not in BLOCKS:
        weights = rng.standard_normal((n_rows, n_cols), dtype=np.float32)
        weights *= np.float32(std)
        if kind == GGMLType.BF16:
            return (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return weights.astype(np.float16 if kind == GGMLType.F16 else np.float32, copy=False).view(np.uint8)
    scale_at, minimum, deviation = BLOCKS[kind]
    n_blocks = n_rows * n_cols // kind.block_size
    blocks = rng.integers(0, 256, (n_blocks, kind.type_size), dtype=np.uint8)
    scale = (std / deviation * rng.uniform(0.75, 1.25, (n_blocks, 1))).astype(np.float16)
    if minimum is None:
        # Codes such as 0..15 less 8 are off centre by half a step, which 4096 columns would add up.
        scale[::2] *= np.float16(-1)
    else:
        min_at, ratio = minimum
        blocks[:, min_at : min_at + 2] = (scale * np.float16(ratio)).view(np.uint8)
    blocks[:, scale_at : scale_at + 2] = scale.view(np.uint8)
    return blocks.reshape(n_rows, -1)


@dataclass(frozen=True)
class Shape:
    """A llama model's sizes; ParameterError for what no model can have.

    With experts, n_ff is the width of each, and n_expert_used of them compute a token.
    """

    kind: GGMLType
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    n_expert: int = 0
    n_expert_used: int = 0

    def __post_init__(self) -> None:
        for name in ("n_embd", "n_ff", "n_layer", "n_head", "n_head_kv", "n_vocab"):
            least = N_SPECIAL + len(LETTERS) if name == "n_vocab" else 1
            if (got := getattr(self, name)) < least:
                raise ParameterError(f"{name}: got {got}, wanted at least {least}")
        if not min(1, self.n_expert) <= self.n_expert_used <= self.n_expert:
            raise ParameterError(f"experts used: got {self.n_expert_used}, wanted 1 to {self.n_expert}, the experts")
        self._multiple("n_embd", self.kind.block_size, f"{self.kind.name} blocks")
        self._multiple("n_ff", self.kind.block_size, f"{self.kind.name} blocks")
        self._multiple("n_embd", 2 * self.n_head, "twice n_head")
        self._multiple("n_head", self.n_head_kv, "n_head_kv")

    def _multiple(self, name: str, of: int, why: str) -> None:
        if getattr(self, name) % of:
            raise ParameterError(f"{name}: got {getattr(self, name)}, wanted a multiple of {of} ({why})")


def tensors(shape: Shape) -> Iterator[tuple[str, int, int]]:
    """(name, rows, columns) of each tensor in file order; rows 0 marks a norm vector. Experts' rows are together."""
    exps, n_stacked = ("_exps", shape.n_expert) if shape.n_expert else ("", 1)
    n_embd, n_ff, n_kv = shape.n_embd, shape.n_ff, shape.n_embd // shape.n_head * shape.n_head_kv
    yield "token_embd.weight", shape.n_vocab, n_embd
    for layer in range(shape.n_layer):
        yield f"blk.{layer}.attn_norm.weight", 0, n_embd
        yield f"blk.{layer}.attn_q.weight", n_embd, n_embd
        yield f"blk.{layer}.attn_k.weight", n_kv, n_embd
        yield f"blk.{layer}.attn_v.weight", n_kv, n_embd
        yield f"blk.{layer}.attn_output.weight", n_embd, n_embd
        yield f"blk.{layer}.ffn_norm.weight", 0, n_embd
        if shape.n_expert:
            yield f"blk.{layer}.{ROUTER}", shape.n_expert, n_embd
        yield f"blk.{layer}.ffn_gate{exps}.weight", n_stacked * n_ff, n_embd
        yield f"blk.{layer}.ffn_up{exps}.weight", n_stacked * n_ff, n_embd
        yield f"blk.{layer}.ffn_down{exps}.weight", n_stacked * n_embd, n_ff
    yield "output_norm.weight", 0, n_embd
    yield "output.weight", shape.n_vocab, n_embd


def vocabulary(n_vocab: int) -> tuple[list[str], list[float], list[int]]:
    """(pieces, scores, token types) of a SentencePiece vocabulary: special, bytes, letters, made-up words."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    for number in range(n_vocab - len(pieces)):
        word, rest = "", number
        while rest or not word:
            word, rest = word + LETTERS[1 + rest % 26], rest // 26
        pieces.append(f"▁{word}")
    scores = [0.0] * N_SPECIAL + [-float(rank) for rank in range(n_vocab - N_SPECIAL)]
    unknown, control, byte, normal = 2, 3, 6, 1
    kinds = [unknown, control, control, *[byte] * 256, *[normal] * (n_vocab - N_SPECIAL)]
    return pieces, scores, kinds


class Weights(Protocol):
    """What makes a model's tensors, in the order of tensors(), and its section."""

    def tensors(self) -> Iterator[np.ndarray]: ...
    def section(self) -> Contents: ...


def write_model(
    path: Path,
    shape: Shape,
    seed: int = 0,
    progress: Progress | None = None,
    relu: Weights | None = None,
) -> None:
    """Write a random llama model, one tensor in memory at a time; norms F32, all else shape.kind.

    The same arguments write the same bytes. relu: makes the weights, and a section with transposed down-projections
    and predictors is attached. progress gets (file name, bytes written, bytes in all). A failed or interrupted run
    leaves nothing behind. Raises StorageError.
    """
    from gguf import GGUFWriter

    partial = path.with_name(path.name + ".part")
    try:
        writer = GGUFWriter(partial, "llama")
        try:
            _write_metadata(writer, shape)
            if relu is not None:
                writer.add_string("llama.hidden_activation", "relu")
            done, total = 0, _write_tensor_list(writer, shape)
            for data in _tensor_data(shape, seed) if relu is None else relu.tensors():
                writer.write_tensor_data(data)
                done += data.nbytes
                if progress is not None:
                    progress(path.name, done, total)
        finally:
            writer.close()
        os.replace(partial, path)
        if relu is not None:
            update_section(path, relu.section())
        forget(path)
    except OSError as exc:
        raise StorageError(f"{path}: {exc.strerror or exc}; name a file that can be written there") from exc
    finally:
        with suppress(OSError):
            partial.unlink()


def _write_metadata(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_name(f"synthetic llama {shape.n_embd}x{shape.n_ff}x{shape.n_layer} {shape.kind.name}")
    writer.add_context_length(N_CTX_TRAIN)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_block_count(shape.n_layer)
    if shape.n_expert:
        writer.add_expert_count(shape.n_expert)
        writer.add_expert_used_count(shape.n_expert_used)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape.n_vocab)
    pieces, scores, kinds = vocabulary(shape.n_vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)


def _write_tensor_list(writer: GGUFWriter, shape: Shape) -> int:
    """Write everything before the tensor data; returns the bytes of data to come."""
    import numpy as np
    from gguf import GGMLQuantizationType

    total = 0
    for name, n_rows, n_cols in tensors(shape):
        kind = shape.kind if n_rows and not name.endswith(ROUTER) else GGMLType.F32
        row_bytes = n_cols // kind.block_size * kind.type_size
        dims = [n_rows, row_bytes] if n_rows else [row_bytes]
        if "_exps." in name:
            dims = [shape.n_expert, n_rows // shape.n_expert, row_bytes]
        n_bytes = max(n_rows, 1) * row_bytes
        writer.add_tensor_info(name, dims, np.dtype(np.uint8), n_bytes, GGMLQuantizationType(kind))
        total += n_bytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return total


def _tensor_data(shape: Shape, seed: int) -> Iterator[np.ndarray]:
    import numpy as np

    rng = np.random.default_rng(seed)
    for name, n_rows, n_cols in tensors(shape):
        if n_rows:
            yield random_weights(GGMLType.F32 if name.endswith(ROUTER) else shape.kind, n_rows, n_cols, rng)
        else:
            yield np.ones(n_cols, np.float32)
