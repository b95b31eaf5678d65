"""Importance matrices: how large what meets each column of a matrix was, as llama-imatrix writes it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, ModelNotFoundError
from .gguf import GGUFFile
from .gguf_header import show

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    """entries: by tensor, mean squares float32 [matrices, k] (one matrix, or one an expert), finite, none negative."""

    path: Path
    entries: dict[str, NDArray[np.float32]]
    chunks: int
    datasets: list[str]

    def of(self, name: str, k: int, matrices: int) -> NDArray[np.float32] | None:
        """The importance of a tensor's columns, float32 [matrices, k]; None if it has no entry.

        FormatError where the entry is of another size.
        """
        found = self.entries.get(name)
        if found is None:
            return None
        if found.size == k:
            return np.broadcast_to(found.reshape(1, k), (matrices, k))
        if found.size != k * matrices:
            got, wanted = f"{found.size} values", f"{k * matrices}, as the model's tensor has"
            raise FormatError(self.path, f"entry {show(name)}", got, wanted)
        return found.reshape(matrices, k)


def read(path: Path) -> Imatrix:
    """Read a GGUF imatrix or the older .dat; FormatError for what is neither, or broken."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be opened: {error.strerror}") from None
    return _read_gguf(path) if magic == b"GGUF" else _read_old(path)


def _checked(path: Path, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(values).all() or (values < 0).any():
        raise FormatError(path, f"entry {show(name)}", "NaN, infinite or negative values", "sums of squares")
    return values


def _read_gguf(path: Path) -> Imatrix:
    with GGUFFile(path) as file:
        if (kind := file.get("general.type", None)) != "imatrix":
            raise FormatError(path, "key 'general.type'", show(kind), "'imatrix'")

        def values(name: str) -> NDArray[np.float32]:
            info = file.tensors.get(name)
            if info is None or info.type.name != "F32":
                got = "no such tensor" if info is None else info.type.name
                raise FormatError(path, f"tensor {show(name)}", got, "an F32 tensor")
            return file.data(name).view("<f4").astype(np.float32)

        entries = {}
        for full in file.tensors:
            if not full.endswith(_SUMS):
                continue
            name = full.removesuffix(_SUMS)
            counts, sums = values(name + _COUNTS), values(full)
            if sums.size % counts.size or not np.isfinite(counts).all():
                raise FormatError(path, f"entry {show(name)}", f"{sums.size} sums, {counts.size} counts", "k for each")
            rows, counts = sums.reshape(counts.size, -1), counts.reshape(-1, 1)
            # An expert that no token went to says nothing of its columns: all count alike.
            means = np.where(counts > 0, rows / np.maximum(counts, 1e-30), 1.0)
            entries[name] = _checked(path, name, means.astype(np.float32))
        datasets = file.get("imatrix.datasets", [], list)
        return Imatrix(path, _some(path, entries), file.get("imatrix.chunk_count", 0, int), list(datasets))


def _read_old(path: Path) -> Imatrix:
    """int32 count; for each entry: int32 length, name, int32 calls, int32 values, float32 sums; chunks, data set."""
    raw = path.read_bytes()
    at = 0

    def take(size: int, what: str) -> bytes:
        nonlocal at
        if not 0 <= size <= len(raw) - at:
            raise FormatError(path, what, f"{len(raw) - at} bytes left", f"{size} bytes; an imatrix (GGUF or .dat)")
        at += size
        return raw[at - size : at]

    def integer(what: str) -> int:
        (value,) = struct.unpack("<i", take(4, what))
        return int(value)

    def text(what: str) -> str:
        return take(integer(f"length of {what}"), what).decode("utf-8", "replace")

    entries = {}
    for i in range(integer("number of entries")):
        name = text(f"name of entry {i}")
        calls, size = integer(f"calls of entry {i}"), integer(f"size of entry {i}")
        if size < 1:
            raise FormatError(path, f"entry {show(name)}", f"{size} values", "at least 1")
        sums = np.frombuffer(take(4 * size, f"entry {show(name)}"), "<f4")
        entries[name] = _checked(path, name, (sums / max(calls, 1)).astype(np.float32).reshape(1, -1))
    chunks = integer("number of chunks") if at < len(raw) else 0
    datasets = [text("name of the data set")] if at < len(raw) else []
    return Imatrix(path, _some(path, entries), chunks, datasets)


def _some(path: Path, entries: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    if not entries:
        raise FormatError(path, "entries", 0, "at least one; an imatrix (GGUF or .dat)")
    return entries
