"""Profiles made by others, as a first guess: llama.cpp's imatrix GGUFs and PowerInfer's activation_{i}.pt."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..formats.config import ModelConfig
from ..formats.errors import FormatError, ParameterError, UnsupportedError
from ..formats.gguf import GGUFFile

PRIOR_TOKENS = 1024  # what a prior counts for beside tokens of the user's own text
_PT_NAME = re.compile(r"activation_(\d+)\.pt")


@dataclass(frozen=True)
class Prior:
    """freq: float32 [n_layer, n_ff] in 0..1, or by expert; tokens: what it was counted on, as far as its file tells."""

    freq: np.ndarray
    tokens: int
    source: str


def load(path: Path, n_layer: int, n_ff: int, density: float) -> Prior:
    """A folder of activation_{i}.pt (or one such file's folder), or an imatrix GGUF; `density` is for the latter."""
    if path.is_dir():
        return from_powerinfer(path, n_layer, n_ff)
    if path.suffix == ".pt":
        return from_powerinfer(path.parent, n_layer, n_ff)
    return from_imatrix(path, n_layer, n_ff, density)


def of_experts(path: Path, config: ModelConfig) -> Prior:
    """How often each expert is chosen, float32 [n_layer, n_expert]: an imatrix counts the tokens of each."""
    if path.is_dir() or path.suffix == ".pt":
        what = f"{path}: counts of neurons do not say how often experts are chosen"
        raise UnsupportedError(f"{what}; wanted an imatrix GGUF for a mixture of experts")
    with GGUFFile(path) as file:
        rows, tokens = [], 0.0
        for layer in range(config.n_layer):
            name = f"blk.{layer}.ffn_down_exps.weight.counts"
            counts = _values(file, name)
            if counts.size != config.n_expert:
                raise FormatError(path, f"tensor '{name}'", f"{counts.size} values", f"the model's {config.n_expert}")
            seen = float(counts.sum()) / config.n_expert_used
            if not (seen > 0 and np.isfinite(seen) and (counts >= 0).all()):
                raise FormatError(path, f"tensor '{name}'", "no counts", "how many tokens chose each expert")
            rows.append(np.minimum(1.0, counts / seen))
            tokens = max(tokens, seen)
    return Prior(np.array(rows, np.float32), int(tokens), f"imatrix {path.name}")


def from_imatrix(path: Path, n_layer: int, n_ff: int, density: float) -> Prior:
    """Frequencies from the mean squares of what meets ffn_down.

    An imatrix knows how strong a neuron is, not how often it is active. Taken is that all active neurons of a layer
    are equally strong: frequency = mean square / c, at most 1, with c such that the layer's mean is `density`.
    """
    with GGUFFile(path) as file:
        rows, tokens = [], 0.0
        for layer in range(n_layer):
            name = f"blk.{layer}.ffn_down.weight"
            sums, counts = (_values(file, f"{name}.{part}") for part in ("in_sum2", "counts"))
            if sums.size != n_ff:
                raise FormatError(path, f"tensor '{name}.in_sum2'", f"{sums.size} values", f"the model's {n_ff}")
            count = float(counts.max(initial=0.0))
            if not count > 0 or not np.isfinite(sums).all() or (sums < 0).any():
                raise FormatError(path, f"tensor '{name}.in_sum2'", "no counts, or no sums of squares", "both")
            rows.append(_capped(sums / count, density))
            tokens = max(tokens, count)
    return Prior(np.array(rows, np.float32), int(tokens), f"imatrix {path.name}")


def _values(file: GGUFFile, name: str) -> np.ndarray:
    info = file.tensors.get(name)
    if info is None or info.type.name != "F32":
        got = "no such tensor" if info is None else info.type.name
        raise FormatError(file.path, f"tensor '{name}'", got, "an F32 tensor, as an imatrix has it")
    return file.data(name).view("<f4").astype(np.float64)


def _capped(strength: np.ndarray, density: float) -> np.ndarray:
    """min(1, strength / c), with c such that the mean is density (or as near as the non-zero ones allow)."""
    ordered = np.sort(strength)[::-1]
    wanted = density * len(ordered)
    rest = np.append(np.cumsum(ordered[::-1])[::-1], 0.0)  # rest[k]: sum of all but the k strongest
    for full in range(len(ordered)):  # so many at 1
        if full >= wanted or rest[full] <= 0:
            break
        scale = rest[full] / (wanted - full)
        if ordered[full] <= scale:
            return np.minimum(1.0, strength / scale)
    return (strength > 0).astype(np.float64)


def from_powerinfer(folder: Path, n_layer: int, n_ff: int) -> Prior:
    """Frequencies from counts; the files do not say of how many tokens: as many as the busiest neuron was active in."""
    found: dict[int, Path] = {}
    for path in folder.iterdir():
        if match := _PT_NAME.fullmatch(path.name):
            found[int(match[1])] = path
    if sorted(found) != list(range(n_layer)):
        wanted = f"activation_0.pt to activation_{n_layer - 1}.pt, one for each layer"
        raise FormatError(folder, "files", f"{len(found)} named activation_N.pt", wanted)
    counts = np.array([_pt_counts(found[layer], n_ff) for layer in range(n_layer)])
    tokens = int(counts.max())
    if tokens <= 0:
        raise FormatError(folder, "counts", "all zero", "how often each neuron was active")
    return Prior((counts / tokens).astype(np.float32), tokens, f"PowerInfer {folder.name}")


def _pt_counts(path: Path, n_ff: int) -> np.ndarray:
    try:
        import torch
    except ImportError:
        raise UnsupportedError(f"{path}: reading it needs PyTorch: pip install 'hotcold[train]'") from None
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
        counts = np.asarray(value, np.float64).reshape(-1)
    except Exception as error:  # whatever a file that is no tensor makes torch raise
        raise FormatError(path, "contents", type(error).__name__, "a tensor saved by torch.save") from None
    if counts.size != n_ff or not np.isfinite(counts).all() or (counts < 0).any():
        raise FormatError(path, "counts", f"{counts.size} values", f"{n_ff} counts, one for each neuron")
    return counts


def check_density(density: float) -> float:
    """The density, if it lies between 0 and 1; ParameterError otherwise."""
    if not 0 < density < 1:
        raise ParameterError(f"density: got {density:g}, wanted a number between 0 and 1, such as 0.5")
    return density
