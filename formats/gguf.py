"""A memory-mapped, bounds-checked GGUF reader: versions 2 and 3, little endian.

Every count and length is checked against the bytes that are left before it is believed, so a hostile file costs
one FormatError and never an allocation larger than itself. Tensor data is never copied.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ClosedError, FormatError, ModelNotFoundError, UnsupportedError
from .types import GGMLType

MAX_DEPTH = 8  # arrays within arrays
MAX_DIMS = 4
MAX_NAME = 65535  # bytes of a key or of a tensor's name

# value type number -> (name, little-endian scalar)
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
_U32, _U64 = _SCALARS[4][1], _SCALARS[10][1]
_MIN_KV = 8 + 1 + 4 + 1  # key length, key, type, smallest value
_MIN_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, dims, one dim, type, offset
_MIN_VALUE = {_BOOL: 1, _STRING: 8, _ARRAY: 12} | {number: s.size for number, (_, s) in _SCALARS.items()}

_KINDS: dict[type, tuple[type, ...]] = {int: (int,), float: (float, int), bool: (bool,), str: (str,)}


def show(value: object, limit: int = 80) -> str:
    """A value as one short printable line, safe for a terminal whatever the file says."""
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


class GGUFFile:
    """A GGUF file, its header read and its tensor data mapped.

    Raises ModelNotFoundError (no such file, or not readable), FormatError (broken), UnsupportedError (a version,
    byte order or tensor type that is not supported). Source: ggml/docs/gguf.md.
    """

    path: Path
    version: int
    alignment: int
    data_offset: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map: mmap.mmap | None = _map_file(self.path)
        self._bytes: NDArray[np.uint8] | None = None
        try:
            header = _Header(self.path, self._map)
            self.version, self.alignment = header.version, header.alignment
            self.metadata, self.tensors = header.metadata, header.tensors
            self.data_offset = header.data_offset
            self._bytes = np.frombuffer(self._map, np.uint8)
        except BaseException:
            self.close()
            raise

    def data(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes: uint8 (nbytes,), a read-only view of the mapping that outlives close()."""
        info = self._info(name)
        return self._open_bytes()[info.offset : info.offset + info.nbytes]

    def address(self, name: str) -> int:
        """Memory address of the tensor's first byte; valid until close(), or while a view from data() lives."""
        info = self._info(name)
        return int(self._open_bytes().__array_interface__["data"][0]) + info.offset

    def dequantized(self, name: str) -> NDArray[np.float32]:
        """A float32 copy in NumPy order (shape reversed), through gguf.quants: slow, for small tensors."""
        info = self._info(name)
        raw = self.data(name)
        if info.type.name in ("I8", "I16", "I32", "I64", "F64"):
            plain = f"<{info.type.name[0].lower()}{info.type.type_size}"
            return raw.view(plain).astype(np.float32).reshape(info.shape[::-1])
        from gguf import GGMLQuantizationType, quants

        try:
            kind = GGMLQuantizationType(info.type)
            values = quants.dequantize(raw.reshape(info.n_rows, info.row_size), kind)
        except (NotImplementedError, ValueError) as error:
            raise UnsupportedError(f"{self.path}: tensor {show(name)}: cannot decode {info.type.name}") from error
        return np.array(values, dtype=np.float32).reshape(info.shape[::-1])

    def get(self, key: str, default: Any = None, kind: type | None = None) -> Any:
        """The metadata value under key, or default; kind (int, float, bool, str, list, np.ndarray) is enforced.

        An integer passes as a float. A value of another type is a FormatError naming the key.
        """
        if key not in self.metadata:
            return default
        value = self.metadata[key]
        if kind is None:
            return value
        accepted = _KINDS.get(kind, (kind,))
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            got = f"{type(value).__name__} {show(value, 40)}"
            raise FormatError(self.path, f"key {show(key)}", got, kind.__name__)
        return float(value) if kind is float else value

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._bytes is None

    def close(self) -> None:
        """Let the mapping go: at once, or with the last view that data() gave out."""
        self._bytes = None
        mapping, self._map = self._map, None
        if mapping is not None:
            try:
                mapping.close()
            except BufferError:  # views live; the last of them frees the mapping, as nothing else refers to it
                pass

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GGUFFile({str(self.path)!r}, {len(self.tensors)} tensors, {len(self.metadata)} keys)"

    def _open_bytes(self) -> NDArray[np.uint8]:
        if self._bytes is None:
            raise ClosedError(f"{self.path} is closed")
        return self._bytes

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise FormatError(self.path, f"tensor {show(name)}", "none", "a tensor of this name")
        return info


