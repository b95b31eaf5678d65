"""The cold neurons of split layers: compact copies of their rows, which the CPU then reads as a model's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..formats.config import ModelConfig
from ..formats.errors import ParameterError
from ..formats.types import GGMLType
from .graph import part
from .memory import aligned
from .tensors import Tensors

if TYPE_CHECKING:
    from ..formats.section import Placement

_MATRICES = ("ffn_gate.weight", "ffn_up.weight", "ffn_down_t.weight", "ffn_pred_b.weight")
_VECTORS = ("ffn_gate.bias", "ffn_up.bias", "ffn_pred_cut")
_GROUP = 32
_CHUNK = 1024  # rows copied at a time


def check_placement(placement: Placement, config: ModelConfig) -> None:
    """Raise ParameterError for a placement that does not fit the model.

    Neurons of a layer that is split come in groups of 32, the block of quantised activations; those of a mixture of
    experts as whole experts.
    """
    n_ff = config.n_ff
    if len(placement.hot) != config.n_layer or len(placement.attention) != config.n_layer:
        raise ParameterError(f"placement: got {len(placement.hot)} layers, wanted {config.n_layer}")
    for layer, ids in enumerate(placement.hot):
        if len(ids) and not (0 <= ids[0] and ids[-1] < n_ff and (np.diff(ids) > 0).all()):
            raise ParameterError(
                f"placement: layer {layer}: got ids from {ids.min()} to {ids.max()}, wanted 0 to {n_ff - 1}, ascending"
            )
        if config.n_expert:
            _check_experts(layer, ids, config.expert_neurons)
        elif len(ids) % _GROUP and len(ids) != n_ff:
            raise ParameterError(f"placement: layer {layer}: got {len(ids)} hot neurons, wanted a multiple of {_GROUP}")


def _check_experts(layer: int, ids: np.ndarray, each: int) -> None:
    """Every expert with a hot neuron has hot ones only."""
    experts, counts = np.unique(ids // each, return_counts=True)
    for expert, count in zip(experts, counts, strict=True):
        if count != each:
            raise ParameterError(
                f"placement: layer {layer}: got {count} hot neurons of expert {expert}, wanted none or all {each}"
            )


def add_cold(tensors: Tensors, config: ModelConfig, hot: tuple[np.ndarray, ...]) -> int:
    """Add the `@cold` rows of every layer that has both kinds, in the file's order; the bytes that they take.

    hot: by layer, the neurons on the GPU, int32, sorted. What they are copied from stays in the file, mapped and no
    longer read, so it takes no memory that is wanted elsewhere. Of experts nothing is copied, as the CPU reads those
    that are its own in place: `blk.N.experts@cold`, uint8 [n_expert], is 1 for them.
    """
    copied = 0
    for layer, ids in enumerate(hot):
        if not 0 < len(ids) < config.n_ff:
            continue
        if config.n_expert:
            here = np.ones(config.n_expert, np.uint8)
            here[ids // config.expert_neurons] = 0
            tensors.add(part(f"blk.{layer}.experts", "cold"), here.shape, GGMLType.I8, here)
            continue
        cold = others(ids, config.n_ff)
        for name in (f"blk.{layer}.{suffix}" for suffix in (*_MATRICES, *_VECTORS)):
            if name in tensors:
                copied += _take(tensors, name, cold)
    return copied


def others(hot: np.ndarray, n_ff: int) -> np.ndarray:
    """The cold neurons of a layer, sorted, from its hot ones."""
    return np.setdiff1d(np.arange(n_ff), hot)


def _take(tensors: Tensors, name: str, ids: np.ndarray) -> int:
    """Copy rows of a matrix as they are, and entries of a vector as float32."""
    info = tensors.info(name)
    shape: tuple[int, ...]
    if len(info.shape) > 1:
        shape, kind = (info.shape[0], len(ids)), info.type
        data = tensors.data(name).reshape(info.n_rows, -1)
    else:
        shape, kind = (len(ids),), GGMLType.F32
        data = np.ascontiguousarray(tensors.dequantized(name), np.float32).view(np.uint8).reshape(info.shape[0], -1)
    row = data.shape[1]
    out = aligned(len(ids) * row)
    rows = out.reshape(len(ids), row)
    for start in range(0, len(ids), _CHUNK):
        rows[start : start + _CHUNK] = data[ids[start : start + _CHUNK]]
    tensors.add(part(name, "cold"), shape, kind, out)
    return out.nbytes
