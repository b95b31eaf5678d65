"""Opening the GPU and loading a model's part into it, within its budget."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ...formats.config import ModelConfig
from ..executor import CPUExecutor
from ..graph import Graph
from ..schedule import Segment
from ..tensors import Tensors
from ..trace import Trace
from .device import open_device
from .executor import GPUExecutor

if TYPE_CHECKING:
    from ...formats.section import Placement

_SENT = ("x", "o", "logits")  # values that are copied between the two memories


def load(
    segments: list[Segment],
    graph: Graph,
    tensors: Tensors,
    config: ModelConfig,
    cpu: CPUExecutor,
    placement: Placement,
    n_blocks: int,
    n_ctx: int,
    n_threads: int,
    sizes: dict[str, int],
    trace: Trace | None,
    progress: Callable[[str], None] | None,
) -> GPUExecutor:
    """The executor of the GPU's segments. GPUError if there is no usable GPU, or the budget does not hold."""
    device = open_device()
    try:
        for rope in cpu.ropes:
            rope.upto(n_ctx)
        global_table, local_table = (rope.table for rope in cpu.ropes)
        buffers = cpu.tape.buffers
        host: dict[str, np.ndarray] = {name: buffers[name].view(np.float32) for name in _SENT if name in buffers}
        gpu = GPUExecutor(
            segments,
            graph,
            tensors,
            config,
            device,
            host,
            cpu.tokens,
            (global_table, local_table),
            placement.hot,
            n_blocks,
            n_ctx,
            n_threads,
            sizes,
            trace is not None,
            progress,
        )
        device.check_budget(placement.budget)
    except BaseException as error:
        # the frames of what failed hold on to arrays
        for one in (error, error.__cause__, error.__context__):
            if one is not None:
                traceback.clear_frames(one.__traceback__)
        device.close()
        raise
    return gpu
