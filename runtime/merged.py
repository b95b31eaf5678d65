"""Models into which a relufy adapter was merged when they were first opened with it: files in the user's cache.

A relufy adapter changes the activation, so it cannot run beside the matrices. Merged, the model is a file like any
other: all modes, sections and GPUs work on it. Its name says what the model and the adapter are, not where they lie.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ..formats.errors import StorageError
from ..formats.gguf import GGUFFile
from ..formats.lora import Adapter
from . import models
from .lora import relufied

_VERSION = 1  # of how files are merged: another one merges again
_PIECE, _SAMPLE = 1 << 20, 4096

Lora = Sequence[tuple[Path, float]]
Say = Callable[[str], None]


def folder() -> Path:
    """Where merged models are; each may be deleted, and is then made again when it is wanted."""
    return models.home() / "merged"


def settle(
    path: Path, lora: Lora, n_threads: int | None = None, progress: Say | None = None, say: Say | None = None
) -> tuple[Path, list[tuple[Path, float]]]:
    """The model to open and the adapters that then run beside its matrices.

    The model is the one given, unless one of the adapters is a relufy adapter: then it is the merged file, which is
    made if it is not there yet. progress: takes lines while that is done; say: the line that tells of it. Raises
    merge's errors.
    """
    adapter = relufied(lora)
    if adapter is None:
        return path, list(lora)
    with GGUFFile(path) as base:
        digest = _digest(base, adapter)[:24]
        out = next(folder().glob(f"*-{digest}.gguf"), folder() / f"{path.stem[:40]}-{adapter.stem[:40]}-{digest}.gguf")
        if not out.exists():
            with Adapter(adapter) as change:
                change.check(base)
    if not out.exists():
        with models.storage_errors(folder()):
            folder().mkdir(parents=True, exist_ok=True)
            with models.locked(out.with_name(f".{digest}.lock"), "merging this adapter", _lines(progress)):
                if not out.exists():  # nor has another process made it meanwhile
                    _make(path, adapter, out, n_threads, progress)
                    if tell := say or progress:
                        size = out.stat().st_size / 2**20
                        tell(f"merged {adapter.name} into {path.name}, once: {out} ({size:.1f} MiB)")
    return out, [one for one in lora if one[0] != adapter]


def opened(
    file: GGUFFile, lora: Lora, n_threads: int | None = None, progress: Say | None = None
) -> tuple[GGUFFile, list[tuple[Path, float]]]:
    """As settle, for a file that is open: the same, or the merged one in its place."""
    path, rest = settle(file.path, lora, n_threads, progress)
    if path != file.path:
        merged = GGUFFile(path)
        file.close()
        file = merged
    return file, rest


def _make(path: Path, adapter: Path, out: Path, n_threads: int | None, progress: Say | None) -> None:
    from .merge import merge  # what encodes is not needed to open what was merged before

    for stale in out.parent.iterdir():
        if stale.name.startswith(f".{out.name}.") and stale.name.endswith(".part"):  # of a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
    if progress:
        progress(f"merging {adapter.name} into {path.name}")
    try:
        merge(path, [(adapter, 1.0)], out, None, n_threads, say=progress)
    except StorageError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None  # what to do about this folder is said elsewhere
        raise


def _digest(base: GGUFFile, adapter: Path) -> str:
    """SHA-256, in hex, of a model's header, samples of its tensors, and an adapter.

    So neither the model's place nor a section that is attached to it counts. Samples, as a model is too large to be
    read at each start; a training or a quantisation changes every tensor everywhere.
    """
    digest = hashlib.sha256(f"{_VERSION}\n".encode())
    with open(base.path, "rb") as file:
        digest.update(file.read(base.data_offset))
    for name in sorted(base.tensors):
        data = base.data(name)
        for start in (0, len(data) // 2, max(0, len(data) - _SAMPLE)):
            digest.update(data[start : start + _SAMPLE].tobytes())
    with open(adapter, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _lines(progress: Say | None) -> models.Progress:
    """Progress of a download, of which only what is going on is wanted."""
    return lambda what, done, total: progress(what) if progress else None
