"""LoRA adapters with random weights, and models into which they are merged by NumPy."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize

from hotcold import GGUFFile

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output")
FFN = ("ffn_gate", "ffn_up", "ffn_down")


def matrices(model: Path, parts: Iterable[str] = (*ATTENTION, *FFN)) -> dict[str, tuple[int, int]]:
    """(n_out, n_in) of a model's matrices in its blocks, those of some parts."""
    wanted = {f"{part}.weight" for part in parts}
    with GGUFFile(model) as file:
        found = {name: info.shape[::-1] for name, info in file.tensors.items()}
    return {name: (shape[0], shape[1]) for name, shape in found.items() if name.split(".", 2)[-1] in wanted}


def make_adapter(
    path: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int = 4,
    alpha: float | None = 8.0,
    arch: str = "llama",
    qtype: str = "F32",
    strength: float = 0.3,
    kind: str = "lora",
    metadata: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Write an adapter of matrices [n_out, n_in]; what it adds to each at scale 1, float32."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(str(path), arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", kind)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for key, value in (metadata or {}).items():
        writer.add_array(key, value) if isinstance(value, list) else writer.add_string(key, value)
    added = {}
    for name, (n_out, n_in) in shapes.items():
        a = rng.normal(0, n_in**-0.5, (rank, n_in)).astype(np.float32)
        b = (rng.normal(0, rank**-0.5, (n_out, rank)) * strength).astype(np.float32)
        for half, values in (("a", a), ("b", b)):
            if qtype == "F16":
                values[:] = values.astype(np.float16)
                writer.add_tensor(f"{name}.lora_{half}", values.astype(np.float16))
            elif qtype == "F32" or values.shape[1] % 32:
                writer.add_tensor(f"{name}.lora_{half}", values)
            else:
                form = GGMLQuantizationType[qtype]
                writer.add_tensor(f"{name}.lora_{half}", quantize(values, form), raw_dtype=form)
        if np.isfinite(b).all():
            added[name] = b @ a * (alpha / rank if alpha else 1.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return added


def merged(model: Path, to: Path, *changes: tuple[Mapping[str, np.ndarray], float]) -> Path:
    """A copy of an F32 model to whose matrices scaled changes are added."""
    shutil.copy(model, to)
    reader = GGUFReader(str(to), "r+")
    for added, scale in changes:
        for tensor in reader.tensors:
            if tensor.name in added:
                tensor.data[...] += added[tensor.name] * np.float32(scale)
    reader.data.flush()
    assert math.isfinite(float(reader.tensors[0].data.sum()))
    return to
