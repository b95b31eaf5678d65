"""A Hugging Face checkpoint -> a GGUF file in any type, a piece of a tensor in memory at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..formats import mixes
from ..formats.checkpoint import HFCheckpoint
from ..formats.checkpoint_card import file_name
from ..formats.checkpoint_tensors import Source
from ..formats.config import ModelConfig
from ..formats.errors import FormatError, StorageError, UnsupportedError
from ..formats.gguf import GGUFFile
from ..formats.gguf_header import show
from ..formats.pages import forget
from ..formats.safetensors import finite
from ..formats.section_file import replacing, silent
from ..formats.section_image import Progress
from ..formats.section_layout import sidecar_path
from ..formats.types import GGMLType
from ..runtime.encode import Encoder, NotFiniteError
from .transpose import encoded

if TYPE_CHECKING:
    from gguf import GGUFWriter

_FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class Converted:
    """The file that was written, what is in it, in which mix of types, and what the person should know."""

    path: Path
    config: ModelConfig
    mix: mixes.Mix
    notes: tuple[str, ...]


def convert(
    folder: Path,
    out: Path | None = None,
    name: str | None = None,
    progress: Progress = silent,
    n_threads: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Converted:
    """Write the checkpoint in `folder` as a GGUF file in the mix `name`, by default the type of its weights.

    out: a file, or a folder (by default the current one) in which the file gets a name by the GGUF convention. say gets
    a line while kernels are compiled. Raises ModelNotFoundError, FormatError, UnsupportedError, ParameterError and
    StorageError; nothing is left under the final name then.
    """
    with HFCheckpoint(folder) as checkpoint, ExitStack() as stack:
        mix = mixes.find(checkpoint.own_type if name is None else name)
        path = out or Path()
        if path.is_dir():
            path = path / file_name(checkpoint.keys, mix.name)
        if (side := sidecar_path(path)).exists():
            raise StorageError(
                f"{side}: the section of an earlier {path.name}; delete it, or name another file to write"
            )
        plan, notes = _plan(checkpoint, mix)
        encoder = None
        if any(mixes.is_quantised(kind) for _, kind in plan):
            encoder = stack.enter_context(Encoder(n_threads, say))
        with replacing(path, "name a file that can be written there") as part:
            _write(checkpoint, part, mix, plan, encoder, progress)
            config = _config(checkpoint, part)
    forget(path)
    return Converted(path, config, mix, (*checkpoint.notes, *notes))


def _plan(checkpoint: HFCheckpoint, mix: mixes.Mix) -> tuple[list[tuple[Source, GGMLType]], list[str]]:
    """The type of each tensor, and what the person should know of it."""
    metadata = {**checkpoint.keys, "general.architecture": checkpoint.row.name}
    facts = mixes.Facts.of(metadata, [source.name for source in checkpoint.sources])
    plan, fallen = [], []
    for source in checkpoint.sources:
        wanted = mixes.preferred(mix, source.name, source.shape, facts)
        kind = GGMLType.F32 if wanted is None else mixes.fitting(wanted, source.shape[0])
        if wanted not in (None, kind):
            fallen.append((source.name, wanted.name, kind.name))
        plan.append((source, kind))
    return plan, [mixes.fallen_note(fallen)] if fallen else []


def _write(
    checkpoint: HFCheckpoint,
    part: Path,
    mix: mixes.Mix,
    plan: list[tuple[Source, GGMLType]],
    encoder: Encoder | None,
    progress: Progress,
) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(part, checkpoint.row.name)
    try:
        keys = {**checkpoint.keys, "general.file_type": mix.file_type, "general.quantization_version": 2}
        for key, value in keys.items():
            _add_key(writer, key, value)
        sizes = [math.prod(source.shape) // kind.block_size * kind.type_size for source, kind in plan]
        for (source, kind), size in zip(plan, sizes, strict=True):
            dims, form = source.shape[::-1], GGMLQuantizationType(kind)
            writer.add_tensor_info(source.name, dims, np.dtype(np.float32), size, form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        file.flush()
        os.truncate(part, file.tell() + sum(size + -size % writer.data_alignment for size in sizes))
        _config(checkpoint, part)  # before hours are spent on the weights
        done, total = 0, sum(sizes)
        for source, kind in plan:
            for piece in _pieces(checkpoint.folder, source, kind, encoder):
                file.write(piece.data)
                done += piece.nbytes
                progress("writing the model", done, total)
            writer.write_padding(file, file.tell())
        file.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()


def _config(checkpoint: HFCheckpoint, part: Path) -> ModelConfig:
    """The file as hotcold reads it; what it refuses came from config.json."""
    said = checkpoint.folder / "config.json"
    try:
        with GGUFFile(part) as file:
            return ModelConfig.from_gguf(file)
    except FormatError as error:
        raise FormatError(said, error.field, error.got, error.wanted) from None
    except UnsupportedError as error:
        raise UnsupportedError(str(error).replace(str(part), str(said))) from None


def _pieces(folder: Path, source: Source, kind: GGMLType, encoder: Encoder | None) -> Iterator[NDArray[np.uint8]]:
    """A tensor's bytes; FormatError, naming it, for weights that are no numbers or too large for the type."""

    def error(got: str, wanted: str) -> FormatError:
        return FormatError(folder, f"tensor {show(source.said)}", got, wanted)

    for raw, dtype in source.pieces():
        if not finite(raw, dtype):
            raise error("weights that are NaN or infinite", "finite ones")
        if dtype == kind.name and not source.offset:
            yield np.ascontiguousarray(raw).view(np.uint8).reshape(-1)
            continue
        values = source.floats(raw, dtype)
        if mixes.is_quantised(kind):
            assert encoder is not None
            try:
                yield encoder.encode(kind.name, values).reshape(-1)
            except NotFiniteError as wrong:
                raise error(str(wrong), f"finite ones that {kind.name} can hold") from None
            continue
        with np.errstate(over="ignore"):
            data = encoded(values, kind).reshape(-1)
        if not finite(data.view(_FLOATS[kind.name]), kind.name):
            raise error(f"weights of up to {np.abs(values).max():.4g}", f"ones that {kind.name} can hold")
        yield data


def _add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    """A metadata value in the type that the field gives it: u32, f32, bool, string, or an array of one of these."""
    from gguf import GGUFValueType as Type

    kinds = {bool: Type.BOOL, int: Type.UINT32, float: Type.FLOAT32, str: Type.STRING}
    if not isinstance(value, list):
        writer.add_key_value(key, value, kinds[type(value)])
    elif value:
        writer.add_array(key, value)
