"""Tiny files as PowerInfer writes them, built byte by byte: GGUF under the magic PWRI."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import naive
import numpy as np
from gguf import GGMLQuantizationType
from rawgguf import ARRAY, STRING, array, image, kv, scalar, string, tensor

U32, F32, BOOL = 4, 6, 7
RANKS = (32, 64)


@dataclass
class Tiny:
    """A PowerInfer checkpoint; extra and changed tensors make the odd and the hostile ones."""

    arch: str = "llama"
    qtype: str = "F32"
    n_layer: int = 2
    n_embd: int = 64
    n_ff: int = 96
    n_vocab: int = 300
    threshold: float | None = None
    predictors: bool = True
    magic: bytes = b"PWRI"
    ranks: tuple[int, ...] = RANKS
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # ne order, over the right ones
    without: tuple[str, ...] = ()
    pairs: tuple[bytes, ...] = ()  # more metadata
    type_number: int | None = None  # written as the type of all matrices
    seed: int = 0

    def tensors(self) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
        """name -> (shape in ne order, type, bytes)."""
        rng = np.random.default_rng(self.seed)
        made: dict[str, tuple[tuple[int, ...], str, bytes]] = {}

        def matrix(name: str, n_cols: int, n_rows: int, std: float | None = None, qtype: str = "") -> None:
            shape = self.shapes.get(name, (n_cols, n_rows))
            kind = qtype or self.qtype
            if len(shape) == 2 and name not in self.without:
                deviation = n_cols**-0.5 if std is None else std
                data = naive.random_blocks(GGMLQuantizationType[kind], shape[1], shape[0], rng, deviation)
                made[name] = (shape, kind, data.tobytes())
            elif name not in self.without:
                made[name] = (shape, kind, bytes(int(np.prod(shape)) * 4))

        def norm(name: str) -> None:
            made[name] = ((self.n_embd,), "F32", rng.normal(1, 0.2, self.n_embd).astype("<f4").tobytes())

        n = self.n_embd
        matrix("token_embd.weight", n, self.n_vocab, 0.3)
        norm("output_norm.weight")
        matrix("output.weight", n, self.n_vocab, 0.3)
        for layer in range(self.n_layer):
            blk = f"blk.{layer}."
            norm(blk + "attn_norm.weight")
            for part, rows in (("q", n), ("k", n // 2), ("v", n // 2), ("output", n)):
                matrix(f"{blk}attn_{part}.weight", n, rows)
            norm(blk + "ffn_norm.weight")
            for part in ("gate", "up"):
                matrix(f"{blk}ffn_{part}.weight", n, self.n_ff)
            matrix(blk + "ffn_down_t.weight", n, self.n_ff, self.n_ff**-0.5)
            if self.predictors:
                matrix(blk + "fc1.weight", n, self.ranks[layer], 1.0)
                matrix(blk + "fc2.weight", self.ranks[layer], self.n_ff, 1.0)
        return made

    def metadata(self) -> list[bytes]:
        def u32(suffix: str, value: int) -> bytes:
            return kv(f"{self.arch}.{suffix}", U32, scalar(U32, value))

        letters = "▁etaoinshrdlucmfwygpbvkxqjz"
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
        tokens += [f"<unused{i}>" for i in range(self.n_vocab - len(tokens))]
        kinds = [2, 3, 3, *[6] * 256, *[1] * len(letters), *[5] * self.n_vocab][: self.n_vocab]
        pairs = [
            kv("general.architecture", STRING, string(self.arch)),
            kv("general.name", STRING, string("LLaMA v2")),
            u32("context_length", 128),
            u32("embedding_length", self.n_embd),
            u32("block_count", self.n_layer),
            u32("feed_forward_length", self.n_ff),
            u32("rope.dimension_count", self.n_embd // 4),
            u32("attention.head_count", 4),
            u32("attention.head_count_kv", 2),
            kv(f"{self.arch}.attention.layer_norm_rms_epsilon", F32, scalar(F32, 1e-5)),
            kv("general.file_type", U32, scalar(U32, 1)),
            kv("tokenizer.ggml.model", STRING, string("llama")),
            kv("tokenizer.ggml.tokens", ARRAY, array(STRING, [string(token) for token in tokens])),
            kv("tokenizer.ggml.scores", ARRAY, array(6, [scalar(6, -i) for i in range(self.n_vocab)])),
            kv("tokenizer.ggml.token_type", ARRAY, array(5, [scalar(5, kind) for kind in kinds])),
            kv("tokenizer.ggml.bos_token_id", U32, scalar(U32, 1)),
            kv("tokenizer.ggml.eos_token_id", U32, scalar(U32, 2)),
            kv("tokenizer.ggml.add_bos_token", BOOL, scalar(BOOL, 1)),
        ]
        if self.threshold is not None:
            pairs.append(kv("powerinfer.sparse_threshold", F32, scalar(F32, self.threshold)))
        return [*pairs, *self.pairs]

    def image(self) -> bytes:
        entries, data = [], b""
        for name, (shape, kind, raw) in self.tensors().items():
            number = int(GGMLQuantizationType[kind])
            if self.type_number is not None and len(shape) == 2:
                number = self.type_number
            entries.append(tensor(name, shape, number, len(data)))
            data += raw + bytes(-len(raw) % 32)
        return image(self.metadata(), entries, data, magic=self.magic)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.image())
        return path


def oracle(tiny: Tiny, folder: Path) -> Any:
    """The NumPy model of it: read by gguf's reader as a llama file, ffn_down turned round."""
    from dataclasses import replace

    plain = replace(tiny, arch="llama", magic=b"GGUF").write(folder / "oracle.gguf")
    model = naive.load(plain, kv_f16=True)
    model.activation = {"llama": "relu", "bamboo": "drelu"}[tiny.arch]
    for layer in range(tiny.n_layer):
        model.tensors[f"blk.{layer}.ffn_down.weight"] = model.tensors[f"blk.{layer}.ffn_down_t.weight"].T
    return model
