"""Where the engine's tensors come from: the model file, its section, or arrays made at load."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..formats.gguf import GGUFFile, TensorInfo
from ..formats.types import GGMLType


@dataclass(frozen=True)
class _Made:
    info: TensorInfo
    data: np.ndarray


class Tensors:
    """Tensors by name, looked for in the made ones, then file by file."""

    def __init__(self, *files: GGUFFile) -> None:
        self.files = files
        self._made: dict[str, _Made] = {}
        self._bands: dict[str, np.ndarray] = {}

    def add(self, name: str, shape: tuple[int, ...], kind: GGMLType, data: np.ndarray) -> None:
        """Add a tensor that is in no file: shape in ggml order, data uint8 (bytes,)."""
        self._made[name] = _Made(TensorInfo(name, shape, kind, 0, data.nbytes), data)

    def drop(self, name: str) -> None:
        """Forget an added tensor."""
        del self._made[name]

    def add_bands(self, name: str, data: np.ndarray) -> None:
        """Add a copy of a matrix in bands (cpu/weave.py), uint8 (bytes,)."""
        self._bands[name] = data

    def bands(self, name: str) -> int | None:
        """Memory address of a matrix' bands, None where it has none."""
        return int(self._bands[name].ctypes.data) if name in self._bands else None

    def made(self, name: str) -> bool:
        """Whether a tensor is in no file."""
        return name in self._made

    def __contains__(self, name: str) -> bool:
        return name in self._made or any(name in file for file in self.files)

    def info(self, name: str) -> TensorInfo:
        """Shape, type and size."""
        return self._made[name].info if name in self._made else self._file(name).info(name)

    def address(self, name: str) -> int:
        """Memory address of the first byte."""
        return int(self._made[name].data.ctypes.data) if name in self._made else self._file(name).address(name)

    def data(self, name: str) -> np.ndarray:
        """The bytes, uint8; read-only if mapped."""
        return self._made[name].data if name in self._made else self._file(name).data(name)

    def release(self, name: str) -> None:
        """Let the memory go that holds a mapped tensor's bytes; they are read from the file again when wanted."""
        if name not in self._made:
            self._file(name).release(name)

    def dequantized(self, name: str) -> np.ndarray:
        """A float32 copy in NumPy order; of tensors made at load, only plain float32 ones."""
        if name in self._made:
            return self._made[name].data.view(np.float32)
        return self._file(name).dequantized(name)

    def source(self, name: str) -> str:
        """The file that a tensor is in, for messages."""
        return "made at load" if name in self._made else str(self._file(name).path)

    def _file(self, name: str) -> GGUFFile:
        return next((file for file in self.files if name in file), self.files[0])
