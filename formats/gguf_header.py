"""The header of a GGUF file, parsed from its mapping with every read bounds-checked.

Every count and length is checked against the bytes that are left before it is believed, so a hostile file
costs one FormatError and never an allocation much larger than itself. Source: ggml/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, UnsupportedError
from .types import GGMLType

MAX_DEPTH = 8  # arrays within arrays
MAX_DIMS = 4
MAX_NAME = 65535  # bytes of a key or of a tensor's name

# value type number -> (NumPy's name, little-endian scalar)
_SCALARS: dict[int, tuple[str, struct.Struct]] = {
    0: ("u1", struct.Struct("<B")),
    1: ("i1", struct.Struct("<b")),
    2: ("<u2", struct.Struct("<H")),
    3: ("<i2", struct.Struct("<h")),
    4: ("<u4", struct.Struct("<I")),
    5: ("<i4", struct.Struct("<i")),
    6: ("<f4", struct.Struct("<f")),
    10: ("<u8", struct.Struct("<Q")),
    11: ("<i8", struct.Struct("<q")),
    12: ("<f8", struct.Struct("<d")),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
# PowerInfer branched off when ggml's types from 16 on were these; those numbers mean others today.
_FIRST_MOVED = 16
_POWERINFER_TYPES = {16: GGMLType.I8, 17: GGMLType.I16, 18: GGMLType.I32}
_U32, _U64 = _SCALARS[4][1], _SCALARS[10][1]
_MIN_KV = 8 + 1 + 4 + 1  # key length, key, type, smallest value
_MIN_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, dims, one dim, type, offset
_MIN_VALUE = {_BOOL: 1, _STRING: 8, _ARRAY: 12} | {number: s.size for number, (_, s) in _SCALARS.items()}


def show(value: object, limit: int = 80) -> str:
    """A value as one short printable line, safe for a terminal whatever the file says."""
    if isinstance(value, list | np.ndarray):
        return f"[{len(value)} values]"
    if isinstance(value, str | bytes):
        value = value[:limit]  # escaping may make a string ten times longer: cut first
    text = ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's entry: shape in ggml order (shape[0] is the row), absolute file offset, bytes."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int

    @property
    def row_size(self) -> int:
        """Bytes of one row of shape[0] weights."""
        return self.shape[0] // self.type.block_size * self.type.type_size

    @property
    def n_rows(self) -> int:
        """Rows: the product of all dimensions but the first."""
        return self.nbytes // self.row_size


class Header:
    """One pass over the header; every method starts at `pos` and moves it."""

    powerinfer: bool  # magic PWRI

    def __init__(self, path: Path, buf: mmap.mmap) -> None:
        self.path, self.buf, self.size, self.pos = path, buf, len(buf), 0
        self.version = self._version()
        n_tensors = self._unpack(_U64, "tensor count")
        n_kv = self._unpack(_U64, "metadata count")
        self._fits(n_kv, _MIN_KV, "metadata count")
        self._fits(n_tensors, _MIN_TENSOR, "tensor count")
        self.metadata = self._metadata(n_kv)
        self.alignment = self._alignment()
        entries = [self._tensor(i) for i in range(n_tensors)]
        self.data_offset = -(-self.pos // self.alignment) * self.alignment
        self.tensors = self._place(entries)

    def error(self, field: str, got: object, wanted: object) -> FormatError:
        return FormatError(self.path, field, got, wanted)

    def _version(self) -> int:
        magic = self.buf[:4]
        if magic not in (b"GGUF", b"PWRI"):
            raise self.error("magic", show(magic), "b'GGUF'")
        self.powerinfer = magic == b"PWRI"
        self.pos = 4
        version: int = self._unpack(_U32, "version")
        if version and version & 0xFFFF == 0:
            raise UnsupportedError(f"{self.path}: a big-endian GGUF file is not supported; convert it")
        if version not in (2, 3):
            raise UnsupportedError(f"{self.path}: GGUF version {version} is not supported; 2 and 3 are")
        return version

    def _fits(self, count: int, each: int, field: str) -> None:
        left = self.size - self.pos
        if count * each > left:
            raise self.error(field, count, f"at most {left // each} in the {left} bytes left")

    def _unpack(self, form: struct.Struct, field: str) -> Any:
        if self.pos + form.size > self.size:
            wanted = f"{form.size} bytes at byte {self.pos}"
            raise self.error(field, f"end of file at byte {self.size}", wanted)
        (value,) = form.unpack_from(self.buf, self.pos)
        self.pos += form.size
        return value

    def _string(self, field: str) -> str:
        length = self._unpack(_U64, field)
        self._fits(length, 1, f"{field}: length")
        raw = self.buf[self.pos : self.pos + length]
        self.pos += length
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._bad_utf8(field, error) from None

    def _bad_utf8(self, field: str, error: UnicodeDecodeError) -> FormatError:
        bad = error.object[error.start : error.start + 8]
        return self.error(field, f"{show(bad)} at byte {error.start} of the string", "UTF-8")

    def _name(self, field: str) -> str:
        start = self.pos
        name = self._string(field)
        if not 0 < self.pos - start - 8 <= MAX_NAME:
            raise self.error(field, f"{self.pos - start - 8} bytes", f"1 to {MAX_NAME} bytes")
        if "\0" in name:
            raise self.error(field, show(name), "a name without NUL")
        return name

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for i in range(count):
            key = self._name(f"metadata key {i}")
            if key in metadata:
                raise self.error(f"metadata key {i}", f"{show(key)} a second time", "unique keys")
            field = f"key {show(key)}"
            metadata[key] = self._value(self._unpack(_U32, field), field, 0)
        return metadata

    def _value(self, kind: int, field: str, depth: int) -> Any:
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind][1], field)
        if kind == _STRING:
            return self._string(field)
        if kind == _BOOL:
            value = self._unpack(_SCALARS[0][1], field)
            if value > 1:
                raise self.error(field, f"{value} as a bool", "0 or 1")
            return bool(value)
        if kind == _ARRAY:
            return self._array(field, depth + 1)
        raise self.error(field, f"value type {kind}", "a type from 0 to 12")

    def _array(self, field: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self.error(field, f"arrays nested more than {MAX_DEPTH} deep", f"at most {MAX_DEPTH}")
        kind = self._unpack(_U32, field)
        count = self._unpack(_U64, f"{field}: array length")
        if kind not in _MIN_VALUE:
            raise self.error(field, f"array of value type {kind}", "a type from 0 to 12")
        self._fits(count, _MIN_VALUE[kind], f"{field}: array length")
        if kind == _STRING:
            return self._strings(count, field)
        if kind == _ARRAY:
            return [self._array(field, depth + 1) for _ in range(count)]
        return self._numbers(kind, count, field)

    def _numbers(self, kind: int, count: int, field: str) -> NDArray[Any]:
        dtype = "u1" if kind == _BOOL else _SCALARS[kind][0]
        end = self.pos + count * _MIN_VALUE[kind]
        values = np.frombuffer(self.buf[self.pos : end], dtype)
        self.pos = end
        if kind == _BOOL:
            if count and values.max() > 1:
                raise self.error(field, f"{values.max()} as a bool", "0 or 1")
            values = values.view(np.bool_)
        return values

    def _strings(self, count: int, field: str) -> list[str]:
        # A vocabulary and its merges are 10^5 strings: locals only, one slice and one decode each.
        buf, size, pos, unpack = self.buf, self.size, self.pos, _U64.unpack_from
        strings: list[str] = []
        append = strings.append
        try:
            for _ in range(count):
                start = pos + 8
                pos = start + unpack(buf, pos)[0]
                if pos > size:
                    item, left = f"{field}[{len(strings)}]: length", size - start
                    raise self.error(item, pos - start, f"at most the {left} bytes left")
                append(buf[start:pos].decode())
        except struct.error:
            raise self.error(f"{field}[{len(strings)}]", "end of file", f"{count} strings") from None
        except UnicodeDecodeError as error:
            raise self._bad_utf8(f"{field}[{len(strings)}]", error) from None
        self.pos = pos
        return strings

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", 32)
        if type(value) is not int or value <= 0 or value & (value - 1):
            raise self.error("key 'general.alignment'", show(value), "a power of two")
        return value

    def _tensor(self, index: int) -> TensorInfo:
        """One entry; the offset is still relative to the data section."""
        name = self._name(f"name of tensor {index}")
        field = f"tensor {show(name)}"
        n_dims = self._unpack(_U32, f"{field}: dimensions")
        if not 1 <= n_dims <= MAX_DIMS:
            raise self.error(f"{field}: dimensions", n_dims, f"1 to {MAX_DIMS}")
        shape = tuple(self._unpack(_U64, f"{field}: shape") for _ in range(n_dims))
        n_weights = 1
        for dim in shape:
            n_weights *= dim
        if not 0 < n_weights < 2**63:
            raise self.error(f"{field}: shape", shape, "dimensions >= 1 with a product below 2**63")
        number = written = self._unpack(_U32, f"{field}: type")
        offset = self._unpack(_U64, f"{field}: offset")
        if self.powerinfer and number >= _FIRST_MOVED:
            number = _POWERINFER_TYPES.get(number, -1)
        try:
            kind = GGMLType(number)
        except ValueError:
            raise UnsupportedError(f"{self.path}: {field}: unknown tensor type {written}") from None
        if shape[0] % kind.block_size:
            wanted = f"a multiple of {kind.block_size} for {kind.name}"
            raise self.error(f"{field}: row length", shape[0], wanted)
        return TensorInfo(name, shape, kind, offset, n_weights // kind.block_size * kind.type_size)

    def _place(self, entries: list[TensorInfo]) -> dict[str, TensorInfo]:
        """Entries with absolute offsets, by name; aligned, inside the file, none overlapping another."""
        tensors: dict[str, TensorInfo] = {}
        for info in entries:
            field = f"tensor {show(info.name)}"
            if info.name in tensors:
                raise self.error(field, "the name a second time", "unique names")
            if info.offset % self.alignment:
                raise self.error(f"{field}: offset", info.offset, f"a multiple of {self.alignment}")
            start = self.data_offset + info.offset
            if start + info.nbytes > self.size:
                wanted = f"within the file's {self.size} bytes (is it truncated?)"
                raise self.error(f"{field}: end", f"byte {start + info.nbytes}", wanted)
            tensors[info.name] = TensorInfo(info.name, info.shape, info.type, start, info.nbytes)
        end, before = 0, ""
        for info in sorted(tensors.values(), key=lambda info: info.offset):
            if info.offset < end:
                got = f"byte {info.offset}, inside {show(before)}"
                raise self.error(f"tensor {show(info.name)}: offset", got, f"byte {end} or later")
            end, before = info.offset + info.nbytes, info.name
        return tensors