def _map_file(path: Path) -> mmap.mmap:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ModelNotFoundError(f"{path} is a folder: name the .gguf file in it")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
            raise ModelNotFoundError(f"{path} is not a regular file: name a .gguf file")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FormatError(path, "file size", "0 bytes", "a GGUF file")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError, OverflowError) as error:
        raise ModelNotFoundError(f"{path} cannot be opened: {getattr(error, 'strerror', None) or error}") from None


class _Header:
    """One pass over the header; every method starts at `pos` and moves it."""

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
        magic = bytes(self.buf[:4])
        if magic == b"PWRI":
            raise UnsupportedError(f"{self.path}: a PowerInfer file (magic PWRI) is not supported; use a GGUF file")
        if magic != b"GGUF":
            raise self.error("magic", show(magic), "b'GGUF'")
        self.pos = 4
        version: int = self._unpack(_U32, "version")
        if version and version & 0xFFFF == 0:
            raise UnsupportedError(f"{self.path}: a big-endian GGUF file is not supported; convert it")
        if version not in (2, 3):
            raise UnsupportedError(f"{self.path}: GGUF version {version} is not supported; versions 2 and 3 are")
        return version

    def _fits(self, count: int, each: int, field: str) -> None:
        left = self.size - self.pos
        if count * each > left:
            raise self.error(field, count, f"at most {left // each} in the {left} bytes left")

    def _unpack(self, form: struct.Struct, field: str) -> Any:
        if self.pos + form.size > self.size:
            raise self.error(field, f"end of file at byte {self.size}", f"{form.size} bytes at byte {self.pos}")
        (value,) = form.unpack_from(self.buf, self.pos)
        self.pos += form.size
        return value

    def _string(self, field: str) -> str:
        length = self._unpack(_U64, field)
        self._fits(length, 1, f"{field}: length")
        raw = self.buf[self.pos : self.pos + length]
        self.pos += length
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(field, f"bad UTF-8 {show(raw[error.start : error.start + 8])}", "UTF-8") from None

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
                    length, left = pos - start, size - start
                    raise self.error(f"{field}[{len(strings)}]: length", length, f"at most the {left} bytes left")
                append(str(buf[start:pos], "utf-8"))
        except struct.error:
            raise self.error(f"{field}[{len(strings)}]", "end of file", f"{count} strings") from None
        except UnicodeDecodeError as error:
            bad = show(error.object[error.start : error.start + 8])
            raise self.error(f"{field}[{len(strings)}]", f"bad UTF-8 {bad}", "UTF-8") from None
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
            raise self.error(f"{field}: shape", shape, "dimensions of at least 1 whose product is below 2**63")
        number = self._unpack(_U32, f"{field}: type")
        offset = self._unpack(_U64, f"{field}: offset")
        try:
            kind = GGMLType(number)
        except ValueError:
            raise UnsupportedError(f"{self.path}: {field}: unknown tensor type {number}") from None
        if shape[0] % kind.block_size:
            raise self.error(f"{field}: row length", shape[0], f"a multiple of {kind.block_size} for {kind.name}")
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
                raise self.error(f"{field}: end", f"byte {start + info.nbytes}", f"within {self.size} bytes (truncated?)")
            tensors[info.name] = TensorInfo(info.name, info.shape, info.type, start, info.nbytes)
        end, before = 0, ""
        for info in sorted(tensors.values(), key=lambda info: info.offset):
            if info.offset < end:
                raise self.error(f"tensor {show(info.name)}: offset", f"{info.offset}, inside {show(before)}", f">= {end}")
            end, before = info.offset + info.nbytes, info.name
        return tensors
