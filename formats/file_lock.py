"""Who may change a model file: writers exclude each other, and a mapped section is not pulled from under its reader.

Two locks, because they answer two questions. Writers take a lock file beside the model. Readers of a section inside
the model hold a shared lock on the model itself as long as it is mapped: cutting a mapped range off would end them with
SIGBUS. Windows has no such lock and needs none, as it refuses to cut a mapped range off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import StorageError

try:
    import fcntl
except ImportError:  # Windows
    HAS_FLOCK = False
else:
    HAS_FLOCK = True


def lock_path(model: Path) -> Path:
    """The lock file of a model; it stays there, empty, since deleting it would let two writers in."""
    return model.with_name(f".hotcold-{model.name}.lock")


@contextmanager
def writing(model: Path) -> Iterator[None]:
    """Be the only process that changes this model's section; StorageError at once if another one does."""
    busy = f"{model}: another process is attaching to it or detaching from it; try again"
    with alone(lock_path(model), busy, lambda reason: f"{model}: its folder cannot be written: {reason}"):
        yield


@contextmanager
def alone(lock_file: Path, busy: str, denied: Callable[[str], str]) -> Iterator[None]:
    """Be the only process that holds a lock file; StorageError at once: `busy`, or `denied` for the system's reason."""
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StorageError(busy) from None
    except OSError as error:
        raise StorageError(denied(error.strerror or str(error))) from error
    try:
        yield
    finally:
        lock.release()


def share(descriptor: int) -> bool:
    """Hold a file's reader lock until the descriptor and its duplicates are closed; False while a writer claims it."""
    return not HAS_FLOCK or _flock(descriptor, fcntl.LOCK_SH)


def claim(descriptor: int) -> bool:
    """Keep readers of a section inside this file away until the descriptor is closed; False if there is one."""
    return not HAS_FLOCK or _flock(descriptor, fcntl.LOCK_EX)


def _flock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True
