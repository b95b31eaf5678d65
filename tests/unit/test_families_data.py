"""The checked-in families are whole, and such that a mistake in computing them shows."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from families import BY_NAME, FAMILIES, Family, relative_error


def header(file: Path) -> dict[str, dict[str, object]]:
    """The tensors of a safetensors file: name -> dtype, shape, data_offsets."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    tensors = json.loads(data[8 : 8 + length])
    tensors.pop("__metadata__", None)
    assert max(tensor["data_offsets"][1] for tensor in tensors.values()) == len(data) - 8 - length
    return tensors


def test_every_family_is_here() -> None:
    """So that no test passes for having found nothing."""
    assert len(FAMILIES) == 30
    kinds = {json.loads((family.folder / "config.json").read_text())["model_type"] for family in FAMILIES}
    assert len(kinds) == 22


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_expected_logits(family: Family) -> None:
    """There is something to get wrong: a prompt past every window, logits that vary between tokens and positions."""
    config = json.loads((family.folder / "config.json").read_text())
    window = config.get("sliding_window") or 0
    assert window >= 4096 or window < len(family.prompt) - 8
    assert len({len(ids) for ids, _ in family.batch} | {len(family.prompt)}) == 4
    for ids, logits in [(family.prompt, family.logits), *family.batch]:
        assert len(ids) <= family.n_ctx
        assert logits.shape == (len(ids), config["vocab_size"]) and logits.dtype == np.float32
        assert np.isfinite(logits).all() and logits.std() > 0.5
        assert relative_error(logits[1:], logits[:-1]) > 0.5
        assert ids.min() >= 0 and ids.max() < config["vocab_size"]


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_shards_are_indexed(name: str) -> None:
    folder = BY_NAME[name].folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {tensor: file.name for file in folder.glob("*.safetensors") for tensor in header(file)}
    assert found == index["weight_map"] and len(set(found.values())) == 2


def test_they_stay_small() -> None:
    """A few hundred kilobytes each."""
    for family in FAMILIES:
        assert sum(file.stat().st_size for file in family.folder.iterdir()) < 500_000
