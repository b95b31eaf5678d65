"""Reading sections: against gguf's reader, then truncated, damaged, of another model, of wrong shapes, hostile."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sections
from gguf import GGUFReader, GGUFWriter

from hotcold.formats import section as section_module
from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import FormatError, HotcoldError, SectionError, UnsupportedError
from hotcold.formats.gguf import SPAN_ALIGNMENT, GGUFFile
from hotcold.formats.section import find_section
from hotcold.formats.section_file import Contents, SectionTensor, attach_section, detach_section, update_section
from hotcold.formats.section_layout import read_footer, sidecar_path, tensor_hash
from hotcold.formats.types import GGMLType


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_model(), tmp_path / "model.gguf"))


def found(path: Path) -> tuple[bool, list[str]]:
    """Whether a section is found, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with GGUFFile(path) as file:
            section = find_section(file)
            if section is not None:
                section.close()
    return section is not None, [str(warning.message) for warning in caught]


def test_no_section(model: Path) -> None:
    assert found(model) == (False, [])


@pytest.mark.parametrize("sidecar", [False, True])
def test_round_trip(model: Path, sidecar: bool) -> None:
    before = model.read_bytes()
    wanted = sections.contents()
    place = update_section(model, wanted, sidecar=sidecar)
    assert place == (sidecar_path(model) if sidecar else model)
    assert model.read_bytes()[: len(before)] == before and sidecar_path(model).exists() is sidecar
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        assert (section.path, section.attached) == (place, not sidecar)
        sections.assert_holds(section, wanted)
        assert section.parts() == list(sections.PARTS)
        profile, thresholds, predictors = section.profile(), section.thresholds(), section.predictors()
        assert profile is not None and thresholds is not None and predictors is not None and section.has_down_t()
        assert (profile.tokens, profile.dataset, profile.rule) == (2**40, "text of 0", "exact")
        for layer in range(2):
            freq = sections.values(f"blk.{layer}.ffn_act_freq", 0, 96)
            np.testing.assert_array_equal(profile.freq[layer], freq)
            np.testing.assert_array_equal(section.cut(layer), sections.values(f"blk.{layer}.ffn_pred_cut", 0, 96))
        np.testing.assert_array_equal(thresholds.densities, np.float32(sections.DENSITIES))
        np.testing.assert_array_equal(thresholds.values, sections.values("ffn_thresholds", 0, 3, 2))
        assert (predictors.kind, predictors.input, predictors.ranks) == ("relu", "ffn_norm", sections.RANKS)
        for info in section.image.tensors.values():
            assert section.image.address(info.name) % 32 == 0


def test_a_part_that_is_not_there_is_none(model: Path) -> None:
    update_section(model, sections.contents("thresholds"))
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        assert section.profile() is None and section.predictors() is None and not section.has_down_t()
        assert section.thresholds() is not None


def test_gguf_reads_an_attached_model_as_before(tiny_model: Callable[..., Path], model: Path) -> None:
    update_section(model, sections.contents())
    plain, attached = GGUFReader(tiny_model()), GGUFReader(model)
    assert [tensor.name for tensor in plain.tensors] == [tensor.name for tensor in attached.tensors]
    assert list(plain.fields) == list(attached.fields)
    for one, two in zip(plain.tensors, attached.tensors, strict=True):
        np.testing.assert_array_equal(one.data, two.data)
    with GGUFFile(tiny_model()) as one_file, GGUFFile(model) as two_file:
        assert one_file.tensors == two_file.tensors
        assert ModelConfig.from_gguf(one_file) == ModelConfig.from_gguf(two_file)


