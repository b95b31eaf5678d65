"""A GGUF file again with other tensor data: metadata byte for byte, tensors in their order, one in memory at a time."""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .gguf import GGUFFile
from .gguf_header import Header
from .section_file import replacing
from .types import GGMLType

VERSION = 3
_U32, _I32, _F32, _STRING, _ARRAY, _U64 = 4, 5, 6, 8, 9, 10

Data = Callable[[str], Iterable[Any]]  # a tensor's bytes, in pieces
Value = int | float | str | Sequence[str] | Sequence[float]


class _Spans(Header):
    """A header that remembers where each key's entry lies in the file."""

    spans: dict[str, tuple[int, int]]

    def _metadata(self, count: int) -> dict[str, Any]:
        self.spans, metadata = {}, dict[str, Any]()
        for i in range(count):
            start = self.pos
            key = self._name(f"metadata key {i}")
            metadata[key] = self._value(self._unpack(struct.Struct("<I"), key), key, 0)
            self.spans[key] = start, self.pos
        return metadata


def rewrite(
    source: GGUFFile,
    out: Path,
    types: Mapping[str, GGMLType],
    data: Data,
    changed: Mapping[str, Value],
    dropped: Iterable[str] = (),
    added: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Write `out`: the source with tensors of other types, which `data` gives by name, and some keys changed or added.

    Integers become u32 (i32 below zero, u64 where large), floats f32. added: shapes of tensors that the source lacks. A
    failed or interrupted run leaves nothing behind. Raises StorageError.
    """
    with replacing(out, "make room, or name another file") as part, open(part, "wb") as file:
        entries = _entries(source.path)
        for key in dropped:
            entries.pop(key, None)
        for key, value in changed.items():
            entries[key] = _entry(key, value)
        shapes = {name: info.shape for name, info in source.tensors.items()} | dict(added or {})
        file.write(b"GGUF" + struct.pack("<IQQ", VERSION, len(shapes), len(entries)))
        file.writelines(entries.values())
        end = 0
        for name, shape in shapes.items():
            kind = types[name]
            file.write(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, end))
            end += _padded(math.prod(shape) // kind.block_size * kind.type_size, source.alignment)
        _pad(file, source.alignment)
        for name in shapes:
            for piece in data(name):
                file.write(piece)
            _pad(file, source.alignment)
        file.flush()
        os.fsync(file.fileno())


def _entries(path: Path) -> dict[str, bytes]:
    """The metadata's entries as they lie in the file, by key."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        return {key: mapping[start:end] for key, (start, end) in _Spans(path, mapping).spans.items()}


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _entry(key: str, value: Value) -> bytes:
    head = _string(key)
    if isinstance(value, str):
        return head + struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, int):
        if value >= 2**32:
            return head + struct.pack("<IQ", _U64, value)
        return head + (struct.pack("<II", _U32, value) if value >= 0 else struct.pack("<Ii", _I32, value))
    if isinstance(value, float):
        return head + struct.pack("<If", _F32, value)
    kind = _STRING if all(isinstance(item, str) for item in value) else _F32
    items = (_string(item) if isinstance(item, str) else struct.pack("<f", item) for item in value)
    return head + struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(items)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))
