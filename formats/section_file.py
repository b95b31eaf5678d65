"""Putting a section into a model file and taking it out again, so that a crash at any moment loses neither.

The new section is first written whole beside the model, under the sidecar's name, where `find_section` looks first:
that file is the journal. Then its bytes are appended to the model, and the sidecar goes. The model's own bytes are
never written or even read, so all this costs the section's size. Where it fails, the model keeps what it had.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO
from warnings import warn

from .config import ModelConfig
from .errors import HotcoldError, ParameterError, SectionError, StorageError
from .file_lock import HAS_FLOCK, claim, writing
from .gguf import GGUFFile
from .section import FORMAT_VERSION, Section, attached_footer, open_section, stored_section
from .section_image import Contents, Progress, SectionTensor, write_image
from .section_layout import (
    FOOTER,
    Footer,
    TornError,
    data_end,
    own_end,
    pieces,
    read_footer,
    sidecar_path,
    start_after,
    tensor_hash,
)
from .section_parts import PARTS, check, part_of

__all__ = ["Contents", "SectionTensor", "attach_section", "detach_section", "update_section"]


_WRITERS_OWN = ("general.architecture", "general.alignment")  # keys that the writer adds itself


class _InUseError(Exception):
    """Somebody reads the section inside the model."""


def silent(what: str, done: int, total: int | None) -> None:
    """The progress of who does not want to know."""


def update_section(
    model_path: str | os.PathLike[str],
    contents: Contents,
    *,
    sidecar: bool = False,
    drop: Iterable[str] = (),
    progress: Progress = silent,
) -> Path:
    """Replace those parts of a model's section that `contents` has, keep the others but those in `drop`.

    Returns the file that has the section: the model, or the sidecar where that is wanted or the section inside the
    model is being read. Raises FormatError (contents that do not fit), SectionError, StorageError.
    """
    path, dropped = Path(model_path), set(drop)
    if unknown := dropped - set(PARTS):
        raise ParameterError(f"drop: got {min(unknown)!r}, wanted one of {', '.join(PARTS)}")
    with writing(path), GGUFFile(path) as model:
        config = ModelConfig.from_gguf(model)
        old = stored_section(model, config)
        with old or nullcontext():
            merged = _merged(contents, old, dropped)
            if merged.tensors or any(map(part_of, merged.metadata)):
                return _store(model, config, merged, old, sidecar, progress)
        _take_away(model)
        return path


def attach_section(
    model_path: str | os.PathLike[str],
    section_path: str | os.PathLike[str],
    *,
    sidecar: bool = False,
    progress: Progress = silent,
) -> Path:
    """Make the section in a file of its own the model's section, in place of any other; as update_section."""
    path = Path(model_path)
    with writing(path), GGUFFile(path) as model:
        config = ModelConfig.from_gguf(model)
        with open_section(Path(section_path), model, config) as section:
            return _store(model, config, _contents(section), section, sidecar, progress)


def detach_section(
    model_path: str | os.PathLike[str],
    *,
    to: str | os.PathLike[str] | None = None,
    keep_sidecar: bool = False,
    progress: Progress = silent,
) -> None:
    """Take a model's section away: the model's bytes are then what they were before the first attach.

    to: a file to move the section to. keep_sidecar: move it beside the model, where it stays in force. Whatever remains
    of damaged sections goes too. Raises SectionError if there is nothing to take away, StorageError.
    """
    path = Path(model_path)
    side = sidecar_path(path)
    target = side if keep_sidecar else None if to is None else Path(to)
    if target is not None and target.resolve() == path.resolve():
        raise ParameterError(f"{target}: is the model itself; name another file for the section")
    with writing(path), GGUFFile(path) as model:
        if not side.exists() and path.stat().st_size == _base_size(model):
            raise SectionError(f"{path}: no section is attached to it, and no {side.name} is beside it")
        if target is not None and not (keep_sidecar and side.exists()):
            _copy_out(model, target, progress)
        _take_away(model, keep_sidecar)


