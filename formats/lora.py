"""LoRA adapters as llama.cpp's converter writes them: what is added to matrices, as products of thin ones.

A relufy adapter is one that also changes the activation, and adds a matrix that the model does not have: the bypass.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, UnsupportedError
from .gguf import GGUFFile, TensorInfo
from .gguf_header import show

_A, _B = ".lora_a", ".lora_b"
BYPASS = "ffn_bypass.weight"  # of a block: n_embd to n_embd, beside the neurons; a model without it has zeros there
ACTIVATION, FLOORS = "hidden_activation", "hidden_activation_threshold"  # keys, after the architecture's name
NORM_HASH = "hotcold.base.norm_hash"


@dataclass(frozen=True)
class Factors:
    """What is added to a matrix [n_out, n_in] is b @ a: a float32 [rank, n_in], b float32 [n_out, rank]."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]


class Adapter:
    """An open adapter file, its metadata and shapes checked.

    arch: of the models that it is for. alpha: 0 where the file has none. ranks: by the name of the matrix adapted.
    activation: what a relufy adapter makes of the model's, None of an ordinary one; floors: below which an activated
    gate counts as 0, by layer, None where the file has none. FormatError for a file that is broken or no adapter,
    UnsupportedError for one of another kind.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = GGUFFile(path)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        file = self.file
        for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
            if (got := file.get(key, None)) != wanted:
                raise FormatError(file.path, f"key '{key}'", show(got), f"'{wanted}', as LoRA adapters have it")
        if "adapter.alora.invocation_tokens" in file.metadata:
            raise UnsupportedError(f"{file.path}: an adapter that waits for invocation tokens (aLoRA) is not supported")
        arch = file.get("general.architecture", None, str)
        if arch is None:
            raise FormatError(file.path, "key 'general.architecture'", "no such key", "the name of an architecture")
        self.arch: str = arch
        self.alpha: float = file.get("adapter.lora.alpha", 0.0, float)
        if not math.isfinite(self.alpha):
            raise FormatError(file.path, "key 'adapter.lora.alpha'", self.alpha, "a finite number")
        self._read_activation()
        self.ranks: dict[str, int] = {}
        for name in file.tensors:
            if not name.endswith((_A, _B)):
                raise UnsupportedError(f"{file.path}: tensor {show(name)} is no {_A} or {_B} of a matrix")
            matrix = name[: -len(_A)]
            if matrix not in self.ranks:
                a, b = self._half(matrix + _A), self._half(matrix + _B)
                if a.shape[1] != b.shape[0]:
                    wanted = f"ranks that agree, {_B} has shape {b.shape}"
                    raise FormatError(file.path, f"tensor {show(matrix + _A)}", f"shape {a.shape}", wanted)
                self.ranks[matrix] = a.shape[1]
        if not self.ranks:
            raise FormatError(file.path, "tensors", 0, "at least one pair of factors")

    def _read_activation(self) -> None:
        file, key = self.file, f"{self.arch}.{FLOORS}"
        self.activation: str | None = file.get(f"{self.arch}.{ACTIVATION}", None, str)
        self.norm_hash: str | None = file.get(NORM_HASH, None, str)
        self.floors: tuple[float, ...] | None = None
        if self.activation not in (None, "relu"):
            what = f"key '{self.arch}.{ACTIVATION}' = {show(self.activation)}"
            raise UnsupportedError(f"{file.path}: {what} is not supported in an adapter, only 'relu'")
        if (values := file.get(key, None, np.ndarray)) is not None:
            if self.activation is None:
                raise FormatError(file.path, f"key '{key}'", "one", f"none without a key '{self.arch}.{ACTIVATION}'")
            self.floors = tuple(map(float, values))
            if not all(0 <= floor <= 1e6 for floor in self.floors):
                got = show(str(list(self.floors)), 40)
                raise FormatError(file.path, f"key '{key}'", got, "numbers from 0 to 1e+06")

    def _half(self, name: str) -> TensorInfo:
        info = self.file.tensors.get(name)
        if info is None or len(info.shape) != 2:
            got = "no such tensor" if info is None else f"shape {info.shape}"
            raise FormatError(self.file.path, f"tensor {show(name)}", got, "a matrix")
        return info

    def check(self, model: GGUFFile) -> None:
        """That it is for this model: FormatError where it is not."""
        path, arch = self.file.path, model.get("general.architecture", None)
        if arch != self.arch:
            raise FormatError(path, "key 'general.architecture'", show(self.arch), f"{show(arch)}, as the model has it")
        n_layer = model.get(f"{arch}.block_count", 0, int)
        if self.floors is not None and len(self.floors) != n_layer:
            key = f"key '{arch}.{FLOORS}'"
            raise FormatError(path, key, f"{len(self.floors)} numbers", f"{n_layer}, one for each layer of the model")
        bypasses = [f"blk.{layer}.{BYPASS}" for layer in range(n_layer)] if self.activation else []
        new = set(bypasses) - set(model.tensors)
        n_embd = model.get(f"{arch}.embedding_length", 0, int)
        for name in self.ranks:
            whole = model.tensors.get(name)
            if name not in new and (whole is None or len(whole.shape) < 2):
                wanted = "the name of one of the model's matrices"
                raise FormatError(path, f"tensor {show(name + _A)}", "none of that name", wanted)
            shape = self._half(name + _A).shape[0], self._half(name + _B).shape[1]
            expected = whole.shape[:2] if whole else (n_embd, n_embd)
            if shape != expected:
                wanted = f"{expected[0]} to {expected[1]}, as the model's {'matrix' if whole else 'n_embd'}"
                raise FormatError(path, f"tensor {show(name)}", f"factors from {shape[0]} to {shape[1]}", wanted)
        missing = [name for name in bypasses if name not in self.ranks]
        if missing and len(missing) < n_layer:
            raise FormatError(path, f"tensor {show(missing[0] + _A)}", "none", "one, as other layers have it")
        if self.norm_hash is not None and self.norm_hash != norm_hash(model):
            base = self.file.get("general.base_model.0.name", "another model")
            got = f"{model.path}, whose norms are others"
            raise FormatError(
                path, f"key '{NORM_HASH}'", got, f"the model that it was made for, {show(base)}, in any type"
            )

    def scale(self, wanted: float, name: str) -> float:
        """What b @ a is multiplied by for a wanted scale: alpha over the rank, where there is an alpha, makes it 1."""
        return wanted * self.alpha / self.ranks[name] if self.alpha else wanted

    def factors(self, name: str) -> Factors:
        """The factors of a matrix; FormatError where they are not finite."""
        found = []
        for half in (name + _A, name + _B):
            values = self.file.dequantized(half)
            if not np.isfinite(values).all():
                raise FormatError(self.file.path, f"tensor {show(half)}", "NaN or infinite values", "finite ones")
            found.append(values)
        return Factors(*found)

    def close(self) -> None:
        """Let the file go."""
        self.file.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def norm_hash(model: GGUFFile) -> str:
    """SHA-256, in hex, of the norms' names and values: what tells a model from its like, whatever its matrices' types.

    Norms stay F32 when matrices are quantised, and two trainings do not end with the same ones.
    """
    digest = hashlib.sha256()
    for name in sorted(model.tensors):
        if name.endswith("_norm.weight") and len(model.tensors[name].shape) == 1:
            digest.update(f"{name}\n".encode() + model.dequantized(name).astype("<f4").tobytes())
    return digest.hexdigest()
