"""Adapters merged into a model: a file of its own, whose matrices are the model's and what adapters add to them.

Here, as encoding takes the compiled kernels, and as an engine merges by itself what cannot run beside the matrices.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats import mixes
from ..formats.config import ModelConfig
from ..formats.errors import FormatError, ParameterError, StorageError, UnsupportedError
from ..formats.gguf import GGUFFile
from ..formats.gguf_header import show
from ..formats.gguf_rewrite import Value, rewrite
from ..formats.lora import ACTIVATION, FLOORS, NORM_HASH, Adapter
from ..formats.pages import forget
from ..formats.section import has_section
from ..formats.section_file import Contents, SectionTensor, silent, update_section
from ..formats.section_image import Progress
from ..formats.section_layout import sidecar_path
from ..formats.types import GGMLType
from .encode import ENCODED, Encoder, NotFiniteError
from .lora import Change, collect, relufied

_PIECE = 1 << 24  # weights that are floats at a time
_FLOATS = ("F32", "F16", "BF16")
_DOWN_T = (*_FLOATS, "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
_FFN = tuple(f".ffn_{part}.weight" for part in ("gate", "up", "down"))


@dataclass
class Report:
    """What was written. types: how many changed matrices became each.

    fallen: (tensor, type wanted, type given) where blocks do not divide the rows; unwritable: types that nothing here
    encodes, for which Q8_0 stands in; relufied: the adapter that changed the activation, if one did; section: the model
    has one, which is not carried over.
    """

    types: Counter[str] = field(default_factory=Counter)
    fallen: list[tuple[str, str, str]] = field(default_factory=list)
    unwritable: set[str] = field(default_factory=set)
    relufied: Path | None = None
    section: bool = False


def merge(
    path: Path,
    lora: Sequence[tuple[Path, float]],
    out: Path,
    kind: str | None = None,
    n_threads: int | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Write `out`: the model at `path` with adapters (paths and scales) merged into it.

    kind: the changed matrices' type. Without it they keep their own, but those of a relufied FFN become Q8_0 where they
    are no floats: new weights lose more in few bits than weights that were on that grid already. A relufied file has a
    section with ffn_down by neurons, made of the floats. All else is the model's, byte for byte. say gets a line while
    kernels are compiled. A failed or interrupted run leaves nothing. Raises FormatError, UnsupportedError,
    ParameterError and StorageError.
    """
    if kind is not None and kind.upper() not in ENCODED:
        raise ParameterError(f"type: got {kind!r:.20}, wanted one of {', '.join(ENCODED)}")
    if not lora:
        raise ParameterError("lora: got no adapter, wanted at least one to merge")
    if out.resolve() in (path.resolve(), *(adapter.resolve() for adapter, _ in lora)):
        raise ParameterError(f"{out}: is the model itself or an adapter; name another file to write")
    if out.is_dir():
        raise StorageError(f"{out}: is a folder; name the file to write")
    if (side := sidecar_path(out)).exists():
        raise StorageError(f"{side}: the section of an earlier {out.name}; delete it, or name another file to write")
    report = Report(relufied=relufied(lora))
    with GGUFFile(path) as file:
        config, report.section = ModelConfig.from_gguf(file), has_section(file)
        if file.powerinfer:
            raise UnsupportedError(f"{path}: is one of PowerInfer's files; `hotcold convert` makes it a GGUF first")
        changed = collect(file, lora)
        types = _types(file, changed, GGMLType[kind.upper()] if kind else None, report)
        keys: dict[str, Value] = {}
        if report.relufied:
            keys = _relufied_keys(report.relufied, config, types)
        if any(map(mixes.is_quantised, types.values())):
            keys["general.quantization_version"] = 2
        dropped = [key for key in file.metadata if report.relufied and key.startswith("general.base_model.")]
        new = {name: _shape(change) for name, change in changed.items() if name not in file.tensors}
        with Encoder(n_threads, say) as encoder, _work_folder(out) as folder:
            writer, unfinished = _Writer(file, changed, types, encoder, progress), folder / out.name
            rewrite(file, unfinished, types, writer.data, keys, dropped, new)
            if report.relufied:
                update_section(unfinished, _section(config, types, writer), progress=progress)
            forget(unfinished)
            os.replace(unfinished, out)
    return report


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` for what is not whole yet; StorageError where the disk refuses."""
    folder: str | None = None
    try:
        folder = tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent)
        yield Path(folder)
    except OSError as error:
        raise StorageError(f"{out}: {error.strerror or error}; name a file that can be written there") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _types(file: GGUFFile, changed: Mapping[str, Change], kind: GGMLType | None, report: Report) -> dict[str, GGMLType]:
    """The type of each tensor of the merged file; what is not changed keeps its own."""
    types = {name: info.type for name, info in file.tensors.items()}
    for name, change in changed.items():
        # what a model has no matrix for, the bypass, goes with the neurons
        own = types[name if name in types else f"{name.rpartition('.ffn_')[0]}.ffn_gate.weight"]
        new_weights = report.relufied is not None and (name.endswith(_FFN) or name not in file.tensors)
        wanted = kind or own
        if kind is None and own.name not in (_FLOATS if new_weights else ENCODED):
            wanted = GGMLType.Q8_0
            if not new_weights:
                report.unwritable.add(own.name)
        types[name] = given = mixes.fitting(wanted, _shape(change)[0])
        report.types[given.name] += 1
        if given != wanted:
            report.fallen.append((name, wanted.name, given.name))
    return types


def _shape(change: Change) -> tuple[int, int]:
    """Of the matrix that a change is for, in ggml's order."""
    return change.factors.a.shape[1], change.factors.b.shape[0]


def _relufied_keys(path: Path, config: ModelConfig, types: Mapping[str, GGMLType]) -> dict[str, Value]:
    """What the metadata of a file says into which this adapter was merged."""
    with Adapter(path) as adapter:
        assert adapter.activation is not None
        if config.activation == adapter.activation:
            raise UnsupportedError(f"{path}: makes {adapter.activation} models, and {config.name!r:.60} is one already")
        if config.n_expert or not config.gated:
            what = "a mixture of experts" if config.n_expert else "an FFN without a gate"
            raise UnsupportedError(f"{path}: changes the activation of gated FFNs; {config.name!r:.60} has {what}")
        given, kind = adapter.file.metadata, types["blk.0.ffn_down.weight"]
        keys: dict[str, Value] = {
            f"{config.arch}.{ACTIVATION}": adapter.activation,
            "general.name": f"{config.name} ReLU",
            "general.base_model.count": 1,
            "general.base_model.0.name": config.name,
        }
        if adapter.floors is not None:
            keys[f"{config.arch}.{FLOORS}"] = list(adapter.floors)
        if kind.name in mixes.MIXES:
            keys["general.file_type"] = mixes.MIXES[kind.name].file_type
        for key, value in given.items():
            if key == "general.description" or (key.startswith("hotcold.") and key != NORM_HASH):
                keys[key] = value.tolist() if isinstance(value, np.ndarray) else value
        return keys


def _section(config: ModelConfig, types: Mapping[str, GGMLType], writer: _Writer) -> Contents:
    """ffn_down by neurons, which the sparse modes read."""
    tensors = []
    for layer in range(config.n_layer):
        name = f"blk.{layer}.ffn_down.weight"
        kind = types[name]
        # columns do not fit into the blocks of rows that were quantised before
        if kind.name not in (_DOWN_T if name in writer.changed else _FLOATS):
            kind = GGMLType.Q8_0
        if config.n_ff % kind.block_size or config.n_embd % kind.block_size:
            kind = GGMLType.F16
        make, shape = partial(writer.turned, name, kind), (config.n_embd, config.n_ff)
        tensors.append(SectionTensor(f"blk.{layer}.ffn_down_t.weight", shape, kind, make))
    return Contents({}, tensors)


class _Writer:
    """Gives the merged tensors' bytes, a piece at a time."""

    def __init__(
        self,
        file: GGUFFile,
        changed: Mapping[str, Change],
        types: Mapping[str, GGMLType],
        encoder: Encoder,
        progress: Progress,
    ) -> None:
        self.file, self.changed, self.types = file, changed, types
        self.encoder, self.progress = encoder, progress
        self.done, self.total = 0, len(types)

    def data(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """A tensor's bytes: the model's own, or those of the matrix with what is added to it."""
        if name not in self.changed:
            data = self.file.data(name)
            yield from (data[i : i + _PIECE] for i in range(0, data.size, _PIECE))
        else:
            for piece in self._floats(name):
                yield self._encoded(name, self.types[name], piece).reshape(-1)
        if name in self.file.tensors:
            self.file.release(name)
        self.done += 1
        self.progress("merging", self.done, self.total)

    def turned(self, name: str, kind: GGMLType) -> NDArray[np.uint8]:
        """A matrix by its columns, in a type; uint8."""
        whole = np.concatenate(list(self._floats(name)))
        return self._encoded(name, kind, np.ascontiguousarray(whole.T))

    def _floats(self, name: str) -> Iterator[NDArray[np.float32]]:
        """The merged matrix, float32, some rows at a time."""
        info, change = self.file.tensors.get(name), self.changed.get(name)
        k, n = info.shape if info else _shape(self.changed[name])
        decoded = self.file.dequantized(name) if info and info.type.name not in ENCODED else None  # rare, and slow
        for first in range(0, n, step := max(1, _PIECE // k)):
            rows = slice(first, min(n, first + step))
            values = np.zeros((rows.stop - first, k), np.float32)
            if decoded is not None:
                values += decoded[rows]
            elif info is not None:
                at = self.file.address(name) + first * info.row_size
                self._convert(name, info.type.name, at, "F32", values, len(values), k)
            if change is not None:
                values += change.factors.b[rows] @ change.factors.a
            yield values

    def _encoded(self, name: str, kind: GGMLType, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        n, k = values.shape
        out = np.empty((n, k // kind.block_size * kind.type_size), np.uint8)
        self._convert(name, "F32", values.ctypes.data, kind.name, out, n, k)
        return out

    def _convert(self, name: str, source: str, address: int, kind: str, out: NDArray[Any], n: int, k: int) -> None:
        try:
            self.encoder.convert(source, address, kind, out.ctypes.data, n, k)
        except NotFiniteError as error:
            wanted = "finite ones that the type can hold"
            raise FormatError(self.file.path, f"tensor {show(name)}", str(error), wanted) from None
