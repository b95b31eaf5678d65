"""Placements in sections: kept beside other parts, and refused where their keys or neurons are not sound."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sections

from hotcold.formats.errors import FormatError, SectionError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import find_section
from hotcold.formats.section_file import Contents, SectionTensor, update_section
from hotcold.formats.types import GGMLType

KEYS = {
    "attention": "01", "head": 1, "n_ctx": 128, "budget": 2**33, "group": 32, "cold": "mapped",
    "objective": "ours", "hardware": "a box", "sparsity": "exact", "profile": "",
}  # fmt: skip
IDS = np.arange(0, 96, 3, dtype=np.int32)


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_model(), tmp_path / "model.gguf"))


def made(change: dict[str, Any] | None = None, drop: str = "", ids: np.ndarray = IDS, **tensor: Any) -> Contents:
    keys = {f"hotcold.placement.{key}": value for key, value in (KEYS | (change or {})).items() if key != drop}
    fields = {"name": "blk.1.ffn_hot_idx", "shape": ids.shape, "type": GGMLType.I32} | tensor
    return Contents(keys, [SectionTensor(data=lambda: np.ascontiguousarray(ids).view(np.uint8), **fields)])


def test_round_trip_beside_other_parts(model: Path) -> None:
    update_section(model, sections.contents("profile"))
    update_section(model, made())
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        assert section.parts() == ["profile", "placement"] and section.damaged() == []
        one = section.placement()
        assert one is not None and [len(ids) for ids in one.hot] == [0, 32] and not one.empty
        np.testing.assert_array_equal(one.hot[1], IDS)
        assert one.hot[1].dtype == np.int32 and one.attention == (False, True) and one.head is True
        for key in ("n_ctx", "budget", "group", "cold", "objective", "hardware", "sparsity", "profile"):
            assert getattr(one, key) == KEYS[key]
    update_section(model, made({"head": 0, "attention": "10"}, ids=IDS[:5]))  # replaced as a whole
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        one = section.placement()
        assert one is not None and len(one.hot[1]) == 5 and not one.head and one.attention == (True, False)
    update_section(model, Contents({}, []), drop=["placement"])
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        assert section.parts() == ["profile"] and section.placement() is None


def test_one_without_tensors(model: Path) -> None:
    update_section(model, Contents(made({"head": 0, "attention": "00"}).metadata, []))
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        one = section.placement()
        assert section.parts() == ["placement"] and one is not None and one.empty
    before = model.stat().st_size
    update_section(model, Contents({}, []), drop=["placement"])
    assert model.stat().st_size < before
    with GGUFFile(model) as file:
        assert find_section(file) is None


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (made({"attention": "011"}), "attention': got '011', wanted a string of 2 digits 0 or 1"),
        (made({"attention": "0x"}), "attention': got '0x'"),
        (made({"attention": 1}), "attention': got 1"),
        (made(drop="attention"), "attention': got None"),
        (made({"head": 2}), "head': got 2, wanted 0 or 1"),
        (made({"n_ctx": 0}), "n_ctx': got 0, wanted a positive integer"),
        (made({"budget": 2**63}), "budget': got 9223372036854775808"),
        (made({"group": "x"}), "group': got 'x'"),
        (made({"cold": "ssd"}), "cold': got 'ssd', wanted 'cpu' or 'mapped'"),
        (made(drop="hardware"), "hardware': got None, wanted a string"),
        (made(name="blk.2.ffn_hot_idx"), "got layer 2, wanted one of the model's 2 layers"),
        (made(type=GGMLType.F32), "type: got F32, wanted I32"),
        (made(ids=np.arange(97, dtype=np.int32)), r"shape: got (97,), wanted (96,)"),
        (made(ids=IDS.reshape(4, 8)), r"shape: got (4, 8), wanted (96,)"),
        (made(ids=np.zeros(0, np.int32)), r"shape: got (0,), wanted (96,)"),
    ],
)
def test_unsound_keys_and_shapes(model: Path, contents: Contents, said: str) -> None:
    before = model.read_bytes()
    with pytest.raises(FormatError) as error:
        update_section(model, contents)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert model.read_bytes() == before


@pytest.mark.parametrize("ids", [[3, 2], [5, 5], [-1, 3], [90, 96], [2**31 - 1], [-(2**31), 1], [2**31 - 1, -(2**31)]])
def test_neurons_out_of_order_or_range(model: Path, ids: list[int]) -> None:
    update_section(model, made(ids=np.array(ids, np.int32)))
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        with pytest.raises(SectionError, match="blk.1.ffn_hot_idx: got neurons from .* wanted 0 to 95, ascending"):
            section.placement()
