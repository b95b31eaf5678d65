"""A Hugging Face checkpoint -> a GGUF file, a piece of a tensor in memory at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..formats.checkpoint import HFCheckpoint
from ..formats.checkpoint_card import file_name
from ..formats.checkpoint_tensors import Source, named
from ..formats.config import ModelConfig
from ..formats.errors import FormatError, ParameterError, StorageError
from ..formats.gguf import GGUFFile
from ..formats.pages import forget
from ..formats.section_layout import sidecar_path
from ..formats.types import GGMLType
from .transpose import encoded

if TYPE_CHECKING:
    from gguf import GGUFWriter

Progress = Callable[[str, int, int], None]
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}
_KEPT = ("norm.weight", "ffn_gate_inp.weight", "position_embd.weight")


@dataclass(frozen=True)
class Converted:
    """The file that was written, what is in it, and what the person should know."""

    path: Path
    config: ModelConfig
    kind: str
    notes: tuple[str, ...]


def convert(folder: Path, out: Path | None = None, kind: str | None = None, progress: Progress | None = None) -> Converted:
    """Write the checkpoint in `folder` as a GGUF file of a type, by default that of its weights.

    out: a file, or a folder (by default the current one) in which the file gets a name by the GGUF convention. A failed
    or interrupted run leaves nothing under that name. Raises ModelNotFoundError, FormatError, UnsupportedError,
    ParameterError (the type) and StorageError.
    """
    with HFCheckpoint(folder) as checkpoint:
        kind = (kind or checkpoint.own_type).upper()
        if kind not in FILE_TYPES:
            raise ParameterError(f"--type: got {kind!r}, wanted one of {', '.join(FILE_TYPES)}")
        path = out or Path()
        if path.is_dir():
            path = path / file_name(checkpoint.keys, kind)
        if sidecar_path(path).exists():
            raise StorageError(f"{sidecar_path(path)}: the section of an earlier {path.name}; delete it, or name another")
        part = path.with_name(f".{path.name}.part")
        try:
            _write(checkpoint, part, kind, progress)
            with GGUFFile(part) as file:
                config = ModelConfig.from_gguf(file)
            os.replace(part, path)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror or error}; name a file that can be written there") from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
    forget(path)
    return Converted(path, config, kind, tuple(checkpoint.notes))


def _write(checkpoint: HFCheckpoint, part: Path, kind: str, progress: Progress | None) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(part, checkpoint.row.name)
    try:
        keys = {**checkpoint.keys, "general.file_type": FILE_TYPES[kind], "general.quantization_version": 2}
        for key, value in keys.items():
            add_key(writer, key, value)
        plan = [(source, _type(source, GGMLType[kind])) for source in checkpoint.sources]
        for source, form in plan:
            dims = source.shape[::-1]
            writer.add_tensor_info(
                source.name, dims, np.dtype(np.float32), _nbytes(source, form), GGMLQuantizationType(form)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        done, total = 0, sum(_nbytes(source, form) for source, form in plan)
        for source, form in plan:
            for piece in pieces(checkpoint.folder, source, form):
                file.write(piece.data)
                done += piece.nbytes
                if progress:
                    progress("writing the model", done, total)
            writer.write_padding(file, file.tell())
        file.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()


def _type(source: Source, kind: GGMLType) -> GGMLType:
    if len(source.shape) < 2 or source.name.endswith(_KEPT):
        return GGMLType.F32
    return kind if source.shape[0] % kind.block_size == 0 else GGMLType.F16


def _nbytes(source: Source, form: GGMLType) -> int:
    return math.prod(source.shape) // form.block_size * form.type_size


def pieces(folder: Path, source: Source, form: GGMLType) -> Iterator[NDArray[np.uint8]]:
    """A tensor's bytes; UnsupportedError, naming it, for weights that are no numbers or too large for the type."""
    for values in source.rows():
        if not np.isfinite(values).all():
            raise named(folder, source, "has weights that are NaN or infinite")
        if form == GGMLType.F16 and np.abs(values).max(initial=0.0) >= 65520.0:
            raise named(folder, source, "has weights beyond the range of F16; take another --type")
        yield encoded(values, form).reshape(-1)


def add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    """A metadata value in the type that the field gives it: u32, f32, bool, string, or an array of one of these."""
    from gguf import GGUFValueType as Type

    if isinstance(value, bool):
        writer.add_key_value(key, value, Type.BOOL)
    elif isinstance(value, int):
        writer.add_key_value(key, value, Type.UINT32)
    elif isinstance(value, float):
        writer.add_key_value(key, value, Type.FLOAT32)
    elif isinstance(value, str):
        writer.add_key_value(key, value, Type.STRING)
    elif isinstance(value, list):
        if value:
            writer.add_array(key, value)
    else:
        raise FormatError(writer.path, f"key {key!r}", type(value).__name__, "a plain value")
