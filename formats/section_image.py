"""Writing a section as a file of its own: header by the gguf package, then tensor after tensor, then checksums."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ParameterError
from .section_layout import Footer
from .types import GGMLType

Progress = Callable[[str, int, "int | None"], None]
"""Called with (what is going on, bytes done, bytes in all)."""

_ALIGNMENT = 32  # GGUF's default
_U32_KEYS = ("hotcold.format_version",)


@dataclass(frozen=True)
class SectionTensor:
    """A tensor to be written: shape in ggml order; data is called once, when its turn comes, for its bytes (uint8)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    data: Callable[[], NDArray[np.uint8]]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return int(np.prod(self.shape, dtype=np.int64)) // self.type.block_size * self.type.type_size


@dataclass(frozen=True)
class Contents:
    """What goes into a section: keys, whose integers are written as u64 and floats as f32, and tensors."""

    metadata: Mapping[str, Any]  # int, float, str, list of floats or numeric array
    tensors: list[SectionTensor]


def write_image(path: Path, arch: str, contents: Contents, base_size: int, offset: int, progress: Progress) -> Footer:
    """Write a section file, on disk when this returns; OSError where that fails. base_size, offset: see Footer."""
    total = sum(tensor.nbytes for tensor in contents.tensors)
    _write_header(path, arch, contents)
    with open(path, "r+b") as file:
        header = file.read()
        padding = bytes(-len(header) % _ALIGNMENT)
        file.write(padding)
        sums, length = [zlib.crc32(padding, zlib.crc32(header))], len(header) + len(padding)
        start = length
        for tensor in contents.tensors:
            # Let go of at once, even by an exception's traceback: a view of a mapped section keeps its file locked.
            with np.ascontiguousarray(tensor.data()).reshape(-1).view(np.uint8).data as data:
                if data.nbytes != tensor.nbytes:
                    raise ParameterError(f"tensor {tensor.name}: got {data.nbytes} bytes, wanted {tensor.nbytes}")
                sums.append(zlib.crc32(data))
                file.write(data)
            padding = bytes(-tensor.nbytes % _ALIGNMENT)
            file.write(padding)
            length += tensor.nbytes + len(padding)
            progress("writing the section", length - start, total)
        footer = Footer(length, start, base_size, offset, tuple(sums))
        file.write(footer.pack())
        file.flush()
        os.fsync(file.fileno())
    return footer


def _write_header(path: Path, arch: str, contents: Contents) -> None:
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, arch)
    for key, value in contents.metadata.items():
        if isinstance(value, str):
            writer.add_key_value(key, value, GGUFValueType.STRING)
        elif isinstance(value, (list, np.ndarray)):
            numbers = [float(item) for item in value]
            if numbers:  # the writer has no empty arrays
                writer.add_key_value(key, numbers, GGUFValueType.ARRAY, sub_type=GGUFValueType.FLOAT32)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif key in _U32_KEYS:
            writer.add_uint32(key, value)
        else:
            writer.add_uint64(key, int(value))
    for tensor in contents.tensors:
        kind = GGMLQuantizationType(tensor.type)
        writer.add_tensor_info(tensor.name, tensor.shape[::-1], np.dtype(np.float32), tensor.nbytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