def _take_away(model: GGUFFile, keep_sidecar: bool = False) -> None:
    """Cut off what is attached to a model, which this closes, and delete its sidecar."""
    path, side, base = model.path, sidecar_path(model.path), _base_size(model)
    model.close()
    if path.stat().st_size > base:
        _check_writable(path, "its section stays in it")
        with _storing(path, "its section stays in it"), open(path, "r+b") as file:
            if not claim(file.fileno()):
                raise StorageError(f"{path}: its section is in use by a running model; end that first")
            file.truncate(base)
            os.fsync(file.fileno())
    if not keep_sidecar:
        with _storing(side, "delete it by hand"):
            side.unlink(missing_ok=True)


def _contents(section: Section) -> Contents:
    """All that a section has, to be copied."""
    own = ("general.", "hotcold.format_version", "hotcold.base.")
    metadata = {key: value for key, value in section.image.metadata.items() if not key.startswith(own)}
    tensors = [
        SectionTensor(info.name, info.shape, info.type, partial(section.checked, info.name))
        for info in section.image.tensors.values()
    ]
    return Contents(metadata, tensors)


def _merged(new: Contents, old: Section | None, dropped: set[str]) -> Contents:
    """New contents, and those parts of the old ones that neither they nor `dropped` name."""
    if old is None:
        return new
    kept, named = _contents(old), {*new.metadata, *(tensor.name for tensor in new.tensors)}
    gone = dropped | {part for name in named if (part := part_of(name))}
    metadata = {key: value for key, value in kept.metadata.items() if part_of(key) not in gone}
    tensors = [one for one in kept.tensors if part_of(one.name) not in gone and one.name not in named]
    return Contents(metadata | dict(new.metadata), tensors + new.tensors)


def _store(
    model: GGUFFile,
    config: ModelConfig,
    contents: Contents,
    source: Section | None,
    sidecar: bool,
    progress: Progress,
) -> Path:
    """Write contents beside the model and from there into it; closes the model, and the section they come from."""
    path, side = model.path, sidecar_path(model.path)
    check(path, contents.metadata, {one.name: (one.shape, one.type) for one in contents.tensors}, config)
    if not sidecar:
        _check_writable(path, "use --sidecar to put the section beside it")
    base = _base_size(model)
    own = {"general.type": "sparsity", "hotcold.format_version": FORMAT_VERSION}
    own["hotcold.base.tensor_hash"] = tensor_hash(model)
    contents = replace(contents, metadata=own | dict(contents.metadata))
    offset = 0 if sidecar else start_after(base)
    with replacing(side, "nothing was changed") as part:
        footer = write_image(part, config.arch, contents, base, offset, progress)
        if source is not None:
            source.close()  # Windows replaces no mapped file
    model.close()
    if sidecar:
        return side
    with _storing(path, f"the section is beside it, in {side.name}"):
        try:
            _append(path, side, footer, progress)
        except _InUseError:
            warn(f"{path}: its section is in use by a running model; the new one is beside it, in {side}", stacklevel=3)
            return side
    with suppress(OSError):  # Windows keeps a mapped file; it says the same as the model does
        side.unlink()
    return path


def _append(path: Path, side: Path, footer: Footer, progress: Progress) -> None:
    """Put a sidecar's bytes at the end of the model, in place of what is there.

    What lies beyond the old section is written first: if the disk is full, that is where it shows, and cutting it off
    again leaves everything as it was.
    """
    base, end = footer.base_size, footer.offset - footer.base_size + footer.size
    with open(path, "r+b") as file, open(side, "rb") as source:
        former = file.seek(0, os.SEEK_END)
        if not claim(file.fileno()):
            raise _InUseError
        if not HAS_FLOCK and former > base:
            _cut_unmapped(file, base)
            former = base
        old_end = min(former - base, end)
        try:
            _copy(file, source, footer, old_end, end, progress)
            if old_end:
                former = base  # from here on the old section is lost
                file.truncate(base + end - (FOOTER.size if old_end == end else 0))
                _copy(file, source, footer, 0, old_end, progress)
            file.seek(base + end - len(footer.pack()))
            file.write(footer.pack())
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                file.truncate(former)
            raise


