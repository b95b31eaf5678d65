"""A GGUF file again with other tensor data: metadata byte for byte, tensors in their order, one in memory at a time."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .gguf import GGUFFile
from .gguf_header import Header
from .section_file import replacing
from .types import GGMLType

VERSION = 3
_U32, _I32, _STRING, _ARRAY = 4, 5, 8, 9

Data = Callable[[str], Iterable[Any]]  # a tensor's bytes, in pieces


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
    changed: Mapping[str, int | str | list[str]],
    dropped: Iterable[str] = (),
) -> None:
    """Write `out`: the source with tensors of other types, which `data` gives by name, and some keys changed or added.

    Integers become u32 (i32 below zero). A failed or interrupted run leaves nothing behind. Raises StorageError.
    """
    with replacing(out, "make room, or name another file") as part, open(part, "wb") as file:
        entries = _entries(source.path)
        for key in dropped:
            entries.pop(key, None)
        for key, value in changed.items():
            entries[key] = _entry(key, value)
        file.write(b"GGUF" + struct.pack("<IQQ", VERSION, len(source.tensors), len(entries)))
        file.writelines(entries.values())
        end = 0
        for name, info in source.tensors.items():
            kind = types[name]
            dims = len(info.shape)
            file.write(_string(name) + struct.pack(f"<I{dims}QIQ", dims, *info.shape, kind, end))
            end += _padded(info.n_rows * info.shape[0] // kind.block_size * kind.type_size, source.alignment)
        _pad(file, source.alignment)
        for name in source.tensors:
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


def _entry(key: str, value: int | str | list[str]) -> bytes:
    head = _string(key)
    if isinstance(value, str):
        return head + struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, int):
        return head + (struct.pack("<II", _U32, value) if value >= 0 else struct.pack("<Ii", _I32, value))
    return head + struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))
