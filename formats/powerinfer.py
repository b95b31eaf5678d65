"""PowerInfer's own checkpoints, `*.powerinfer.gguf`: read and converted, never written.

They are GGUF with the magic PWRI. ffn_down is there by neurons only (`blk.N.ffn_down_t.weight`), and predictors may be
inside: neuron j counts as active where (fc2 . relu(fc1 . x))_j >= powerinfer.sparse_threshold, x being the residual
stream before the FFN's norm. All of it is shown as a section, so that nothing else need know. Source: PowerInfer's
llama.cpp (build_llama_variants, llm_build_ffn_sparse) and its converters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, UnsupportedError
from .gguf import GGUFFile, TensorInfo
from .gguf_header import show
from .types import GGMLType

FAMILIES: Mapping[str, str] = {"llama": "relu", "bamboo": "drelu"}
"""Architecture -> activation of its FFN; it is compiled into PowerInfer, and no file says it."""

THRESHOLD = "powerinfer.sparse_threshold"
_RANK_MULTIPLE = 32


def own_block(block: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """A block's tensors as PowerInfer's files have them: ffn_down_t in place of ffn_down."""
    return {name: shape for name, shape in block.items() if name != "ffn_down.weight"} | {
        "ffn_down_t.weight": ("n_embd", "n_ff")
    }


def check_predictors(file: GGUFFile, n_layer: int, n_embd: int, n_ff: int) -> set[str]:
    """Names of the predictors' tensors, none if there are none; FormatError unless they fit together and the model."""
    names = {f"blk.{layer}.fc{number}.weight" for layer in range(n_layer) for number in (1, 2)}
    there = names & set(file.tensors)
    if not there:
        return there
    for layer in range(n_layer):
        shapes = []
        for name in (f"blk.{layer}.fc1.weight", f"blk.{layer}.fc2.weight"):
            if name not in file.tensors:
                wanted = f"one, as there is {show(min(there))}"
                raise FormatError(file.path, f"tensor {show(name)}", "none", wanted)
            shapes.append(file.tensors[name].shape)
        rank = shapes[0][1] if len(shapes[0]) == 2 else 0
        if tuple(shapes) != ((n_embd, rank), (rank, n_ff)):
            got, wanted = f"{shapes[0]} and {shapes[1]}", f"({n_embd}, rank) and (rank, {n_ff})"
            raise FormatError(file.path, f"tensors blk.{layer}.fc1 and fc2: shapes", got, wanted)
        if rank % _RANK_MULTIPLE:
            what = f"{file.path}: a predictor of rank {rank} is not supported (blk.{layer}.fc1)"
            raise UnsupportedError(f"{what}; multiples of {_RANK_MULTIPLE} are")
    threshold(file)
    return there


def threshold(file: GGUFFile) -> float:
    """The score from which a neuron counts as active, the same for all."""
    value: float = file.get(THRESHOLD, 0.0, float)
    if not math.isfinite(value):
        raise FormatError(file.path, f"key '{THRESHOLD}'", value, "a finite number")
    return value


class PowerInferImage(GGUFFile):
    """What a PowerInfer file has in the form of a section's image, and over it that of a section made later."""

    def __init__(self, model: GGUFFile, n_layer: int, n_ff: int, over: GGUFFile | None = None) -> None:
        self.path, self.powerinfer = model.path, False
        self.version, self.alignment, self.data_offset = model.version, model.alignment, model.data_offset
        self._model, self._over = model, over
        self._cut = np.full(n_ff, threshold(model), np.float32)
        self._cut.setflags(write=False)
        self._names: dict[str, str] = {}  # as a section names it -> as the model does, "" for the cut
        for layer in range(n_layer):
            blk = f"blk.{layer}."
            self._names[blk + "ffn_down_t.weight"] = blk + "ffn_down_t.weight"
            if blk + "fc1.weight" in model.tensors:
                self._names[blk + "ffn_pred_a.weight"] = blk + "fc1.weight"
                self._names[blk + "ffn_pred_b.weight"] = blk + "fc2.weight"
                self._names[blk + "ffn_pred_cut"] = ""
        self.metadata = {"hotcold.predictor.kind": "relu", "hotcold.predictor.input": "residual"}
        self.tensors, self.rows = {name: self._own_info(name) for name in self._names}, {}
        if over is not None:
            self.metadata |= over.metadata
            self.tensors |= over.tensors

    def data(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes: uint8 (nbytes,), read-only."""
        if self._over is not None and name in self._over.tensors:
            return self._over.data(name)
        source = self._names.get(name)
        if source == "":
            return self._cut.view(np.uint8)
        return self._model.data(name if source is None else source)

    def address(self, name: str) -> int:
        """Memory address of the tensor's first byte; valid until the model is closed."""
        return int(self.data(name).__array_interface__["data"][0])

    def release(self, name: str) -> None:
        """Let the memory go that holds the tensor's bytes; they are read from the file again when wanted."""
        if self._over is not None and name in self._over.tensors:
            self._over.release(name)
        elif source := self._names.get(name, name):
            self._model.release(source)

    @property
    def closed(self) -> bool:
        """Whether the model was closed."""
        return self._model.closed

    def close(self) -> None:
        """Let go of the section made later; the model is not this object's to close."""
        if self._over is not None:
            self._over.close()

    def _own_info(self, name: str) -> TensorInfo:
        source = self._names[name]
        if source == "":
            return TensorInfo(name, self._cut.shape, GGMLType.F32, 0, self._cut.nbytes)
        info = self._model.tensors[source]
        return TensorInfo(name, info.shape, info.type, info.offset, info.nbytes)
