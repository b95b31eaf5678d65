"""Where a section lies in a file and what proves it whole: image, checksums, footer.

A section is written as [GGUF image][one CRC-32 for the image's header, one for each tensor][footer], beside the model
as a file of its own or at the model's end, where it starts at a multiple of SPAN_ALIGNMENT. The footer's checksum
covers the list of checksums, so a few bytes prove everything: a load checks the header and the small tensors, and
`hotcold section --verify` reads them all.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from .errors import UnsupportedError
from .gguf import SPAN_ALIGNMENT, GGUFFile

FOOTER = struct.Struct("<8sIIQQQQII")
MAGIC = b"\x89HOTCOLD"
VERSION = 1
PIECE = 2**23  # bytes read or written at a time


class TornError(Exception):
    """A section that is truncated or damaged; the message says where (never leaves this package)."""


@dataclass(frozen=True)
class Footer:
    """What the end of a section says. All sizes in bytes.

    sums: CRC-32 of the image's header, then of each tensor in file order. base_size: the bare model's. offset: where
    the section starts in the model, 0 for one that is to stay beside it.
    """

    length: int  # of the image
    header: int  # of the image's header, up to its tensor data
    base_size: int
    offset: int
    sums: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of image, checksums and footer together."""
        return self.length + 4 * len(self.sums) + FOOTER.size

    def pack(self) -> bytes:
        """The checksums and the footer, as they follow the image."""
        table = struct.pack(f"<{len(self.sums)}I", *self.sums)
        fields = (self.length, self.header, self.base_size, self.offset, len(self.sums))
        unsigned = FOOTER.pack(MAGIC, VERSION, zlib.crc32(table), *fields, 0)
        return table + unsigned[:-4] + struct.pack("<I", zlib.crc32(unsigned[:-4]))

    def at(self, offset: int) -> Footer:
        """The same for another place."""
        return replace(self, offset=offset)


def read_footer(file: BinaryIO) -> Footer | None:
    """The footer at a file's end, or None if there is none; TornError if it is damaged."""
    end = file.seek(0, os.SEEK_END)
    if end < FOOTER.size:
        return None
    file.seek(end - FOOTER.size)
    raw = file.read(FOOTER.size)
    magic, version, table_sum, length, header, base_size, offset, n_sums, own_sum = FOOTER.unpack(raw)
    if magic != MAGIC:
        return None
    if zlib.crc32(raw[:-4]) != own_sum:
        raise TornError("the footer's checksum is wrong")
    if version != VERSION:
        raise UnsupportedError(f"{file.name}: a section of version {version} is not supported; update hotcold")
    if length + 4 * n_sums + FOOTER.size > end or header > length or not n_sums:
        raise TornError(f"{length} bytes of section do not fit into {end} bytes of file")
    file.seek(end - FOOTER.size - 4 * n_sums)
    table = file.read(4 * n_sums)
    if zlib.crc32(table) != table_sum:
        raise TornError("the checksum of the checksums is wrong")
    return Footer(length, header, base_size, offset, struct.unpack(f"<{n_sums}I", table))


def pieces(file: BinaryIO, start: int, length: int) -> Iterator[bytes]:
    """The bytes of a range, PIECE at a time; TornError if the file ends before."""
    file.seek(start)
    while length:
        piece = file.read(min(PIECE, length))
        if not piece:
            raise TornError(f"the file ends {length} bytes too early")
        length -= len(piece)
        yield piece


def checksum(file: BinaryIO, start: int, length: int) -> int:
    """CRC-32 of a range of a file."""
    value = 0
    for piece in pieces(file, start, length):
        value = zlib.crc32(piece, value)
    return value


def sidecar_path(model: Path) -> Path:
    """Where a model's section is when it is not inside the model."""
    return model.with_name(f"hotcold-{model.name}")


def start_after(size: int) -> int:
    """Where a section starts in a model whose own bytes are `size`."""
    return -(-size // SPAN_ALIGNMENT) * SPAN_ALIGNMENT


def data_end(model: GGUFFile) -> int:
    """Where the model's last tensor ends."""
    return max((info.offset + info.nbytes for info in model.tensors.values()), default=model.data_offset)


def own_end(model: GGUFFile) -> int:
    """Where the model's own bytes end: after the padding that follows the last tensor."""
    return -(-data_end(model) // model.alignment) * model.alignment


def tensor_hash(model: GGUFFile) -> str:
    """SHA-256, in hex, of the sorted lines "name shape type" of all tensors: what a section belongs to."""
    lines = [f"{info.name} {'x'.join(map(str, info.shape))} {info.type.name}\n" for info in model.tensors.values()]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
