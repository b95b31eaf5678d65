"""Large pages for mapped files, where the system has them (Linux 6 with ext4, xfs or btrfs).

A step reads rows all over a file. In 4 KiB pages the processor looks up an address for almost every row, which costs
about as much as reading it. The kernel makes large pages only when it reads a file into its cache, so a mapping has to
ask beforehand, and a file that was just written must leave the cache first, where it lies in small ones.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path


def ask_for_large(mapping: mmap.mmap) -> None:
    """Have what is read or written through a mapping from now on lie in large pages, if the system can."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel or file system without them
            mapping.madvise(mmap.MADV_HUGEPAGE)


def forget(path: str | os.PathLike[str]) -> None:
    """Drop a file that was just written from the system's cache, once it is on the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError), open(Path(path), "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
