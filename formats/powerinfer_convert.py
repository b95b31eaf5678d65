"""PowerInfer's checkpoint -> an ordinary GGUF with a section, one tensor in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig
from .errors import ParameterError, StorageError, UnsupportedError
from .gguf import GGUFFile, TensorInfo, show
from .pages import forget
from .powerinfer import threshold
from .section_file import Contents, SectionTensor, update_section
from .section_image import Progress
from .section_layout import sidecar_path
from .types import GGMLType

if TYPE_CHECKING:
    from gguf import GGUFWriter

# What gguf can encode; down-projections of other types are written in Q8_0.
_ENCODABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_OWN_KEYS = ("general.architecture", "general.alignment")  # keys that the writer adds itself
_ARRAY_TYPES = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}


def convert(source: Path, out: Path, progress: Progress) -> ModelConfig:
    """Write `out` from PowerInfer's `source` and return its config.

    ffn_down is ffn_down_t transposed, in ffn_down_t's type where gguf can encode it and else in Q8_0; the section gets
    ffn_down_t and the predictors as they are. Raises UnsupportedError, FormatError, ParameterError, StorageError.
    """
    side, part = sidecar_path(out), out.with_name(f".{out.name}.part")
    if out.resolve() == source.resolve():
        raise ParameterError(f"{out}: is the file to convert; name another one to write")
    if side.exists():
        raise StorageError(f"{side}: the section of an earlier {out.name}; delete it, or name another file to write")
    with GGUFFile(source) as file:
        if not file.powerinfer:
            raise UnsupportedError(f"{source}: is not one of PowerInfer's files (magic PWRI); hotcold runs it as it is")
        config = ModelConfig.from_gguf(file)
        try:
            _write(file, part, config, progress)
            os.replace(part, out)
        except OSError as error:
            raise StorageError(f"{out}: {error.strerror or error}; name a file that can be written there") from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        update_section(out, section(file, config), progress=progress)
    forget(out)
    return config


def section(file: GGUFFile, config: ModelConfig) -> Contents:
    """What PowerInfer's file has besides the model, as a section's contents that read from the open file."""
    metadata: dict[str, Any] = {}
    tensors: list[SectionTensor] = []

    def add(name: str, source: str) -> None:
        info = file.tensors[source]
        tensors.append(SectionTensor(name, info.shape, info.type, partial(file.data, source)))

    cut = np.full(config.n_ff, threshold(file), np.float32)
    for layer in range(config.n_layer):
        blk = f"blk.{layer}."
        if blk + "fc1.weight" in file.tensors:
            metadata = {"hotcold.predictor.kind": "relu", "hotcold.predictor.input": "residual"}
            add(blk + "ffn_pred_a.weight", blk + "fc1.weight")
            add(blk + "ffn_pred_b.weight", blk + "fc2.weight")
            name = blk + "ffn_pred_cut"
            tensors.append(SectionTensor(name, cut.shape, GGMLType.F32, lambda: cut.view(np.uint8)))
        add(blk + "ffn_down_t.weight", blk + "ffn_down_t.weight")
    return Contents(metadata, tensors)


def _write(file: GGUFFile, part: Path, config: ModelConfig, progress: Progress) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(part, config.arch)
    try:
        for key, value in file.metadata.items():
            if key not in _OWN_KEYS and not key.startswith("powerinfer."):
                _add_key(writer, file.path, key, value)
        writer.add_string(f"{config.arch}.hidden_activation", config.activation)
        plan = list(_plan(file))
        for info, _ in plan:
            kind = GGMLQuantizationType(info.type)
            writer.add_tensor_info(info.name, info.shape[::-1], np.dtype(np.float32), info.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(info.nbytes for info, _ in plan)
        for info, data in plan:
            writer.write_tensor_data(data())
            done += info.nbytes
            progress("writing the model", done, total)
    finally:
        writer.close()


def _plan(file: GGUFFile) -> Iterator[tuple[TensorInfo, Callable[[], NDArray[np.uint8]]]]:
    """The tensors to write and how to get their bytes."""
    for info in file.tensors.values():
        if info.name.endswith((".fc1.weight", ".fc2.weight")):
            continue
        if not info.name.endswith(".ffn_down_t.weight"):
            yield info, partial(file.data, info.name)
            continue
        n_embd, n_ff = info.shape
        kind = info.type if info.type.name in _ENCODABLE else GGMLType.Q8_0
        if n_ff % kind.block_size:
            kind = GGMLType.F16
        name = info.name.replace("ffn_down_t", "ffn_down")
        nbytes = n_embd * n_ff // kind.block_size * kind.type_size
        yield TensorInfo(name, (n_ff, n_embd), kind, 0, nbytes), partial(_transposed, file, info.name, kind)


def _transposed(file: GGUFFile, name: str, kind: GGMLType) -> NDArray[np.uint8]:
    from gguf import GGMLQuantizationType, quants

    weights = np.ascontiguousarray(file.dequantized(name).T)
    if kind == GGMLType.F32:
        return weights.view(np.uint8)
    return quants.quantize(weights, GGMLQuantizationType(kind)).view(np.uint8)


def _add_key(writer: GGUFWriter, path: Path, key: str, value: Any) -> None:
    """A metadata value as today's llama.cpp expects it: integers u32 (or i32, u64), floats f32, arrays as they were."""
    from gguf import GGUFValueType as Type

    if isinstance(value, str):
        writer.add_key_value(key, value, Type.STRING)
    elif isinstance(value, bool):
        writer.add_key_value(key, value, Type.BOOL)
    elif isinstance(value, int):
        kind = Type.UINT32 if 0 <= value < 2**32 else Type.INT32 if -(2**31) <= value < 0 else Type.UINT64
        writer.add_key_value(key, value, kind if value >= -(2**31) else Type.INT64)
    elif isinstance(value, float):
        with np.errstate(over="ignore"):
            exact = float(np.float32(value)) == value or value != value
        writer.add_key_value(key, value, Type.FLOAT32 if exact else Type.FLOAT64)
    elif len(value) == 0:
        return  # the writer has no empty arrays
    elif isinstance(value, np.ndarray):
        sub = Type(_ARRAY_TYPES[value.dtype.str[1:]])
        writer.add_key_value(key, value.tolist(), Type.ARRAY, sub_type=sub)
    elif isinstance(value[0], str):
        writer.add_key_value(key, value, Type.ARRAY, sub_type=Type.STRING)
    else:
        raise UnsupportedError(f"{path}: key {show(key)}: arrays of arrays cannot be converted")
