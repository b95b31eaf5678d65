"""The cold neurons of split layers: compact copies of their rows, which the CPU then reads as a model's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..formats.config import ModelConfig
from ..formats.errors import ParameterError
from .graph import part
from .memory import aligned
from .tensors import Tensors

if TYPE_CHECKING:
    from ..formats.section import Placement

_MATRICES = ("ffn_gate.weight", "ffn_up.weight", "ffn_down_t.weight", "ffn_pred_b.weight")
_GROUP = 32
_CHUNK = 1024  # rows copied at a time


def check_placement(placement: Placement, config: ModelConfig) -> None:
    """Raise ParameterError for a placement that does not fit the model.

    Neurons of a layer that is split come in groups of 32, the block of quantised activations.
    """
    n_ff = config.n_ff
    if len(placement.hot) != config.n_layer or len(placement.attention) != config.n_layer:
        raise ParameterError(f"placement: got {len(placement.hot)} layers, wanted {config.n_layer}")
    for layer, ids in enumerate(placement.hot):
        if len(ids) and not (0 <= ids[0] and ids[-1] < n_ff and (np.diff(ids) > 0).all()):
            raise ParameterError(f"placement: layer {layer}: got ids from {ids.min()} to {ids.max()}, wanted 0 to "
                                 f"{n_ff - 1}, ascending")
        if len(ids) % _GROUP and len(ids) != n_ff:
            raise ParameterError(f"placement: layer {layer}: got {len(ids)} hot neurons, wanted a multiple of {_GROUP}")


def add_cold(tensors: Tensors, config: ModelConfig, hot: tuple[np.ndarray, ...]) -> int:
    """Add the `@cold` rows of every layer that has both kinds, in the file's order; the bytes that they take.

    hot: by layer, the neurons on the GPU, int32, sorted. What they are copied from stays in the file, mapped and no
    longer read, so it takes no memory that is wanted elsewhere.
    """
    copied = 0
    for layer, ids in enumerate(hot):
        if 0 < len(ids) < config.n_ff:
            cold = others(ids, config.n_ff)
            for name in _MATRICES:
                if f"blk.{layer}.{name}" in tensors:
                    copied += _take(tensors, f"blk.{layer}.{name}", cold)
            if f"blk.{layer}.ffn_pred_cut" in tensors:
                copied += _take(tensors, f"blk.{layer}.ffn_pred_cut", cold)
    return copied


def others(hot: np.ndarray, n_ff: int) -> np.ndarray:
    """The cold neurons of a layer, sorted, from its hot ones."""
    return np.setdiff1d(np.arange(n_ff), hot)


def _take(tensors: Tensors, name: str, ids: np.ndarray) -> int:
    info = tensors.info(name)
    matrix = len(info.shape) > 1
    data = tensors.data(name).reshape(info.n_rows if matrix else info.shape[0], -1)
    row = data.shape[1]
    out = aligned(len(ids) * row)
    rows = out.reshape(len(ids), row)
    for start in range(0, len(ids), _CHUNK):
        rows[start : start + _CHUNK] = data[ids[start : start + _CHUNK]]
    tensors.add(part(name, "cold"), (info.shape[0], len(ids)) if matrix else (len(ids),), info.type, out)
    return out.nbytes
