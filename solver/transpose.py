"""ffn_down by neuron: its columns' lengths, and the neuron-major copy that the sparse modes read."""

from __future__ import annotations

from functools import partial

import numpy as np

from ..formats.config import ModelConfig
from ..formats.errors import ParameterError
from ..formats.gguf import GGUFFile
from ..formats.section_file import Contents, SectionTensor
from ..formats.types import GGMLType

DOWN_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # that gguf can encode
_FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)


def down_norms(file: GGUFFile, config: ModelConfig) -> np.ndarray:
    """Length of each neuron's column of ffn_down: float32 [n_layer, n_ff]; one layer in memory at a time."""
    rows = [np.linalg.norm(file.dequantized(f"blk.{n}.ffn_down.weight"), axis=0) for n in range(config.n_layer)]
    return np.array(rows, np.float32)


def encoded(values: np.ndarray, kind: GGMLType) -> np.ndarray:
    """float32 [rows, n] as a tensor's bytes, uint8 (any shape); n must be a whole number of the type's blocks."""
    from gguf import GGMLQuantizationType, quants

    if kind == GGMLType.F32:
        return np.ascontiguousarray(values, "<f4").view(np.uint8)
    return np.ascontiguousarray(quants.quantize(values, GGMLQuantizationType(kind))).view(np.uint8)


def decoded(data: np.ndarray, shape: tuple[int, int], kind: GGMLType) -> np.ndarray:
    """The float32 [rows, n] that `encoded` bytes stand for."""
    from gguf import GGMLQuantizationType, quants

    values = quants.dequantize(data.reshape(shape[0], -1), GGMLQuantizationType(kind))
    return np.asarray(values, np.float32).reshape(shape)


def check_type(name: str, config: ModelConfig) -> GGMLType:
    """The type of a name, if ffn_down_t can be written in it; ParameterError lists those that can."""
    if name.upper() not in DOWN_TYPES:
        raise ParameterError(f"down-type: got {name!r:.20}, wanted one of {', '.join(DOWN_TYPES)}")
    kind = GGMLType[name.upper()]
    if config.n_embd % kind.block_size:
        raise ParameterError(f"down-type: got {kind.name}, wanted a float type, as n_embd is {config.n_embd}")
    return kind


def down_t_type(file: GGUFFile, config: ModelConfig) -> GGMLType:
    """That of ffn_down where it is a float, else Q8_0: to quantise again in few bits loses something."""
    kind = file.info("blk.0.ffn_down.weight").type
    if kind in _FLOATS:
        return kind
    return GGMLType.Q8_0 if config.n_embd % GGMLType.Q8_0.block_size == 0 else GGMLType.F16


def contents(file: GGUFFile, config: ModelConfig, kind: GGMLType | None = None) -> Contents:
    """ffn_down_t of all layers, each made when it is written; `file` must stay open until then. kind: its own type."""
    kind = kind or down_t_type(file, config)
    shape = (config.n_embd, config.n_ff)

    def make(layer: int) -> np.ndarray:
        down = file.dequantized(f"blk.{layer}.ffn_down.weight")
        return encoded(np.ascontiguousarray(down.T), kind)

    tensors = [
        SectionTensor(f"blk.{n}.ffn_down_t.weight", shape, kind, partial(make, n)) for n in range(config.n_layer)
    ]
    return Contents({}, tensors)
