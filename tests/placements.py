"""Placement problems for tests: small ones at random, which brute force can solve, and ones of a real model's size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from hotcold.solver.problem import Choice, Layer, Part, Problem, nbytes

GROUP = 64


def make_layer(
    freq: np.ndarray, row: float, attention: int, kv: int, cpu: float, gpu: float, link: float, always: float
) -> Layer:
    """A layer of neurons with these frequencies (descending).

    row: bytes of a neuron's three rows, a share of them, `always`, read even if it is not active. cpu, gpu, link:
    bandwidths in bytes a second. attention, kv: bytes, of which all are read.
    """
    n = np.append(np.arange(0, len(freq), GROUP), len(freq))
    active = np.concatenate([[0.0], np.cumsum(freq)])[n]
    read = row * (always * n + (1 - always) * active)
    cold, hot, mapped = (read[-1] - read) / cpu, read / gpu, (read[-1] - read) / link
    part = Part(attention + kv, attention / cpu, attention / gpu)
    sizes = (n * row).astype(np.int64)
    return Layer(part, sizes, cold, hot, mapped, active, attention / row, np.arange(len(freq), dtype=np.int32))


def random_problem(rng: np.random.Generator, n_layer: int, n_groups: int) -> Problem:
    """Any ratio of bandwidths, cost of a hand-over and budget; a last group that may be smaller; what is shared."""
    layers = []
    for _ in range(n_layer):
        n = n_groups * GROUP - int(rng.integers(0, GROUP)) * int(rng.integers(0, 2))
        freq = np.sort(rng.random(n) ** rng.uniform(0.1, 6))[::-1]
        row = float(rng.integers(50, 200))
        cpu, gpu, link = rng.uniform(1e7, 1e8), rng.uniform(5e7, 2e9), rng.uniform(1e7, 1e8)
        attention, kv = int(rng.integers(1, 4) * row * GROUP), int(rng.integers(0, 5000))
        layer = make_layer(freq, row, attention, kv, cpu, gpu, link, rng.random() * 0.5)
        # what is shared by all hot neurons, and what a dense layer saves if one side has it whole
        layer.nbytes[1:] += int(rng.integers(0, 500))
        layer.hot[1:] += rng.random() * 1e-5
        layer.cold[0] *= rng.uniform(0.8, 1)
        layer.nbytes[-1] -= int(layer.nbytes[-1] * rng.random() * 0.2) * int(rng.integers(0, 2))
        layers.append(layer)
    size = int(rng.integers(1, 6) * row * GROUP)
    head = Part(size, size / cpu, size / gpu)
    total = sum(int(layer.nbytes.max()) + layer.attention.nbytes for layer in layers) + size
    sync = float(rng.choice([0, 1e-5, 1e-4, 5e-4]) * rng.random() * 2)
    return Problem(tuple(layers), head, size / row, int(total * rng.uniform(0, 1.1)), sync, GROUP)


def real_problem(
    n_layer: int, n_groups: int, n_embd: int, budget: float, sparse: bool, sync: float = 25e-6, seed: int = 0
) -> Problem:
    """A model of 4.5 bits a weight on a CPU of 50 GB/s and a GPU of 700 GB/s; budget: share of its bytes.

    sparse: neurons active as those of ReLU models are, a few nearly always and most seldom; else all always.
    """
    rng = np.random.default_rng(seed)
    n_ff, row, cpu, gpu, link = n_groups * GROUP, n_embd * 4.5 / 8, 50e9, 700e9, 20e9
    layers = []
    for _ in range(n_layer):
        freq = np.ones(n_ff)
        if sparse:
            freq = np.clip(np.sort(rng.pareto(rng.uniform(0.6, 1.6), n_ff) * 0.03)[::-1], 0.001, 1)
        attention, kv = int(2.5 * n_embd * row), 4096 * 2048 * 2
        layers.append(make_layer(freq, 3 * row, attention, kv, cpu, gpu, link, 1 / 3 if sparse else 1.0))
    size = int(128_000 * row)
    total = sum(int(layer.nbytes[-1]) + layer.attention.nbytes for layer in layers) + size
    head = Part(size, size / cpu, size / gpu)
    return Problem(tuple(layers), head, size / (3 * row), int(total * budget), sync, GROUP)


def choices(problem: Problem) -> Iterator[Choice]:
    """All that fit."""
    for hot in itertools.product(*[range(len(layer.nbytes)) for layer in problem.layers]):
        for *attention, head in itertools.product((False, True), repeat=len(problem.layers) + 1):
            choice = Choice(hot, tuple(attention), head)
            if nbytes(problem, choice) <= problem.capacity:
                yield choice


def brute_force(problem: Problem, value: Callable[[Choice], float]) -> float:
    """The least value of all choices that fit."""
    return min(map(value, choices(problem)))
