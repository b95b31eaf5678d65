"""Hugging Face checkpoints for tests: safetensors files written, and read the plain way; folders copied and changed."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "U8": "u1", "I64": "<i8", "F8_E4M3": "u1"}
Header = dict[str, Any]


def image(header: Header | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """A valid file: arrays by name, with the dtype's name (BF16: its bits)."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, array) in tensors.items():
        raw = array.tobytes()
        header[name] = entry(dtype, list(array.shape), len(data), len(data) + len(raw))
        data += raw
    path.write_bytes(image(header, data))


def read(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """All tensors of all files of a folder, as `write` takes them."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + struct.unpack("<Q", content[:8])[0]
        for name, said in json.loads(content[8:start]).items():
            if name != "__metadata__":
                first, last = said["data_offsets"]
                array = np.frombuffer(content[start + first : start + last], DTYPES[said["dtype"]])
                found[name] = said["dtype"], array.reshape(said["shape"])
    return found


def floats(dtype: str, array: np.ndarray) -> np.ndarray:
    """Stored values as float32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array.astype(np.float32)


def copied(source: Path, target: Path, settings: dict[str, Any] | None = None) -> Path:
    """A copy of a checkpoint with other settings in config.json; a setting of ... is taken out."""
    shutil.copytree(source, target)
    path = target / "config.json"
    config = {**json.loads(path.read_text()), **(settings or {})}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return target
