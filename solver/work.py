"""A folder beside the file that long training makes, so that an interrupted training goes on where it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..formats.errors import StorageError
from ..formats.file_lock import alone
from ..formats.section_file import replacing

_FORMAT = 1
NO_WORK = ("dtype", "seconds")  # what is kept of a run that made nothing yet


class Work:
    """What was trained for `out`, kept in `OUT.KIND/` for equal settings (numbers and texts)."""

    def __init__(self, out: Path, kind: str, settings: Mapping[str, Any]) -> None:
        self.out, self.folder = out, out.with_name(f"{out.name}.{kind}")
        self.settings = {"format": _FORMAT, **settings}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only process that makes OUT; StorageError if another one does."""
        lock_file = self.out.with_name(f".{self.folder.name}.lock")
        busy = f"{self.out}: another process is making it"
        with alone(lock_file, busy, lambda reason: f"{self.out}: {reason}; name a file that can be written there"):
            yield

    def begin(self) -> bool:
        """Make the folder; True if it is there with work of the same settings.

        StorageError where it holds work of other settings, or what they were cannot be read: hours may be in it.
        """
        note = self.folder / "settings.json"
        if any(path.stem not in NO_WORK for path in self.folder.glob("*.pt")):
            try:
                kept = dict(json.loads(note.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as exc:
                raise StorageError(
                    f"{note}: cannot be read: {exc}; delete {self.folder}, or name another file"
                ) from exc
            other = ", ".join(key for key in self.settings | kept if self.settings.get(key) != kept.get(key))
            if other:
                raise StorageError(
                    f"{self.folder}: got work of other settings ({other}), wanted work of these; "
                    f"delete it, or name another file to write"
                )
            return True
        self.drop()
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as exc:
            raise StorageError(f"{self.folder}: {exc.strerror or exc}; name a file that can be written") from exc
        # A run that was killed before its settings were written leaves at most a part of them.
        if any(note.name not in path.name for path in self.folder.iterdir()):
            raise StorageError(f"{self.folder}: a folder of something else; move it, or name another file to write")
        with replacing(note, "name a file that can be written") as part:
            part.write_text(json.dumps(self.settings), encoding="utf-8")
        return False

    def load(self, name: str) -> Any:
        """What `save` kept under this name, in the CPU's memory, or None; StorageError for a damaged file."""
        import torch

        path = self.folder / f"{name}.pt"
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as exc:  # whatever a damaged file makes torch raise
            raise StorageError(
                f"{path}: cannot be read ({type(exc).__name__}); delete it to do that part again"
            ) from exc

    def save(self, name: str, value: Any) -> None:
        """Keep tensors and numbers under a name; whole, or not at all."""
        import torch

        with replacing(self.folder / f"{name}.pt", "the work before it is whole") as part:
            try:
                with part.open("wb") as file:
                    torch.save(value, file)
                    file.flush()
                    os.fsync(file.fileno())
            except RuntimeError as exc:  # a full disk, in the words of PyTorch's writer
                full = shutil.disk_usage(self.folder).free < 1 << 20
                reason = os.strerror(errno.ENOSPC) if full else exc
                raise StorageError(f"{self.folder}: cannot be written: {reason}; the work before it is whole") from exc

    def drop(self) -> None:
        """Remove the folder, if it is one of ours."""
        if (self.folder / "settings.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
