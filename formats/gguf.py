"""A memory-mapped GGUF file: versions 2 and 3, little endian; tensor data is never copied."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ClosedError, FormatError, ModelNotFoundError, StorageError, UnsupportedError
from .file_lock import share
from .gguf_header import Header, TensorInfo, show
from .pages import ask_for_large

__all__ = ["GGUFFile", "TensorInfo", "show"]

SPAN_ALIGNMENT = 65536  # what Windows asks of a mapping's offset; macOS asks for 16384, Linux for a page


class GGUFFile:
    """A GGUF file, its header read and its tensor data mapped.

    span: (offset, length) in bytes of an image inside a larger file, the offset a multiple of SPAN_ALIGNMENT; offsets
    then count from the image's first byte. While a span is mapped, its file is locked against `claim` (file_lock.py).
    Raises ModelNotFoundError (no such file, or not readable), FormatError (broken) and UnsupportedError (a
    version, byte order or tensor type that is not supported). Source: ggml/docs/gguf.md.
    """

    path: Path
    powerinfer: bool  # one of PowerInfer's own files (powerinfer.py)
    version: int
    alignment: int
    data_offset: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    rows: dict[str, TensorInfo]  # rows of fused tensors, under names of their own; set by ModelConfig.from_gguf

    def __init__(self, path: str | os.PathLike[str], span: tuple[int, int] | None = None) -> None:
        self.path = Path(path)
        mapping = _map_file(self.path, span)
        ask_for_large(mapping)  # before the first byte is read
        self._map: mmap.mmap | None = mapping
        self._bytes: NDArray[np.uint8] | None = None
        try:
            header = Header(self.path, mapping)
            self.powerinfer, self.version, self.alignment = header.powerinfer, header.version, header.alignment
            self.metadata, self.tensors = header.metadata, header.tensors
            self.data_offset, self.rows = header.data_offset, {}
            self._bytes = np.frombuffer(mapping, np.uint8)
        except BaseException:
            self.close()
            raise

    def data(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes: uint8 (nbytes,), a read-only view of the mapping that outlives close()."""
        mapped, info = self._mapped(), self.info(name)
        return mapped[info.offset : info.offset + info.nbytes]

    def address(self, name: str) -> int:
        """Memory address of the tensor's first byte; valid until close(), or while a data() view lives."""
        mapped, info = self._mapped(), self.info(name)
        return int(mapped.__array_interface__["data"][0]) + info.offset

    def release(self, name: str) -> None:
        """Let the memory go that holds the tensor's bytes; they are read from the file again when wanted."""
        info, mapping = self.info(name), self._map
        if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of its own
            length = (info.offset + info.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
            if length > 0:
                mapping.madvise(mmap.MADV_DONTNEED, start, length)

    def dequantized(self, name: str) -> NDArray[np.float32]:
        """A float32 copy in NumPy order (shape reversed), through gguf.quants: slow, for small tensors."""
        raw, info = self.data(name), self.info(name)
        if info.type.name in ("I8", "I16", "I32", "I64", "F64"):
            plain = f"<{info.type.name[0].lower()}{info.type.type_size}"
            return raw.view(plain).astype(np.float32).reshape(info.shape[::-1])
        from gguf import GGMLQuantizationType, quants

        try:
            kind = GGMLQuantizationType(info.type)
            values = quants.dequantize(raw.reshape(info.n_rows, info.row_size), kind)
        except (NotImplementedError, ValueError) as error:
            what = f"tensor {show(name)}: {info.type.name} cannot be decoded"
            raise UnsupportedError(f"{self.path}: {what}") from error
        return np.array(values, dtype=np.float32).reshape(info.shape[::-1])

    def get(self, key: str, default: Any = None, kind: type | None = None) -> Any:
        """The metadata value under key, or default; kind is int, float, bool, str, list or np.ndarray.

        A list is one of strings, an integer passes as a float; other types are a FormatError naming the key.
        """
        if key not in self.metadata:
            return default
        value: Any = self.metadata[key]
        if kind is None:
            return value
        if kind is float and type(value) is int:
            return float(value)
        fits = type(value) is kind  # exactly, as a bool is an int too
        if kind is list and isinstance(value, list):
            fits = not value or type(value[0]) is str  # an array of arrays is a list as well
        if not fits:
            got = f"{type(value).__name__} {show(value, 40)}"
            raise FormatError(self.path, f"key {show(key)}", got, kind.__name__)
        return value

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
            except BufferError:
                pass  # views live: the last of them frees the mapping, as nothing else refers to it

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GGUFFile({str(self.path)!r}, {len(self.tensors)} tensors, {len(self.metadata)} keys)"

    def _mapped(self) -> NDArray[np.uint8]:
        if self._bytes is None:
            raise ClosedError(f"{self.path} is closed")
        return self._bytes

    def __contains__(self, name: str) -> bool:
        return name in self.rows or name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """Shape, type, place and size of a tensor, or of rows of a fused one; FormatError if there is none."""
        info = self.rows.get(name) or self.tensors.get(name)
        if info is None:
            raise FormatError(self.path, f"tensor {show(name)}", "none", "a tensor of this name")
        return info


def _map_file(path: Path, span: tuple[int, int] | None) -> mmap.mmap:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ModelNotFoundError(f"{path} is a folder: name the .gguf file in it")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
            raise ModelNotFoundError(f"{path} is not a regular file: name a .gguf file")
        with open(path, "rb") as file:
            if span is not None and not share(file.fileno()):  # the mapping duplicates the descriptor, and so the lock
                raise StorageError(f"{path}: another process is changing it; try again")
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise FormatError(path, "file size", "0 bytes", "a GGUF file")
            if span is None:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            offset, length = span
            if offset % SPAN_ALIGNMENT or offset < 0 or length < 1 or offset + length > size:
                wanted = f"a span of its {size} bytes that starts at a multiple of {SPAN_ALIGNMENT}"
                raise FormatError(path, "image", f"{length} bytes at byte {offset}", wanted)
            return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=offset)
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelNotFoundError(f"{path} cannot be opened: {reason}") from None
