"""A model file with its matrices in another type: tensor by tensor, memory near a piece of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..formats import imatrix, mixes
from ..formats.errors import FormatError, ParameterError, StorageError, UnsupportedError
from ..formats.gguf import GGUFFile, TensorInfo
from ..formats.gguf_header import show
from ..formats.gguf_rewrite import rewrite
from ..formats.pages import forget
from ..formats.section import has_section
from ..formats.section_file import silent
from ..formats.section_image import Progress
from ..formats.section_layout import sidecar_path
from ..formats.types import GGMLType
from ..runtime.encode import ENCODED, Encoder, NotFiniteError, row_bytes

_PIECE = 1 << 25  # weights encoded before they are written
_INTEGERS = ("I8", "I16", "I32", "I64")


@dataclass(frozen=True)
class Options:
    """As of llama-quantize: see `mixes.preferred`; allow_requantize: the source may be quantised already."""

    allow_requantize: bool = False
    pure: bool = False
    output: GGMLType | None = None
    embedding: GGMLType | None = None
    n_threads: int | None = None


@dataclass
class Report:
    """What was done. bytes: of all tensors; types: how many tensors became each; fallen: (tensor, wanted type, given).

    unweighted: tensors without an entry in the imatrix; section: the source has one, which is not carried over.
    """

    mix: mixes.Mix
    n_weights: int
    bytes_before: int
    bytes_after: int
    types: Counter[str]
    fallen: list[tuple[str, str, str]] = field(default_factory=list)
    unweighted: list[str] = field(default_factory=list)
    section: bool = False


def quantize(
    path: Path,
    out: Path,
    name: str,
    options: Options | None = None,
    importance: Path | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Write `out`: the model at `path` in the mix `name`; say gets a line while kernels are compiled.

    Raises ParameterError, UnsupportedError, FormatError (a tensor with NaN or infinity too) and StorageError; nothing
    is left under the final name then.
    """
    options = options or Options()
    mix = mixes.find(name)
    if out.resolve() == path.resolve():
        raise ParameterError(f"{out}: is the file to quantise; name another one to write")
    if (side := sidecar_path(out)).exists():
        raise StorageError(f"{side}: the section of an earlier {out.name}; delete it, or name another file to write")
    with GGUFFile(path) as file:
        _check_kind(file)
        matrix = imatrix.read(importance) if importance else None
        facts = mixes.Facts.of(file.metadata, file.tensors, matrix is not None)
        types, report = _plan(file, mix, facts, options)
        weights = _weights(file, types, matrix, report)
        with Encoder(options.n_threads, say) as encoder:
            writer = _Writer(file, types, weights, encoder, progress)
            rewrite(file, out, types, writer.data, _notes(mix, types, matrix))
    forget(out)
    return report


def _check_kind(file: GGUFFile) -> None:
    if file.powerinfer:
        raise UnsupportedError(f"{file.path}: is one of PowerInfer's files; `hotcold convert` makes it a GGUF first")
    if (kind := file.get("general.type", "model")) != "model":
        raise UnsupportedError(f"{file.path}: general.type is {show(kind)}; only models can be quantised")
    if not isinstance(file.get("general.architecture"), str):
        raise FormatError(file.path, "key 'general.architecture'", "no such key", "the name of an architecture")
    if not file.tensors:
        raise FormatError(file.path, "tensors", "none", "those of a model")
    if (parts := file.get("split.count", 0, int)) > 1:
        raise UnsupportedError(f"{file.path}: one of {parts} parts of a model; merge them first (llama-gguf-split)")


def _plan(file: GGUFFile, mix: mixes.Mix, facts: mixes.Facts, options: Options) -> tuple[dict[str, GGMLType], Report]:
    """The type of each tensor, and a report of what will come of it."""
    types: dict[str, GGMLType] = {}
    report = Report(mix, 0, 0, 0, Counter(), section=has_section(file))
    for name, info in file.tensors.items():
        k = info.shape[0]
        wanted = mixes.preferred(mix, name, info.shape, facts, options.pure, options.output, options.embedding)
        if wanted is None or info.type.name in _INTEGERS:
            wanted = kind = info.type
        else:
            kind = mixes.fitting(wanted, k)
        if kind != info.type and mixes.is_quantised(info.type) and not options.allow_requantize:
            raise ParameterError(
                f"{file.path}: tensor {show(name)} is {info.type.name} already, and quantising it again loses more "
                "than quantising the original; take that, or pass --allow-requantize"
            )
        types[name] = kind
        if kind not in (wanted, info.type):
            report.fallen.append((name, wanted.name, kind.name))
        report.n_weights += info.n_rows * k
        report.bytes_before += info.nbytes
        report.bytes_after += info.n_rows * row_bytes(kind.name, k)
        report.types[kind.name] += 1
    return types, report


