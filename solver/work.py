"""A folder beside the file that long training makes, so that an interrupted training goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..formats.errors import StorageError
from ..formats.file_lock import alone

_FORMAT = 1


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

        StorageError where it holds work of other settings: hours may be in it.
        """
        note = self.folder / "settings.json"
        try:
            if any(self.folder.glob("*.pt")):
                if (kept := json.loads(note.read_text(encoding="utf-8"))) == self.settings:
                    return True
                other = ", ".join(key for key in self.settings | kept if self.settings.get(key) != kept.get(key))
                raise StorageError(
                    f"{self.folder}: got work of other settings ({other}), wanted work of these; "
                    f"delete it, or name another file to write"
                )
        except (OSError, ValueError):
            pass
        self.drop()
        try:
            self.folder.mkdir()
            note.write_text(json.dumps(self.settings), encoding="utf-8")
        except OSError as exc:
            raise StorageError(f"{self.folder}: {exc.strerror or exc}; name a file that can be written") from exc
        return False

    def load(self, name: str) -> Any:
        """What `save` kept under this name, or None."""
        import torch

        try:
            return torch.load(self.folder / f"{name}.pt", weights_only=True)
        except FileNotFoundError:
            return None

    def save(self, name: str, value: Any) -> None:
        """Keep tensors and numbers under a name; whole, or not at all."""
        import torch

        partial = self.folder / f"{name}.part"
        try:
            torch.save(value, partial)
            os.replace(partial, self.folder / f"{name}.pt")
        except (OSError, RuntimeError) as exc:  # a full disk is a RuntimeError of PyTorch's writer
            raise StorageError(f"{self.folder}: cannot be written: {exc}") from exc

    def drop(self) -> None:
        """Remove the folder, if it is one of ours."""
        if (self.folder / "settings.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
