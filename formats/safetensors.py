"""Hugging Face weights: safetensors files, one or many, memory-mapped and checked before anything is believed.

A file is a u64 (the header's length), a JSON object (name -> dtype, shape, data_offsets) and the tensors' bytes, row by
row, little endian. Source: github.com/huggingface/safetensors, README and src/tensor.rs.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, ModelNotFoundError, UnsupportedError
from .gguf_header import show
from .hf_vocabulary import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the format's own limit
_MAX_DIMS = 8
# dtype -> NumPy's; bfloat16, which NumPy has not, is kept as its bits
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
_DTYPES |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "I8": "i1", "U8": "u1", "BOOL": "u1"}
_DTYPES |= {"F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1"}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Weight:
    """One tensor of a file: its shape in NumPy's order (rows first), where its bytes begin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    file: SafetensorsFile

    def raw(self) -> NDArray[Any]:
        """The tensor as it is stored: a read-only view of the mapping, bfloat16 as its bits (uint16)."""
        return self.file.view(self).view(_DTYPES[self.dtype]).reshape(self.shape)


class SafetensorsFile:
    """One mapped file; `weights` by name. FormatError names the file and what is wrong in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelNotFoundError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise FormatError(path, "file", getattr(error, "strerror", None) or error, "a safetensors file") from None
        try:
            self.weights = self._read()
        except BaseException:
            self.close()
            raise

    def view(self, weight: Weight) -> NDArray[np.uint8]:
        """A tensor's bytes."""
        assert self._map is not None, "closed"
        return np.frombuffer(self._map, np.uint8, weight.nbytes, weight.start)

    def release(self, weight: Weight) -> None:
        """Let the system take a tensor's pages back: it was read, and is not needed soon."""
        first = weight.start // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, weight.start + weight.nbytes - first)

    def close(self) -> None:
        """Let the mapping go: at once, or with the last array that was made of it."""
        mapping, self._map = self._map, None
        if mapping is not None:
            try:
                mapping.close()
            except BufferError:
                pass

    def _read(self) -> dict[str, Weight]:
        assert self._map is not None
        size = len(self._map)
        if self._map[:19] == b"version https://git":
            what = "a pointer of Git LFS", "the weights themselves; `git lfs pull` fetches them"
            raise FormatError(self.path, "contents", *what)
        length = int.from_bytes(self._map[:8], "little") if size >= 8 else size
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise FormatError(self.path, "header length", length, f"2 to {max(2, min(size - 8, MAX_HEADER))} bytes")
        header = parse_json(self._map[8 : 8 + length], self.path, "header")
        header.pop("__metadata__", None)
        found = {name: self._weight(name, entry, 8 + length, size) for name, entry in header.items()}
        end = 8 + length
        for weight in sorted(found.values(), key=lambda weight: (weight.start, weight.nbytes)):
            if weight.start < end and weight.nbytes:
                wanted = f"one that starts at byte {end} or later, after the one before it"
                raise FormatError(self.path, f"tensor {show(weight.name)}", f"its data at byte {weight.start}", wanted)
            end = max(end, weight.start + weight.nbytes)
        return found

    def _weight(self, name: str, entry: Any, base: int, size: int) -> Weight:
        def error(got: object, wanted: str) -> FormatError:
            return FormatError(self.path, f"tensor {show(name)}", got, wanted)

        if not isinstance(entry, dict):
            raise error(show(entry), "dtype, shape and data_offsets")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise error(f"dtype {show(dtype)}", f"one of {', '.join(_DTYPES)}")
        if not _naturals(shape) or len(shape) > _MAX_DIMS:
            raise error(f"shape {show(shape)}", f"up to {_MAX_DIMS} sizes")
        if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise error(f"data_offsets {show(offsets)}", "where its bytes begin and end")
        nbytes = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        if offsets[1] - offsets[0] != nbytes:
            raise error(f"{offsets[1] - offsets[0]} bytes", f"{nbytes} for {dtype} of shape {show(tuple(shape))}")
        if base + offsets[1] > size:
            raise error(f"a file of {size} bytes", f"{base + offsets[1]}: it is cut off, download it again")
        return Weight(name, dtype, tuple(shape), base + offsets[0], nbytes, self)


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**60 for item in value)


def parse_json(text: bytes, path: Path, field: str) -> dict[str, Any]:
    """A JSON object without repeated names; FormatError where it is none."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise ValueError("the same name twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        got = "text nested too deeply" if isinstance(error, RecursionError) else show(f"{error}", 120)
        raise FormatError(path, field, got, "a JSON object") from None
    if not isinstance(value, dict):
        raise FormatError(path, field, show(value), "a JSON object")
    return value


class Weights:
    """All tensors of a checkpoint folder: model.safetensors, or the shards that its index names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[SafetensorsFile] = []
        self.tensors: dict[str, Weight] = {}
        names, where = _files(folder)
        try:
            for name in names:
                file = SafetensorsFile(folder / name)
                self.files.append(file)
                if twice := self.tensors.keys() & file.weights.keys():
                    wanted = f"it in one file only; {self.tensors[min(twice)].file.path.name} has it too"
                    raise FormatError(file.path, f"tensor {show(min(twice))}", "the same name again", wanted)
                self.tensors |= file.weights
            for tensor, name in where.items():
                if tensor not in self.tensors:
                    raise FormatError(folder / name, f"tensor {show(tensor)}", "no such tensor", f"it, as {INDEX} says")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let all mappings go."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the weights' files, and in which of them each tensor should be (nothing, if there is but one)."""
    if (folder / SINGLE).is_file():
        return [SINGLE], {}
    if not (folder / INDEX).is_file():
        raise _nothing(folder)
    index = read_json(folder / INDEX)
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise FormatError(folder / INDEX, "weight_map", show(where), "the name of a file for each tensor")
    names = sorted(set(where.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or ":" in name or not name.endswith(".safetensors"):
            raise FormatError(folder / INDEX, "weight_map", show(name), "the name of a safetensors file in its folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        listed = ", ".join(show(name) for name in missing)
        raise ModelNotFoundError(f"{folder}: {len(missing)} of {len(names)} shards are missing: {listed}")
    return names, where


def _nothing(folder: Path) -> Exception:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return ModelNotFoundError(f"{folder} cannot be read: {error.strerror or error}")
    shards = [name for name in names if name.endswith(".safetensors")]
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if shards:
        return ModelNotFoundError(f"{folder}: there is {show(shards[0])}, but neither {SINGLE} nor {INDEX}")
    if pickled:
        return UnsupportedError(
            f"{folder}: its weights are pickled ({show(pickled[0])}), and reading a pickle can run any code that"
            " somebody put in it; convert them to safetensors first (save_pretrained of transformers does)"
        )
    return ModelNotFoundError(f"{folder}: no weights there ({SINGLE}, or {INDEX} and its shards)")


def to_float32(raw: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored values, as `Weight.raw` gives them, as float32: exact from F32, F16 and BF16."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.astype(np.float32)


_EXPONENT = {"BF16": np.uint16(0x7F80), "F16": np.uint16(0x7C00)}  # all of its bits set: NaN or infinite


def finite(raw: NDArray[Any], dtype: str) -> bool:
    """Whether stored values are all finite, as float32 too."""
    if dtype in _EXPONENT:
        return not bool(((raw.view("<u2") & _EXPONENT[dtype]) == _EXPONENT[dtype]).any())
    with np.errstate(over="ignore"):
        return bool(np.isfinite(raw.astype(np.float32) if dtype == "F64" else raw).all())
