"""The adapter that `hotcold relufy --low-rank` writes: what is added to the public model, as a GGUF LoRA adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats.config import ModelConfig
from ..formats.errors import ParameterError
from ..formats.gguf import GGUFFile
from ..formats.lora import ACTIVATION, BYPASS, FLOORS, NORM_HASH, Factors, norm_hash
from ..formats.section_file import replacing
from .relu_file import add_notes

TYPES = {"F16": np.float16, "F32": np.float32}
PARTS = {part: f"ffn_{part}.weight" for part in ("gate", "up", "down")} | {"bypass": BYPASS}


def write(
    source: GGUFFile,
    config: ModelConfig,
    out: Path,
    factors: Callable[[int], Mapping[str, Factors]],
    floors: Sequence[float],
    notes: Mapping[str, Any],
    alpha: float | None = None,
    kind: str = "F16",
) -> None:
    """Write an adapter for the model `source`.

    factors(layer), asked for once each, gives what is added to "gate", "up" and "down", b @ a, and as such a product
    the "bypass" itself; those that there are. floors: by layer, below which an activated gate counts as 0. notes (str,
    int, float or list of str) are added to the metadata. alpha: what the file says; b is stored so that alpha / rank
    times b @ a is what was given. None: the rank of the first, by which nothing changes. kind: F16 or F32. The file is
    known to be for this model, in whatever type, by its norms (formats/lora.py). A failed or interrupted run leaves
    nothing behind. Raises ParameterError for factors of the wrong shapes, or that are not finite in `kind`, and
    StorageError.
    """
    from gguf import GGUFWriter

    if kind not in TYPES:
        raise ParameterError(f"type of an adapter: got {kind!r:.20}, wanted one of {', '.join(TYPES)}")
    if len(floors) != config.n_layer:
        raise ParameterError(f"floors: got {len(floors)}, wanted {config.n_layer}, one for each layer")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ParameterError(f"alpha: got {alpha}, wanted a number above 0")
    halves: dict[str, NDArray[Any]] = {}  # as they are stored: the file's size
    for layer in range(config.n_layer):
        for part, given in factors(layer).items():
            rank = _check(config, layer, part, given)
            alpha = alpha or float(rank)
            name = f"blk.{layer}.{PARTS[part]}"
            for half, values in (("a", given.a), ("b", given.b * np.float32(rank / alpha))):
                with np.errstate(over="ignore"):
                    stored = np.ascontiguousarray(values, TYPES[kind])
                if not np.isfinite(stored).all():
                    raise ParameterError(f"{name}.lora_{half}: got weights that are not finite in {kind}")
                halves[f"{name}.lora_{half}"] = stored
    if not halves:
        raise ParameterError("factors: got none, wanted those of at least one matrix")
    with replacing(out, "name a file that can be written there") as part_file:
        writer = GGUFWriter(part_file, config.arch)
        try:
            _write_metadata(writer, source, config, floors, notes, alpha or 0.0)
            for name, stored in halves.items():
                writer.add_tensor(name, stored)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        with open(part_file, "rb+") as file:
            os.fsync(file.fileno())


def _check(config: ModelConfig, layer: int, part: str, given: Factors) -> int:
    """The rank of a pair of factors."""
    shapes = dict.fromkeys(("gate", "up"), (config.n_ff, config.n_embd))
    shapes |= {"down": (config.n_embd, config.n_ff), "bypass": (config.n_embd, config.n_embd)}
    if part not in shapes:
        raise ParameterError(f"factors of layer {layer}: got {part!r:.20}, wanted some of {', '.join(shapes)}")
    n_out, n_in = shapes[part]
    rank = given.a.shape[0]
    if given.a.shape != (rank, n_in) or given.b.shape != (n_out, rank) or not rank:
        got = f"a {given.a.shape} and b {given.b.shape}"
        raise ParameterError(f"factors of layer {layer}, {part}: got {got}, wanted (rank, {n_in}) and ({n_out}, rank)")
    return rank


def _write_metadata(
    writer: Any, source: GGUFFile, config: ModelConfig, floors: Sequence[float], notes: Mapping[str, Any], alpha: float
) -> None:
    from gguf import GGUFValueType

    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_string(f"{config.arch}.{ACTIVATION}", "relu")
    floats = [float(floor) for floor in floors]
    writer.add_key_value(f"{config.arch}.{FLOORS}", floats, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    writer.add_string(NORM_HASH, norm_hash(source))
    own: dict[str, Any] = {
        "general.name": f"{config.name} ReLU adapter",
        "general.base_model.count": 1,
        "general.base_model.0.name": config.name,
    }
    add_notes(writer, own | dict(notes))