def test_gguf_reads_a_detached_section(model: Path, tmp_path: Path) -> None:
    wanted = sections.contents()
    update_section(model, wanted)
    detach_section(model, to=tmp_path / "out.gguf")
    reader = GGUFReader(tmp_path / "out.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "sparsity" and fields["general.architecture"] == "llama"
    assert fields["hotcold.format_version"] == 1
    assert reader.fields["hotcold.format_version"].types == [gguf.GGUFValueType.UINT32]
    assert reader.fields["hotcold.profile.tokens"].types == [gguf.GGUFValueType.UINT64]
    assert {key: fields[key] for key in wanted.metadata} == wanted.metadata
    with GGUFFile(model) as file:
        assert fields["hotcold.base.tensor_hash"] == tensor_hash(file)
    assert [tensor.name for tensor in reader.tensors] == [one.name for one in wanted.tensors]
    for theirs, ours in zip(reader.tensors, wanted.tensors, strict=True):
        assert tuple(theirs.shape.tolist()) == ours.shape and theirs.tensor_type == ours.type
        np.testing.assert_array_equal(theirs.data.view(np.uint8).reshape(-1), ours.data().reshape(-1))


def test_the_hash_is_over_names_shapes_and_types(tiny_model: Callable[..., Path]) -> None:
    def of(path: Path) -> str:
        with GGUFFile(path) as file:
            return tensor_hash(file)

    assert of(tiny_model()) == of(tiny_model(seed=1))  # other weights
    others = [tiny_model(n_ff=64), tiny_model(qtype="F16"), tiny_model(tied=True), tiny_model(n_layer=1)]
    assert len({of(path) for path in [tiny_model(), *others]}) == 5


def test_section_of_another_model(tiny_model: Callable[..., Path], model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(tiny_model(tied=True), tmp_path / "other.gguf"))
    update_section(other, sections.contents(), sidecar=True)
    shutil.copy(sidecar_path(other), tmp_path / "section.gguf")
    with pytest.raises(SectionError, match="of another model: got tensor hash .*detach"):
        attach_section(model, tmp_path / "section.gguf")
    assert found(model) == (False, [])
    shutil.copy(sidecar_path(other), sidecar_path(model))
    with pytest.raises(SectionError, match="of another model"):
        found(model)
    detach_section(model)
    assert not sidecar_path(model).exists()
    with pytest.raises(SectionError, match="got a file of type 'model', wanted a section"):
        attach_section(model, other)


def bounds(path: Path) -> tuple[int, int, int]:
    """(bare size, start of the section, size) of a model with a section."""
    with open(path, "rb") as file:
        footer = read_footer(file)
        assert footer is not None
        return footer.base_size, footer.offset, file.seek(0, 2)


def test_truncated_anywhere(model: Path) -> None:
    update_section(model, sections.contents())
    whole = model.read_bytes()
    base, start, size = bounds(model)
    assert start % SPAN_ALIGNMENT == 0 and base <= start
    rng = random.Random(1)
    cuts = {base, start - 1, start, start + 3, start + 4, size - 1, size - 56, size - 57, size - 100}
    cuts |= {rng.randrange(base, size) for _ in range(80)}
    for cut in sorted(cuts):
        model.write_bytes(whole[:cut])
        ok, said = found(model)
        assert not ok, cut
        if cut < start + 4:
            assert said == []
        else:
            (line,) = said
            assert line.startswith(f"{model}: a truncated or damaged section (") and "\n" not in line
    detach_section(model)
    assert model.read_bytes() == whole[:base]


def test_truncated_sidecar(model: Path) -> None:
    side = update_section(model, sections.contents(), sidecar=True)
    whole = side.read_bytes()
    with open(side, "rb") as file:
        length = read_footer(file).length  # type: ignore[union-attr]
    for cut in {*range(0, len(whole), 997), length - 1, length, length + 9, len(whole) - 1}:
        side.write_bytes(whole[:cut])
        ok, said = found(model)
        if cut < length - 31:  # what pads the last tensor is not missed
            assert not ok and len(said) == 1, cut
            with pytest.raises(HotcoldError):
                attach_section(model, side)
    with pytest.warns(UserWarning, match="a truncated or damaged section"):  # which is no obstacle
        update_section(model, sections.contents("profile"))
    assert found(model) == (True, []) and not side.exists()


def test_flipped_bytes(model: Path) -> None:
    wanted = sections.contents("profile", "thresholds")
    update_section(model, wanted)
    whole = model.read_bytes()
    _, start, size = bounds(model)
    n_found = 0
    for at in [*range(start, start + 40), *range(start + 40, size, 5), *range(size - 56, size)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        model.write_bytes(damaged)
        ok, said = found(model)
        assert ok == (not said), at
        if ok:  # padding between tensors holds nothing
            n_found += 1
            with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
                sections.assert_holds(section, wanted)
    assert n_found < 10


@pytest.mark.parametrize("field", ["base_size", "offset", "length", "header"])
@pytest.mark.parametrize("value", [0, 4096, 2**40, 2**64 - 1])
def test_a_footer_that_lies(model: Path, field: str, value: int) -> None:
    """With its checksum right: nothing is read past the file, and detaching does not cut into the model."""
    before = model.read_bytes()
    update_section(model, sections.contents("profile"))
    with open(model, "r+b") as file:
        footer = read_footer(file)
        assert footer is not None
        packed = replace(footer, **{field: value}).pack()
        file.seek(-len(packed), 2)
        file.write(packed)
    ok, said = found(model)
    assert not ok and len(said) == 1 and "a truncated or damaged section" in said[0]
    detach_section(model)
    assert model.read_bytes() == before


def test_damage_in_a_large_tensor_shows_when_it_is_verified(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(section_module, "SMALL", 1000)
    update_section(model, sections.contents())
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        assert section.footer is not None
        at = section.footer.offset + section.image.tensors["blk.1.ffn_down_t.weight"].offset
    with open(model, "r+b") as raw:
        raw.seek(at + 999)
        byte = raw.read(1)[0]
        raw.seek(at + 999)
        raw.write(bytes([byte ^ 8]))
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        assert section.damaged() == ["blk.1.ffn_down_t.weight"]
        assert len(section.checked("blk.0.ffn_down_t.weight")) == 64 * 96 // 32 * 34
        with pytest.raises(SectionError, match=r"checksum of tensor 'blk\.1\.ffn_down_t\.weight'"):
            section.checked("blk.1.ffn_down_t.weight")
    before = model.read_bytes()
    with pytest.raises(SectionError, match="checksum"):  # the damage is not signed anew
        update_section(model, sections.contents("profile", seed=1))
    assert model.read_bytes() == before and not sidecar_path(model).exists()
    update_section(model, sections.contents("down_t", seed=2))
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        assert section.damaged() == []


def f32(name: str, *ne: int, value: float = 0.5) -> SectionTensor:
    return SectionTensor(name, ne, GGMLType.F32, lambda: np.full(ne[::-1], value, np.float32).view(np.uint8))


def predictor(a: tuple[int, ...] = (64, 32), b: tuple[int, ...] = (32, 96), cut: tuple[int, ...] = (96,)) -> Any:
    blk = "blk.{}.ffn_pred_"
    return [
        f32(blk.format(layer) + name, *(ne if layer else good))
        for layer in (0, 1)
        for name, ne, good in (("a.weight", a, (64, 32)), ("b.weight", b, (32, 96)), ("cut", cut, (96,)))
    ]


KIND = {"hotcold.predictor.kind": "relu", "hotcold.predictor.input": "residual"}
FREQ = [f32("blk.0.ffn_act_freq", 96), f32("blk.1.ffn_act_freq", 96)]
WRONG: dict[str, tuple[dict[str, Any], list[SectionTensor], str]] = {
    "freq": ({}, [FREQ[0], f32("blk.1.ffn_act_freq", 95)], r"'blk.1.ffn_act_freq': shape: got \(95,\), wanted \(96,\)"),
    "freq 2d": ({}, [FREQ[0], f32("blk.1.ffn_act_freq", 96, 1)], r"got \(96, 1\), wanted \(96,\)"),
    "a layer missing": ({}, FREQ[:1], "'blk.1.ffn_act_freq': got none, wanted one, as there is 'blk.0"),
    "a layer too many": ({}, [*FREQ, f32("blk.2.ffn_act_freq", 96)], "got layer 2, wanted one of the model's 2"),
    "freq type": (
        {},
        [FREQ[0], SectionTensor("blk.1.ffn_act_freq", (96,), GGMLType.F16, lambda: np.zeros(192, np.uint8))],
        "type: got F16, wanted F32",
    ),
    "thresholds": (
        {"hotcold.threshold.densities": [0.5]},
        [f32("ffn_thresholds", 2, 2)],
        r"got \(2, 2\), wanted \(2, 1\)",
    ),
    "no densities": ({}, [f32("ffn_thresholds", 2, 1)], "hotcold.threshold.densities': got None"),
    "rank 33": (KIND, predictor((64, 33), (33, 96)), r"ffn_pred_a.weight': shape: got \(64, 33\), wanted .*of 32"),
    "a": (KIND, predictor((32, 32)), r"ffn_pred_a.weight': shape: got \(32, 32\), wanted \(64, 32\)"),
    "b rank": (KIND, predictor((64, 64)), r"ffn_pred_b.weight': shape: got \(32, 96\), wanted \(64, 96\)"),
    "b n_ff": (KIND, predictor(b=(32, 64)), r"ffn_pred_b.weight': shape: got \(32, 64\), wanted \(32, 96\)"),
    "a vector": (KIND, predictor((64,)), r"ffn_pred_a.weight': shape: got \(64,\)"),
    "cut": (KIND, predictor(cut=(1,)), r"ffn_pred_cut': shape: got \(1,\), wanted \(96,\)"),
    "no cut": (KIND, [one for one in predictor() if "cut" not in one.name], "'blk.0.ffn_pred_cut': got none"),
    "kind": ({**KIND, "hotcold.predictor.kind": "big"}, predictor(), "kind': got 'big', wanted 'relu' or 'dejavu'"),
    "kind number": ({**KIND, "hotcold.predictor.kind": 3}, predictor(), "kind': got 3, wanted"),
    "no input": ({"hotcold.predictor.kind": "relu"}, predictor(), "input': got None, wanted 'ffn_norm' or"),
    "down_t": (
        {},
        [f32("blk.0.ffn_down_t.weight", 64, 96), f32("blk.1.ffn_down_t.weight", 96, 64)],
        r"ffn_down_t.weight': shape: got \(96, 64\), wanted \(64, 96\)",
    ),
}  # fmt: skip


def write_plain(path: Path, model: Path, metadata: dict[str, Any], tensors: list[SectionTensor], **own: Any) -> None:
    """A section as another program might write one: gguf's writer alone, no checksums, no footer."""
    writer = GGUFWriter(path, "llama")
    writer.add_type(own.get("type", "sparsity"))
    writer.add_uint32("hotcold.format_version", own.get("version", 1))
    with GGUFFile(model) as file:
        writer.add_string("hotcold.base.tensor_hash", tensor_hash(file))
    for key, value in metadata.items():
        kind = {str: "string", int: "uint32", list: "array"}[type(value)]
        getattr(writer, f"add_{kind}")(key, value)
    for one in tensors:
        shape = [*one.shape[1:][::-1], one.shape[0] * one.type.type_size]
        writer.add_tensor(one.name, one.data().reshape(shape), raw_dtype=gguf.GGMLQuantizationType(one.type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_the_model(model: Path, name: str) -> None:
    metadata, tensors, message = WRONG[name]
    before = model.read_bytes()
    with pytest.raises(FormatError, match=message):
        update_section(model, Contents(metadata, tensors))
    assert model.read_bytes() == before and not sidecar_path(model).exists()
    write_plain(sidecar_path(model), model, metadata, tensors)
    with pytest.raises(FormatError, match=message) as caught:
        found(model)
    assert str(caught.value).startswith(f"{sidecar_path(model)}: ")


def test_a_section_without_checksums(model: Path) -> None:
    write_plain(sidecar_path(model), model, {**KIND, "hotcold.profile.tokens": 7}, [*FREQ, *predictor()])
    assert found(model) == (True, [])
    attach_section(model, sidecar_path(model))
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        profile, predictors = section.profile(), section.predictors()
        assert section.attached and profile is not None and predictors is not None
        assert (profile.tokens, predictors.ranks, predictors.input) == (7, (32, 32), "residual")
        assert (profile.freq == 0.5).all() and profile.freq.shape == (2, 96)


def test_a_newer_format(model: Path) -> None:
    write_plain(sidecar_path(model), model, {}, FREQ, version=2)
    with pytest.raises(UnsupportedError, match="a section of format 2 is not supported; 1 is"):
        found(model)
    detach_section(model)


BAD_VALUES = {
    "freq": ({}, [FREQ[0], f32("blk.1.ffn_act_freq", 96, value=1.5)], "profile"),
    "freq NaN": ({}, [FREQ[0], f32("blk.1.ffn_act_freq", 96, value=np.nan)], "profile"),
    "threshold": ({"hotcold.threshold.densities": [0.5]}, [f32("ffn_thresholds", 2, 1, value=-1)], "thresholds"),
    "rising": ({"hotcold.threshold.densities": [0.5, 0.75]}, [f32("ffn_thresholds", 2, 2)], "thresholds"),
    "density 2": ({"hotcold.threshold.densities": [2.0]}, [f32("ffn_thresholds", 2, 1)], "thresholds"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_that_cannot_be(model: Path, name: str) -> None:
    metadata, tensors, part = BAD_VALUES[name]
    update_section(model, Contents(metadata, tensors))
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        with pytest.raises(SectionError, match=r"ffn_act_freq: got|ffn_thresholds: got|densities: got"):
            getattr(section, part)()


def test_mutants(model: Path) -> None:
    """Without checksums in the way: whatever a section says, it loads, is passed over, or is one error of ours."""
    side = sidecar_path(model)
    write_plain(
        side, model, {**KIND, "hotcold.threshold.densities": [0.5]}, [*FREQ, *predictor(), f32("ffn_thresholds", 2, 1)]
    )
    whole, rng = side.read_bytes(), random.Random(5)
    outcomes = {"whole": 0, "damaged": 0, "error": 0}
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 5])):
            data[rng.randrange(0, 1900)] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
        side.write_bytes(data)
        try:
            with GGUFFile(model) as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                section = find_section(file)
                if section is None:
                    outcomes["damaged"] += 1
                    continue
                with section:
                    section.profile(), section.thresholds(), section.predictors(), section.cut(0)
                outcomes["whole"] += 1
        except HotcoldError as error:
            assert "\n" not in str(error) and len(str(error)) < 900
            outcomes["error"] += 1
    assert min(outcomes.values()) > 10, outcomes


def test_a_span_reads_as_the_file_does(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    image = tiny_model(qtype="Q8_0").read_bytes()
    path = tmp_path / "holder"
    path.write_bytes(bytes(3 * SPAN_ALIGNMENT) + image + b"what follows")
    with GGUFFile(tiny_model(qtype="Q8_0")) as plain, GGUFFile(path, (3 * SPAN_ALIGNMENT, len(image))) as span:
        assert span.metadata["general.name"] == "tiny" and span.tensors == plain.tensors
        for name in plain.tensors:
            np.testing.assert_array_equal(span.data(name), plain.data(name))
            assert span.address(name) % 32 == 0 and not span.data(name).flags.writeable
    size = path.stat().st_size
    for span_of in ((1, 99), (4096, 99), (-SPAN_ALIGNMENT, 99), (0, 0), (0, size + 1), (8 * SPAN_ALIGNMENT, 99)):
        with pytest.raises(FormatError, match="image: got"):
            GGUFFile(path, span_of)
    with pytest.raises(FormatError, match="truncated"):
        GGUFFile(path, (3 * SPAN_ALIGNMENT, len(image) - 40))
    with pytest.raises(FormatError, match="magic"):
        GGUFFile(path, (SPAN_ALIGNMENT, 99))
