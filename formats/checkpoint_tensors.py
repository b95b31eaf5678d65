"""Which tensors of a Hugging Face checkpoint become which of a GGUF file, and how their values are laid out anew.

Layouts change on the stored values (bfloat16 as its bits), so that one tensor costs no more memory than it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .architecture_terms import EMBEDDING, MODEL_WIDE, Architecture, Group, Shape
from .checkpoint_terms import IGNORED
from .errors import FormatError, UnsupportedError
from .gguf_header import show
from .model_tensors import dimensions
from .safetensors import FLOATS, Weight, Weights, to_float32

_PIECE = 1 << 22  # values written at a time
_POSITIONS_BEFORE = 2  # rows of OPT's position embeddings that stand for no position
Layout = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Source:
    """A tensor to write: its shape in ggml's order, and the weights that it is made of, one after the other.

    layout: makes of a stored weight what GGUF has. offset: added to all values. values: instead of weights.
    """

    name: str
    shape: tuple[int, ...]
    weights: tuple[Weight, ...] = ()
    layout: Layout | None = None
    offset: float = 0.0
    values: NDArray[np.float32] | None = None

    @property
    def said(self) -> str:
        """The tensor's name in the checkpoint."""
        return self.weights[0].name if self.weights else self.name

    def pieces(self) -> Iterator[tuple[NDArray[Any], str]]:
        """The values as they are stored, [some rows, row length] and their type, from the first row to the last."""
        width = self.shape[0]
        step = max(1, _PIECE // width)
        if self.values is not None:
            yield self.values.reshape(-1, width), "F32"
        for weight in self.weights:
            raw = weight.raw()
            raw = (raw if self.layout is None else self.layout(raw)).reshape(-1, width)
            for first in range(0, len(raw), step):
                yield raw[first : first + step], weight.dtype
            weight.file.release(weight)

    def floats(self, raw: NDArray[Any], dtype: str) -> NDArray[np.float32]:
        """The values of a piece."""
        values = to_float32(raw, dtype)
        return values + np.float32(self.offset) if self.offset else values


def sizes_of(keys: Mapping[str, Any], n_vocab: int) -> dict[str, int]:
    """The dimensions that a model's keys, and its vocabulary, say."""
    n_embd, n_head, n_expert = keys["embedding_length"], keys["attention.head_count"], keys.get("expert_count", 0)
    one = "expert_feed_forward_length" if n_expert and "expert_feed_forward_length" in keys else "feed_forward_length"
    head_dim = keys.get("attention.key_length", n_embd // n_head)
    return dimensions(
        n_embd=n_embd,
        n_vocab=n_vocab,
        n_pos=keys["context_length"],
        n_one=keys[one],
        n_expert=n_expert,
        n_head=n_head,
        n_kv=keys["attention.head_count_kv"],
        key=head_dim,
        value=head_dim,
        rope_dim=keys.get("rope.dimension_count", 0),
    )


class Plan:
    """Every tensor to write, in order: those of the model's body, then block by block.

    tied: the embedding is the output too, None: if there is no other. Raises FormatError, naming the checkpoint's
    tensor, where one is missing or of another shape than config.json says, UnsupportedError where one is not known.
    """

    def __init__(
        self,
        row: Architecture,
        weights: Weights,
        sizes: Mapping[str, int],
        n_layer: int,
        rope_dim: int,
        tied: bool | None,
        made: Mapping[str, NDArray[np.float32]],
    ) -> None:
        self.row, self.folder, self.sizes, self.rope_dim = row, weights.folder, sizes, rope_dim
        self.there, self.made = weights.tensors, made
        prefix = row.hf.prefix
        self.bare = not any(name.startswith(prefix) for name in self.there)
        self.used: set[str] = set()
        if n_layer > len(self.there):  # before it is used as a loop count
            raise FormatError(self.folder, "tensors", f"{len(self.there)}", f"those of {n_layer} blocks")
        own_output = self.candidates("output.weight", 0)
        self.tied = tied if tied is not None else row.hf.tied or not self.has("output.weight")
        if self.tied:
            self.used |= self.there.keys() & set(own_output)
        chosen = self.groups()
        if unknown := made.keys() - chosen.keys():
            what = f"a rope scaling that needs {min(unknown)} is not supported for {row.name}"
            raise UnsupportedError(f"{self.folder}/config.json: {what}")
        self.sources = [self.source(name, shape, 0) for name, shape in chosen.items() if name in MODEL_WIDE]
        for i in range(n_layer):
            self.sources += [self.source(name, shape, i) for name, shape in chosen.items() if name not in MODEL_WIDE]
        self.refuse_others(n_layer)

    def candidates(self, name: str, block: int) -> list[str]:
        """What a GGUF tensor (of a block, without `blk.N.`) may be called in the checkpoint; {n} stays."""
        stem, _, kind = name.rpartition(".")
        found = [text.replace("{i}", str(block)) for text in self.row.hf.names.get(stem, ())]
        if self.bare:
            found = [text.removeprefix(self.row.hf.prefix) for text in found]
        return [f"{text}.{kind}" for text in found]

    def has(self, name: str) -> bool:
        return any(text.replace("{n}", "0") in self.there for text in self.candidates(name, 0))

    def groups(self) -> Group:
        """The tensors of the groups that the checkpoint has, in the table's order."""
        row = self.row
        chosen = [EMBEDDING, row.required]
        for group in row.optional:
            if "output.weight" in group:
                wanted = row.hf.own_output or not self.tied
            else:
                wanted = any(self.has(name) or name in self.made for name in group)
            if wanted:
                chosen.append(group)
        chosen.append(max(row.ffn, key=lambda group: sum(map(self.has, group))))
        return {name: shape for group in chosen for name, shape in group.items()}

    def source(self, name: str, shape: Shape, block: int) -> Source:
        expected = tuple(self.sizes[size] for size in shape)
        full = name if name in MODEL_WIDE else f"blk.{block}.{name}"
        if name in self.made:
            return Source(full, expected, values=self.made[name])
        names = self.candidates("token_embd.weight" if name == "output.weight" and self.tied else name, block)
        text = next((text for text in names if text.replace("{n}", "0") in self.there), names[0])
        stacked = "{n}" in text
        one = expected[:-1] if stacked else expected
        stem = name.rpartition(".")[0]
        how = self.row.hf.reordered.get(stem, "")
        count = expected[-1] if stacked else 1
        weights = tuple(self.weight(text.replace("{n}", str(n)), _stored(one, how)) for n in range(count))
        layout = self.layout(stem, how)
        offset = self.row.hf.norm_offset if name.endswith("norm.weight") else 0.0
        return Source(full, expected, weights, layout, offset)

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        """A weight of the checkpoint, in NumPy's shape."""
        found = self.there.get(name)
        if found is None:
            raise FormatError(self.folder, f"tensor {show(name)}", "no such tensor", f"shape {shape}")
        if found.shape != shape:
            wanted = f"shape {shape}, as the settings in config.json say"
            raise FormatError(self.folder, f"tensor {show(name)}", f"shape {found.shape}", wanted)
        if found.dtype not in FLOATS:
            what = "take the original checkpoint" if found.dtype.startswith("F8") else f"only {', '.join(FLOATS)} are"
            raise UnsupportedError(f"{self.folder}: tensor {show(name)} is of type {found.dtype}; {what}")
        self.used.add(name)
        return found

    def layout(self, stem: str, how: str) -> Layout | None:
        n_head, n_kv, n_dim = (self.sizes[name] for name in ("n_head", "n_kv", "n_dim"))
        if how == "transposed":
            return np.transpose
        if how == "offset":
            return lambda raw: raw[_POSITIONS_BEFORE:]
        if how == "grouped":
            return partial(_ungrouped, n_head=n_head, n_kv=n_kv, n_dim=n_dim)
        if self.row.rope == "norm" and stem in ("attn_q", "attn_k"):
            return partial(_pairs, n_dim=n_dim, n_rot=self.rope_dim)
        return None

    def refuse_others(self, n_layer: int) -> None:
        """Tensors that would be left out make another model: UnsupportedError, unless they are known to be idle."""
        ignored: list[str] = []
        for text in self.row.hf.ignored:
            text = text.removeprefix(self.row.hf.prefix) if self.bare else text
            ignored += [text.replace("{i}", str(i)) for i in range(n_layer)]
        whole, beginnings = set(ignored), tuple(text for text in ignored if text.endswith("."))
        for name in sorted(self.there.keys() - self.used - whole):
            if not name.endswith(IGNORED) and not name.startswith(beginnings):
                what = f"tensor {show(name)} is not one that {self.row.name} models of {n_layer} blocks have"
                raise UnsupportedError(f"{self.folder}: {what}, by config.json")


def _stored(shape: tuple[int, ...], how: str) -> tuple[int, ...]:
    """NumPy's shape in the checkpoint of what has this shape, in ggml's order, in the file."""
    if how == "transposed":
        return shape if len(shape) == 2 else shape[::-1]
    if how == "offset":
        return (shape[-1] + _POSITIONS_BEFORE, *shape[-2::-1])
    return shape[::-1]


def _pairs(raw: NDArray[Any], n_dim: int, n_rot: int) -> NDArray[Any]:
    """Rows of heads, of which i and i + n_rot/2 are rotated together -> these are neighbours, as in ggml's "norm"."""
    order = np.arange(n_dim)
    order[:n_rot] = np.arange(n_rot).reshape(2, n_rot // 2).T.ravel()
    return raw.reshape(-1, n_dim, *raw.shape[1:])[:, order].reshape(raw.shape)


def _ungrouped(raw: NDArray[Any], n_head: int, n_kv: int, n_dim: int) -> NDArray[Any]:
    """Fused rows, for each K/V head its queries, key and value -> all queries, all keys, all values."""
    groups = raw.reshape(n_kv, n_head // n_kv + 2, n_dim, *raw.shape[1:])
    parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
    return np.concatenate([part.reshape(-1, *raw.shape[1:]) for part in parts])


def own_type(sources: list[Source]) -> str:
    """The type that most of the matrices' values are stored in."""
    counts: dict[str, int] = {}
    for source in sources:
        for weight in source.weights:
            if len(weight.shape) > 1:
                counts[weight.dtype] = counts.get(weight.dtype, 0) + weight.nbytes
    return max(counts, key=lambda name: counts[name]) if counts else "F32"
