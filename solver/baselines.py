"""Placements that need no solver: what the solved ones are compared with."""

from __future__ import annotations

import numpy as np

from .problem import Choice, Problem, nothing


def greedy(problem: Problem) -> Choice:
    """Whatever saves the CPU most time for its bytes, first; takes no notice of what hand-overs cost."""
    offers: list[tuple[float, int, int, int]] = []  # (-seconds saved a byte, layer, group or -1, bytes)
    for number, layer in enumerate(problem.layers):
        part = layer.attention
        offers.append((-(part.cpu - part.gpu) / max(1, part.nbytes), number, -1, part.nbytes))
        sizes, saved = np.diff(layer.nbytes), -np.diff(layer.cold) - np.diff(layer.hot)
        # a later group never comes before an earlier one, though the first one also brings what all share
        rates = np.minimum.accumulate(saved / np.maximum(1, sizes))
        offers += [(-rate, number, k, int(size)) for k, (rate, size) in enumerate(zip(rates, sizes, strict=True))]
    head = problem.head
    offers.append((-(head.cpu - head.gpu) / max(1, head.nbytes), len(problem.layers), -1, head.nbytes))
    hot, attention, with_head = [0] * len(problem.layers), [False] * len(problem.layers), False
    left = problem.capacity
    for rate, number, group, size in sorted(offers):
        if rate >= 0 or size > left or (group >= 0 and hot[number] != group):
            continue
        left -= size
        if group >= 0:
            hot[number] = group + 1
        elif number < len(attention):
            attention[number] = True
        else:
            with_head = True
    return Choice(tuple(hot), tuple(attention), with_head)


def naive(problem: Problem) -> Choice:
    """Whole layers, the last ones first, until the budget is full, then the output: as llama.cpp's -ngl does."""
    choice = nothing(problem)
    hot, attention, left = list(choice.hot), list(choice.attention), problem.capacity
    for number in reversed(range(len(hot))):
        layer = problem.layers[number]
        size = layer.attention.nbytes + int(layer.nbytes[-1])
        if size > left:
            return Choice(tuple(hot), tuple(attention), False)
        left -= size
        hot[number], attention[number] = len(layer.nbytes) - 1, True
    return Choice(tuple(hot), tuple(attention), problem.head.nbytes <= left)