def _weights(
    file: GGUFFile, types: dict[str, GGMLType], matrix: imatrix.Imatrix | None, report: Report
) -> dict[str, NDArray[np.float32]]:
    """By tensor, what its columns count: float32 [matrices, k]. FormatError where an entry is of another size."""
    found: dict[str, NDArray[np.float32]] = {}
    if matrix is None:
        return found
    for name, info in file.tensors.items():
        if types[name] == info.type or not mixes.is_quantised(types[name]):
            continue
        k = info.shape[0]
        values = matrix.of(name, k, max(1, info.n_rows // info.shape[1]))
        if values is None:
            report.unweighted.append(name)
        else:
            found[name] = values
    if report.unweighted and not found:
        raise FormatError(matrix.path, "entries", f"none for a tensor of {file.path.name}", "those of this model")
    return found


def _notes(
    mix: mixes.Mix, types: dict[str, GGMLType], matrix: imatrix.Imatrix | None
) -> dict[str, int | str | list[str]]:
    """What the metadata says of all this."""
    notes: dict[str, int | str | list[str]] = {"general.file_type": mix.file_type}
    if any(map(mixes.is_quantised, types.values())):
        notes["general.quantization_version"] = 2
    if matrix is not None:
        notes["quantize.imatrix.file"] = matrix.path.name
        notes["quantize.imatrix.entries_count"] = len(matrix.entries)
        notes["quantize.imatrix.chunks_count"] = matrix.chunks
        if matrix.datasets:
            notes["quantize.imatrix.dataset"] = matrix.datasets[0]
    return notes


class _Writer:
    """Gives tensors' bytes, a piece at a time."""

    def __init__(
        self,
        file: GGUFFile,
        types: dict[str, GGMLType],
        weights: dict[str, NDArray[np.float32]],
        encoder: Encoder,
        progress: Progress,
    ) -> None:
        self.file, self.types, self.weights, self.encoder, self.progress = file, types, weights, encoder, progress
        self.done, self.total = 0, sum(info.nbytes for info in file.tensors.values())

    def data(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """The tensor's bytes in its new type; the same bytes where that is its own."""
        info = self.file.tensors[name]
        try:
            yield from self._copied(info) if self.types[name] == info.type else self._encoded(info)
        except NotFiniteError as error:
            wanted = "finite ones that the type can hold"
            raise FormatError(self.file.path, f"tensor {show(name)}", str(error), wanted) from None
        self.file.release(name)

    def _copied(self, info: TensorInfo) -> Iterator[NDArray[np.uint8]]:
        if info.type.name in ENCODED:
            self.encoder.check(info.type.name, self.file.address(info.name), info.n_rows, info.shape[0])
        data = self.file.data(info.name)
        for first in range(0, data.size, _PIECE):
            piece = data[first : first + _PIECE]
            yield piece
            self._advance(piece.size)

    def _encoded(self, info: TensorInfo) -> Iterator[NDArray[np.uint8]]:
        kind, k = self.types[info.name].name, info.shape[0]
        source, address, each = info.type.name, self.file.address(info.name), info.row_size
        if source not in ENCODED:  # decoded as a whole, and slowly, but they are rare
            floats = self.file.dequantized(info.name)
            source, address, each = "F32", floats.ctypes.data, k * 4
        importance = self.weights.get(info.name)
        matrices = 1 if importance is None else len(importance)
        rows, step = info.n_rows // matrices, max(1, _PIECE // k)
        for i in range(matrices):
            for first in range(i * rows, (i + 1) * rows, step):
                n = min(step, (i + 1) * rows - first)
                piece = np.empty((n, row_bytes(kind, k)), np.uint8)
                self.encoder.convert(
                    source,
                    address + first * each,
                    kind,
                    piece.ctypes.data,
                    n,
                    k,
                    None if importance is None else importance[i],
                )
                yield piece.reshape(-1)
                self._advance(n * info.row_size)

    def _advance(self, size: int) -> None:
        self.done += size
        self.progress("quantising", self.done, self.total)
