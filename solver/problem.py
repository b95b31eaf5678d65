"""What a placement decides, and what each choice costs: the arithmetic under all objectives.

In each layer the neurons are sorted by how often they are active and cut into groups; the hot ones are the k groups
that are active most often. For equally large groups no other k save the CPU more. Attention (with its KV cache) and the
output are on one side as a whole. With s the cost of a hand-over of the residual between the sides, p = 1 for attention
on the GPU, a layer's FFN takes

    k = 0            cold[0] + s p                                      and leaves the residual with the CPU
    0 < k < all      max(cold[k] + s p + s, hot[k] + s (1 - p))         with the GPU: the CPU sends its sum there
    k = all          hot[k] + s (1 - p)                                 with the GPU
    0 < k, mapped    hot[k] + mapped[k] + s (1 - p)                     with the GPU, which reads cold rows itself

and s more where the next attention, or the output, is on the other side. The first input comes from the CPU and the
logits go there. A run of layers wholly on the GPU so pays no s within. This is sum_l max(T_cpu, T_gpu + T_sync y) of
PowerInfer's engine with the hand-overs counted where they happen (runtime/decoder.py puts them there). Where attention
and FFN read the same residual, it may go to the FFN's side once more, before attention; that is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Part:
    """What is on one side as a whole: bytes on the GPU, and seconds a token takes on each side."""

    nbytes: int
    cpu: float
    gpu: float


@dataclass(frozen=True)
class Layer:
    """A layer; arrays [G + 1] by the number of hot groups.

    nbytes: int64, what the hot ones take on the GPU. cold: seconds the CPU takes for the others, 0 for the last. hot:
    the GPU for the hot. mapped: the GPU for the others out of the host's memory. active: neurons active among the hot.
    impact: that of attention, as active neurons of as many bytes. order: int32 [n_ff], neurons, the most active first.
    """

    attention: Part
    nbytes: NDArray[np.int64]
    cold: NDArray[np.float64]
    hot: NDArray[np.float64]
    mapped: NDArray[np.float64]
    active: NDArray[np.float64]
    impact: float
    order: NDArray[np.int32]

    def seconds(self, on_gpu: bool, sync: float, mapped: bool) -> NDArray[np.float64]:
        """Of the FFN by hot groups, float64 [G + 1]; on_gpu: where its input is. See the module's docstring."""
        gpu = self.hot + (0.0 if on_gpu else sync)
        if mapped:
            taken = gpu + self.mapped
        else:
            taken = np.maximum(gpu, self.cold + (2 * sync if on_gpu else sync))
        taken[-1] = gpu[-1]
        taken[0] = self.cold[0] + (sync if on_gpu else 0.0)
        return taken


@dataclass(frozen=True)
class Problem:
    """All that a placement depends on. capacity: bytes for weights and KV cache. sync: seconds of a hand-over."""

    layers: tuple[Layer, ...]
    head: Part
    head_impact: float
    capacity: int
    sync: float
    group: int


@dataclass(frozen=True)
class Choice:
    """A placement in terms of a Problem: hot groups and attention by layer, and the output."""

    hot: tuple[int, ...]
    attention: tuple[bool, ...]
    head: bool


def nothing(problem: Problem) -> Choice:
    """All on the CPU."""
    n = len(problem.layers)
    return Choice((0,) * n, (False,) * n, False)


def nbytes(problem: Problem, choice: Choice) -> int:
    """Bytes on the GPU."""
    total = problem.head.nbytes if choice.head else 0
    for layer, k, on_gpu in zip(problem.layers, choice.hot, choice.attention, strict=True):
        total += int(layer.nbytes[k]) + (layer.attention.nbytes if on_gpu else 0)
    return total


def seconds(problem: Problem, choice: Choice, mapped: bool = False) -> float:
    """A token's time."""
    return sum(parts(problem, choice, mapped))


def parts(problem: Problem, choice: Choice, mapped: bool) -> Iterator[float]:
    """A token's time layer by layer, then that of the output."""
    unit = False  # where the residual is: True for the GPU
    for layer, k, on_gpu in zip(problem.layers, choice.hot, choice.attention, strict=True):
        taken = layer.attention.gpu if on_gpu else layer.attention.cpu
        taken += problem.sync * (unit != on_gpu)
        yield taken + float(layer.seconds(on_gpu, problem.sync, mapped)[k])
        unit = k > 0
    head = problem.head.gpu + problem.sync if choice.head else problem.head.cpu
    yield head + problem.sync * (unit != choice.head)
