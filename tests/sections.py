"""Contents of sections for tiny models: every byte follows from the seed, so that a test knows what it must read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import Section
from hotcold.formats.section_file import Contents, SectionTensor
from hotcold.formats.types import GGMLType

DENSITIES = [1.0, 0.75, 0.5]  # exact in float32
RANKS = (32, 64)
PARTS = ("profile", "thresholds", "predictors", "down_t")
Sizes = tuple[int, int, int]
TINY: Sizes = (2, 64, 96)  # n_layer, n_embd, n_ff of tiny.make_tiny_model's defaults


def values(name: str, seed: int, *shape: int) -> np.ndarray:
    """float32 in [0, 1) of NumPy shape; not the same for two names or seeds."""
    rng = np.random.default_rng([seed, *name.encode()])
    return rng.random(shape, dtype=np.float32)


def tensor(name: str, seed: int, *ne: int) -> SectionTensor:
    return SectionTensor(name, ne, GGMLType.F32, lambda: values(name, seed, *ne[::-1]).view(np.uint8))


def blocks(name: str, seed: int, *ne: int) -> SectionTensor:
    """A Q8_0 tensor of arbitrary bytes."""
    n = int(np.prod(ne)) // 32 * 34

    def data() -> np.ndarray:
        return np.random.default_rng([seed, *name.encode()]).integers(0, 256, n, dtype=np.uint8)

    return SectionTensor(name, ne, GGMLType.Q8_0, data)


def contents(*parts: str, seed: int = 0, sizes: Sizes = TINY) -> Contents:
    """Those parts of a section for a model of these sizes; all if none is named."""
    n_layer, n_embd, n_ff = sizes
    metadata: dict[str, int | float | str | list[float]] = {}
    tensors: list[SectionTensor] = []
    for part in parts or PARTS:
        if part == "profile":
            metadata |= {"hotcold.profile.tokens": 2**40 + seed, "hotcold.profile.dataset": f"text of {seed}"}
            metadata |= {"hotcold.profile.rule": "exact"}
            tensors += [tensor(f"blk.{layer}.ffn_act_freq", seed, n_ff) for layer in range(n_layer)]
        elif part == "thresholds":
            metadata["hotcold.threshold.densities"] = list(DENSITIES)
            tensors.append(tensor("ffn_thresholds", seed, n_layer, len(DENSITIES)))
        elif part == "predictors":
            metadata |= {"hotcold.predictor.kind": "relu", "hotcold.predictor.input": "ffn_norm"}
            for layer in range(n_layer):
                rank = RANKS[layer % 2]
                tensors.append(blocks(f"blk.{layer}.ffn_pred_a.weight", seed, n_embd, rank))
                tensors.append(blocks(f"blk.{layer}.ffn_pred_b.weight", seed, rank, n_ff))
                tensors.append(tensor(f"blk.{layer}.ffn_pred_cut", seed, n_ff))
        else:
            tensors += [blocks(f"blk.{layer}.ffn_down_t.weight", seed, n_embd, n_ff) for layer in range(n_layer)]
    return Contents(metadata, tensors)


def assert_holds(section: Section, wanted: Contents) -> None:
    """The section has exactly these parts and every byte of them."""
    assert set(section.image.tensors) == {one.name for one in wanted.tensors}
    for one in wanted.tensors:
        info = section.image.tensors[one.name]
        assert (info.shape, info.type) == (one.shape, one.type)
        np.testing.assert_array_equal(section.image.data(one.name), one.data().reshape(-1))
    for key, value in wanted.metadata.items():
        got = section.image.get(key)
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == value
    assert section.damaged() == []


def joined(*several: Contents) -> Contents:
    metadata = {key: value for one in several for key, value in one.metadata.items()}
    return Contents(metadata, [tensor for one in several for tensor in one.tensors])


def read(path: Path, then: Callable[[Section | None], None]) -> None:
    """Open the model, find its section, look at it, close both."""
    from hotcold.formats.section import find_section

    with GGUFFile(path) as model:
        section = find_section(model)
        try:
            then(section)
        finally:
            if section is not None:
                section.close()
