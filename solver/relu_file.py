"""The file that `hotcold relufy` writes: the source's, with other FFN matrices and a note of how they were made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..formats.config import ModelConfig
from ..formats.errors import ParameterError
from ..formats.gguf import GGUFFile
from ..formats.section_file import Contents, SectionTensor, replacing
from ..formats.types import GGMLType
from .transpose import encoded

if TYPE_CHECKING:
    from gguf import GGUFWriter

# What gguf's Python package encodes.
TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
FLOATS = TYPES[:3]
PARTS = ("gate", "up", "down")
BYPASS, BIAS = "bypass", "bypass_bias"  # parts that the source does not have
Weights = Callable[[int], Mapping[str, np.ndarray]]


def choose_type(source: GGUFFile, config: ModelConfig, name: str | None) -> GGMLType:
    """The type of the new FFN matrices: the named one; else the source's own if it is a float, else Q8_0.

    New weights lose much more in few bits than the source's, which were on that grid already: with Q4_1 the
    perplexity of a relufied SmolLM2 rose by 12 %.

    ParameterError: a type that cannot be encoded, or whose blocks do not divide the rows.
    """
    if name is None:
        own = source.tensors["blk.0.ffn_gate.weight"].type.name
        name = own if own in FLOATS else "Q8_0"
    elif name.upper() not in TYPES:
        raise ParameterError(f"--type: got {name!r}, wanted one of {', '.join(TYPES)}")
    kind = GGMLType[name.upper()]
    for size, value in (("n_embd", config.n_embd), ("n_ff", config.n_ff)):
        if value % kind.block_size:
            wanted = f"a type whose blocks divide {size} = {value}, such as F16"
            raise ParameterError(f"--type: got {kind.name} (blocks of {kind.block_size}), wanted {wanted}")
    return kind


def section(config: ModelConfig, kind: GGMLType, weights: Weights) -> Contents:
    """The neuron-major copies of ffn_down, made of the trained floats, in the type of the new matrices."""

    def make(layer: int) -> np.ndarray:
        return encoded(np.ascontiguousarray(weights(layer)["down"].T), kind)

    shape = (config.n_embd, config.n_ff)
    tensors = [
        SectionTensor(f"blk.{layer}.ffn_down_t.weight", shape, kind, partial(make, layer))
        for layer in range(config.n_layer)
    ]
    return Contents({}, tensors)


def write(
    source: GGUFFile,
    config: ModelConfig,
    out: Path,
    kind: GGMLType,
    weights: Weights,
    floors: Sequence[float],
    notes: Mapping[str, Any],
) -> None:
    """Write the source with ReLU, new FFN matrices and what runs beside them.

    weights(layer) gives gate and up [n_ff, n_embd], down [n_embd, n_ff] and, of all layers or none, bypass
    [n_embd, n_embd] and bypass_bias [n_embd]; floors: by layer, what an open gate must exceed. All other tensors are
    copied byte for byte; `notes` (str, int, float or list of str) are added to the metadata. A failed or interrupted
    run leaves nothing behind. Raises StorageError.
    """
    from gguf import GGUFWriter

    with replacing(out, "name a file that can be written there") as part:
        writer = GGUFWriter(part, config.arch)
        try:
            writer.data_alignment = source.alignment
            _write_metadata(writer, source, config, kind, floors, notes)
            tensors = list(_tensors(source, config, kind, weights))
            _write_tensor_list(writer, tensors)
            for _, _, _, data in tensors:
                writer.write_tensor_data(data())
        finally:
            writer.close()


def add_notes(writer: GGUFWriter, notes: Mapping[str, Any]) -> None:
    """Add str, int, float or lists of str to the metadata."""
    from gguf import GGUFValueType

    types = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    for name, value in notes.items():
        if isinstance(value, list):
            writer.add_key_value(name, value, GGUFValueType.ARRAY, GGUFValueType.STRING)
        else:
            writer.add_key_value(name, value, types[type(value)])


def _is_ffn(name: str) -> bool:
    return name.startswith("blk.") and name.endswith(tuple(f".ffn_{part}.weight" for part in PARTS))


def _write_metadata(
    writer: GGUFWriter,
    source: GGUFFile,
    config: ModelConfig,
    kind: GGMLType,
    floors: Sequence[float],
    notes: Mapping[str, Any],
) -> None:
    from gguf import GGUFReader, GGUFValueType, LlamaFileType

    file_type = "ALL_F32" if kind == GGMLType.F32 else f"MOSTLY_{kind.name}"
    own: dict[str, Any] = {
        f"{config.arch}.hidden_activation": "relu",
        "general.name": f"{config.name} ReLU",
        "general.base_model.count": 1,
        "general.base_model.0.name": config.name,
        "general.file_type": int(LlamaFileType[file_type]),
        **notes,
    }
    if kind.block_size > 1:
        own["general.quantization_version"] = 2
    floors_key = f"{config.arch}.hidden_activation_threshold"
    replaced = (*own, floors_key, "general.architecture", "general.alignment", "general.base_model.")
    # Through gguf's reader, which keeps the exact type of each value.
    for name, field in GGUFReader(source.path).fields.items():
        if name.startswith("GGUF.") or name in replaced or name.startswith(replaced[-1]):
            continue
        kinds = field.types
        writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    if source.alignment != 32:
        writer.add_custom_alignment(source.alignment)
    add_notes(writer, own)
    if any(floors):
        writer.add_key_value(floors_key, list(floors), GGUFValueType.ARRAY, GGUFValueType.FLOAT32)


_Tensor = tuple[str, tuple[int, ...], GGMLType, Callable[[], np.ndarray]]  # name, shape (ne order), type, bytes


def _tensors(source: GGUFFile, config: ModelConfig, kind: GGMLType, weights: Weights) -> Iterator[_Tensor]:
    """Those of the source, in its order; after each ffn_down what runs beside the neurons."""
    layer, found, there = -1, dict[str, np.ndarray](), set(weights(0))

    def made(number: int, part: str, kind: GGMLType) -> np.ndarray:
        nonlocal layer, found
        if number != layer:
            layer, found = number, dict(weights(number))
        return encoded(found[part], kind).reshape(-1)

    beside = {BYPASS: ("weight", (config.n_embd,) * 2, kind), BIAS: ("bias", (config.n_embd,), GGMLType.F32)}
    for name, info in source.tensors.items():
        if not _is_ffn(name):
            yield name, info.shape, info.type, partial(source.data, name)
            continue
        number, part = int(name.split(".")[1]), name.split(".")[2].removeprefix("ffn_")
        yield name, info.shape, kind, partial(made, number, part, kind)
        if part == "down":
            for own, (ending, shape, own_kind) in beside.items():
                if own in there:
                    yield f"blk.{number}.ffn_bypass.{ending}", shape, own_kind, partial(made, number, own, own_kind)


def _write_tensor_list(writer: GGUFWriter, tensors: list[_Tensor]) -> None:
    """Write everything before the tensor data."""
    from gguf import GGMLQuantizationType

    for name, shape, kind, _ in tensors:
        row_bytes = shape[0] // kind.block_size * kind.type_size
        dims = [*shape[:0:-1], row_bytes]
        writer.add_tensor_info(name, dims, np.dtype(np.uint8), math.prod(dims), GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