def _copy(file: BinaryIO, source: BinaryIO, footer: Footer, start: int, end: int, progress: Progress) -> None:
    """Write the bytes start..end of padding, image and zeros for the footer behind the model, and sync them."""
    padding = footer.offset - footer.base_size
    image_end = padding + footer.length
    file.seek(footer.base_size + start)
    file.write(bytes(max(0, min(end, padding) - start)))
    if start < image_end and padding < end:
        first = max(start - padding, 0)
        for piece in pieces(source, first, min(end, image_end) - padding - first):
            file.write(piece)
            progress("attaching the section", source.tell(), footer.length)
    file.write(bytes(max(0, end - max(start, image_end))))
    file.flush()
    os.fsync(file.fileno())


def _cut_unmapped(file: BinaryIO, size: int) -> None:
    try:
        file.truncate(size)
    except OSError as error:
        raise _InUseError from error


def _base_size(model: GGUFFile) -> int:
    """Bytes of the model without any section, whole, half written or damaged."""
    former = model.path.stat().st_size
    with suppress(TornError):
        footer = attached_footer(model)
        if footer is not None:
            return footer.base_size
        # Unless an attach was cut short, of which only the journal knows, all that is there is the model.
        return min(former, _journal_size(model) or former)
    return min(former, _journal_size(model) or own_end(model))


def _journal_size(model: GGUFFile) -> int | None:
    """The bare model's size as an attach that did not finish noted it."""
    with suppress(OSError, TornError, HotcoldError), open(sidecar_path(model.path), "rb") as file:
        footer = read_footer(file)
        if footer is not None and footer.offset and footer.base_size >= data_end(model):
            return footer.base_size
    return None


def _copy_out(model: GGUFFile, target: Path, progress: Progress) -> None:
    section = stored_section(model)
    if section is None:
        raise SectionError(f"{model.path}: its section is damaged, so there is nothing to keep; detach it without that")
    with section, replacing(target, "name a file that can be written there") as part:
        arch = section.image.get("general.architecture", "", str)
        every = {key: value for key, value in section.image.metadata.items() if key not in _WRITERS_OWN}
        write_image(part, arch, replace(_contents(section), metadata=every), 0, 0, progress)


def _check_writable(path: Path, advice: str) -> None:
    # Root may write any file; one that nobody has leave to write was protected by someone all the same.
    if not os.access(path, os.W_OK) or not path.stat().st_mode & 0o222:
        raise StorageError(f"{path}: a read-only file; {advice}")


def check_place(path: Path) -> None:
    """StorageError for a path that no file can have, to be told before what it is to hold is made."""
    if path.is_dir() or not path.parent.is_dir():
        raise StorageError(f"{path}: {'a folder' if path.is_dir() else 'no such folder'}; name a file to write")


@contextmanager
def replacing(path: Path, advice: str, own: bool = False) -> Iterator[Path]:
    """A name to write to, which then becomes `path`; StorageError, and nothing left, where the disk refuses.

    own: a name that no other process or thread takes for the same path.
    """
    part = path.with_name(f".{path.name}{f'.{os.getpid()}-{threading.get_ident()}' if own else ''}.part")
    try:
        with _storing(path, advice):
            yield part
            os.replace(part, path)
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def _storing(path: Path, advice: str) -> Iterator[None]:
    try:
        yield
    except TornError as error:  # somebody deleted or cut the sidecar meanwhile
        raise StorageError(f"{path}: {error}; {advice}") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}; {advice}") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename in a folder survive a power cut, where folders can be opened."""
    if os.name != "nt":
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
