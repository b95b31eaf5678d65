"""PowerInfer's checkpoints: read, run densely and by their own predictors, converted; and broken ones."""

from __future__ import annotations

import math
import random
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import naive
import numpy as np
import pytest
import sections
from gguf import GGUFReader
from powerinfer_files import RANKS, Tiny, oracle
from rawgguf import kv, scalar, string
from typer.testing import CliRunner

from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import FormatError, HotcoldError, ParameterError, StorageError, UnsupportedError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.powerinfer_convert import convert
from hotcold.formats.section import find_section, stored_section
from hotcold.formats.section_file import update_section
from hotcold.formats.section_layout import sidecar_path
from hotcold.formats.types import GGMLType
from hotcold.runtime.engine import Engine
from hotcold.tools.cli import app

IDS = [1, 70, 104, 111, 260, 261, 263, 20, 33, 275]


def silent(what: str, done: int, total: int | None) -> None:
    pass


@pytest.mark.parametrize(("arch", "activation"), [("llama", "relu"), ("bamboo", "drelu")])
def test_config(tmp_path: Path, arch: str, activation: str) -> None:
    with GGUFFile(Tiny(arch).write(tmp_path / "m.powerinfer.gguf")) as file:
        assert file.powerinfer and file.version == 3
        config = ModelConfig.from_gguf(file)
    assert (config.arch, config.activation, config.rope_style) == (arch, activation, "norm")
    assert (config.n_layer, config.n_embd, config.n_ff, config.n_head_kv) == (2, 64, 96, 2)
    assert not config.tied_output and config.name == "LLaMA v2"


def test_an_ordinary_file_is_none_of_them(tmp_path: Path, tiny_model: Any) -> None:
    with GGUFFile(tiny_model()) as file:
        assert not file.powerinfer
    plain = Tiny(magic=b"GGUF").write(tmp_path / "m.gguf")
    with GGUFFile(plain) as file, pytest.raises(FormatError, match="ffn_down.weight': got no such tensor"):
        ModelConfig.from_gguf(file)
    patched = tmp_path / "p.gguf"
    patched.write_bytes(b"PWRI" + tiny_model().read_bytes()[4:])
    with GGUFFile(patched) as file, pytest.raises(FormatError, match="ffn_down_t.weight': got no such tensor"):
        ModelConfig.from_gguf(file)


@pytest.mark.parametrize("threshold", [None, 0.0, -1.5, 2.25])
def test_what_it_has_is_a_section(tmp_path: Path, threshold: float | None) -> None:
    tiny = Tiny(threshold=threshold)
    tensors = tiny.tensors()
    with GGUFFile(tiny.write(tmp_path / "m.gguf")) as file:
        assert stored_section(file) is None
        with find_section(file) as section:  # type: ignore[union-attr]
            predictors = section.predictors()
            assert predictors is not None and section.has_down_t() and section.profile() is None
            assert (predictors.kind, predictors.input, predictors.ranks) == ("relu", "residual", RANKS)
            for layer in range(2):
                for ours, theirs in (("ffn_pred_a", "fc1"), ("ffn_pred_b", "fc2"), ("ffn_down_t", "ffn_down_t")):
                    name = f"blk.{layer}.{ours}.weight"
                    assert section.image.data(name).tobytes() == tensors[f"blk.{layer}.{theirs}.weight"][2]
                    where = section.image.address(name)
                    assert where == section.image.data(name).__array_interface__["data"][0] and where % 32 == 0
                np.testing.assert_array_equal(section.cut(layer), np.full(96, threshold or 0.0, np.float32))
            assert section.damaged() == []
        assert not file.closed and file.data("output_norm.weight").size == 256


def test_without_predictors(tmp_path: Path) -> None:
    with GGUFFile(Tiny(predictors=False).write(tmp_path / "m.gguf")) as file:
        with find_section(file) as section:  # type: ignore[union-attr]
            assert section.parts() == ["down_t"] and section.predictors() is None


def test_a_section_made_later_lies_over_it(tmp_path: Path) -> None:
    model = Tiny().write(tmp_path / "m.gguf")
    before = model.read_bytes()
    update_section(model, sections.contents("profile", "thresholds"))
    assert model.read_bytes()[: len(before)] == before
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        assert section.parts() == list(sections.PARTS) and section.profile() is not None
        assert section.predictors().input == "residual"  # type: ignore[union-attr]
    update_section(model, sections.contents("predictors"))
    with GGUFFile(model) as file:
        with find_section(file) as section:  # type: ignore[union-attr]
            assert section.predictors().input == "ffn_norm"  # type: ignore[union-attr]
            np.testing.assert_array_equal(section.cut(1), sections.values("blk.1.ffn_pred_cut", 0, 96))
        with stored_section(file) as stored:  # type: ignore[union-attr]
            assert stored.parts() == ["profile", "thresholds", "predictors"]  # what it had itself is not stored again


def logits(path: Path, sparsity: str) -> np.ndarray:
    with Engine(path, n_threads=1, sparsity=sparsity) as engine:
        return np.array(engine.eval(engine.new_sequence(), IDS, all_logits=True))


class Predicted(naive.Model):
    """Neurons that PowerInfer's rule leaves out are zero."""

    threshold = 0.0
    kept: list[float] = []

    def forward(self, ids: Any) -> np.ndarray:
        self.residual = np.zeros(0)
        return super().forward(ids)

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        if name.endswith("ffn_norm"):
            self.residual = x
        return super()._norm(name, x)

    def _ffn(self, layer: int, x: np.ndarray) -> np.ndarray:
        hidden = np.maximum(self._linear(f"blk.{layer}.fc1", self.residual), 0)
        keep = self._linear(f"blk.{layer}.fc2", hidden) >= self.threshold
        self.kept.append(float(keep.mean()))
        gate, up = self._linear(f"blk.{layer}.ffn_gate", x), self._linear(f"blk.{layer}.ffn_up", x)
        return self._linear(f"blk.{layer}.ffn_down", np.where(keep, naive.glu(gate, up, self.activation), 0.0))


@pytest.mark.parametrize("arch", ["llama", "bamboo"])
def test_it_runs(tmp_path: Path, arch: str) -> None:
    tiny = Tiny(arch, threshold=0.75)
    path = tiny.write(tmp_path / "m.powerinfer.gguf")
    model = oracle(tiny, tmp_path)
    wanted = model.forward(IDS)
    for mode in ("dense", "exact", "auto"):
        np.testing.assert_allclose(logits(path, mode), wanted, rtol=2e-3, atol=2e-3)
    predicted = Predicted(**{name: getattr(model, name) for name in model.__dataclass_fields__})
    predicted.threshold, predicted.kept = 0.75, []
    by_rule = predicted.forward(IDS)
    assert 0.2 < np.mean(predicted.kept) < 0.8 and np.abs(by_rule - wanted).max() > 0.05
    with Engine(path, n_threads=1, sparsity="predict") as engine:
        sequence = engine.new_sequence()
        got = np.concatenate([np.array(engine.eval(sequence, [token])) for token in IDS])
    np.testing.assert_allclose(got, by_rule, rtol=2e-3, atol=2e-3)


# what is broken

BROKEN: dict[str, tuple[Tiny, type[HotcoldError], str]] = {
    "falcon": (Tiny("falcon"), UnsupportedError, "PowerInfer files of architecture 'falcon' are not supported"),
    "opt": (Tiny("opt"), UnsupportedError, "PowerInfer files of architecture 'opt' are not supported"),
    "qwen2": (Tiny("qwen2"), UnsupportedError, "PowerInfer files of architecture 'qwen2' are not supported"),
    "gpuidx": (Tiny("generic.gpu_index"), UnsupportedError, "'generic.gpu_index' is not supported"),
    "no down_t": (
        Tiny(without=("blk.1.ffn_down_t.weight",)),
        FormatError,
        "'blk.1.ffn_down_t.weight': got no such tensor, wanted shape",
    ),
    "down_t": (
        Tiny(shapes={"blk.0.ffn_down_t.weight": (96, 64)}),
        FormatError,
        "'blk.0.ffn_down_t.weight': got shape (96, 64), wanted shape (64, 96)",
    ),
    "no fc2": (
        Tiny(without=("blk.1.fc2.weight",)),
        FormatError,
        "'blk.1.fc2.weight': got none, wanted one, as there is 'blk.0.fc1.weight'",
    ),
    "fc1": (Tiny(shapes={"blk.0.fc1.weight": (32, 32)}), FormatError, "got (32, 32) and (32, 96), wanted (64, rank)"),
    "fc2": (Tiny(shapes={"blk.0.fc2.weight": (64, 96)}), FormatError, "got (64, 32) and (64, 96), wanted (64, rank)"),
    "fc1 vector": (Tiny(shapes={"blk.0.fc1.weight": (64,)}), FormatError, "got (64,) and (32, 96)"),
    "rank 40": (Tiny(ranks=(40, 32)), UnsupportedError, "a predictor of rank 40 is not supported (blk.0.fc1)"),
    "a third layer": (
        Tiny(pairs=(), n_layer=3, ranks=(32, 32, 32), without=("blk.2.attn_q.weight",)),
        FormatError,
        "'blk.2.attn_q.weight': got no such tensor",
    ),
    "threshold": (Tiny(threshold=math.nan), FormatError, "'powerinfer.sparse_threshold': got nan, wanted a finite"),
    "threshold text": (
        Tiny(pairs=(kv("powerinfer.sparse_threshold", 8, string("0.5")),)),
        FormatError,
        "'powerinfer.sparse_threshold': got str",
    ),
    "activation": (
        Tiny(pairs=(kv("llama.hidden_activation", 8, string("swiglu")),)),
        UnsupportedError,
        "hidden_activation",
    ),
    "experts": (Tiny(pairs=(kv("llama.expert_count", 4, scalar(4, 8)),)), FormatError, "expert_used_count"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint(tmp_path: Path, name: str) -> None:
    tiny, kind, message = BROKEN[name]
    path = tiny.write(tmp_path / "m.gguf")
    with pytest.raises(kind) as caught, GGUFFile(path) as file:
        ModelConfig.from_gguf(file)
    assert type(caught.value) is kind and message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(kind):
        convert(path, tmp_path / "out.gguf", silent)
    assert not {one.name for one in tmp_path.iterdir()} - {"m.gguf"}


def test_type_numbers_of_their_time(tmp_path: Path) -> None:
    """16, 17 and 18 were I8, I16 and I32; today's meaning of those numbers would give other sizes."""
    for number, kind in ((16, GGMLType.I8), (17, GGMLType.I16), (18, GGMLType.I32), (1, GGMLType.F16)):
        with GGUFFile(Tiny(type_number=number).write(tmp_path / "m.gguf")) as file:
            info = file.tensors["blk.0.ffn_up.weight"]
            assert info.type is kind and info.nbytes == 64 * 96 * kind.type_size
    for number in (19, 26, 30, 2**31):
        with pytest.raises(UnsupportedError, match=f"unknown tensor type {number}"):
            GGUFFile(Tiny(type_number=number).write(tmp_path / "m.gguf"))
    with GGUFFile(Tiny(magic=b"GGUF", type_number=24).write(tmp_path / "m.gguf")) as file:
        assert file.tensors["blk.0.ffn_up.weight"].type is GGMLType.I8


def test_mutants(tmp_path: Path) -> None:
    whole = Tiny(threshold=0.5).image()
    header = whole.index(b"blk.1.fc2.weight") + 60
    rng, seen = random.Random(3), {"loads": 0, "error": 0}
    path = tmp_path / "m.gguf"
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 4])):
            at = rng.choice([rng.randrange(4, header), rng.randrange(header - 1600, header)])
            if rng.random() < 0.3:
                data[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 1]))
            else:
                data[at] ^= 1 << rng.randrange(8)
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            with GGUFFile(path) as file, find_section(file) as section:  # type: ignore[union-attr]
                section.predictors(), section.cut(0)
                seen["loads"] += 1
        except HotcoldError as error:
            assert "\n" not in str(error) and len(str(error)) < 900
            seen["error"] += 1
    assert min(seen.values()) > 30, seen


# conversion


@pytest.mark.parametrize("qtype", ["F32", "F16", "Q4_0", "Q5_0", "Q8_0", "Q6_K"])
def test_conversion(tmp_path: Path, qtype: str) -> None:
    n_embd = 256 if qtype == "Q6_K" else 64
    tiny = Tiny("bamboo" if qtype == "F16" else "llama", qtype, n_embd=n_embd, threshold=0.5)
    if qtype == "Q6_K":
        tiny = replace(tiny, predictors=False)
    source, out = tiny.write(tmp_path / "m.powerinfer.gguf"), tmp_path / "out.gguf"
    before = source.read_bytes()
    stages: dict[str, tuple[int, int | None]] = {}
    convert(source, out, lambda what, done, total: stages.update({what: (done, total)}))
    assert source.read_bytes() == before and len(stages) == 3 and all(done == total for done, total in stages.values())
    assert {path.name for path in tmp_path.iterdir()} == {source.name, out.name, ".hotcold-out.gguf.lock"}

    reader, theirs = GGUFReader(out), tiny.tensors()
    fields = {name: value.contents() for name, value in reader.fields.items()}
    assert fields[f"{tiny.arch}.hidden_activation"] == {"llama": "relu", "bamboo": "drelu"}[tiny.arch]
    assert "powerinfer.sparse_threshold" not in fields
    plain = GGUFReader(replace(tiny, magic=b"GGUF").write(tmp_path / "plain"))
    for name, value in plain.fields.items():
        if not name.startswith(("GGUF.", "powerinfer.")):
            assert fields[name] == value.contents() and reader.fields[name].types == value.types, name
    got = {tensor.name: tensor for tensor in reader.tensors}
    assert set(got) == {name.replace("down_t", "down") for name in theirs if ".fc" not in name}
    for name, (shape, kind, raw) in theirs.items():
        if ".fc" in name:
            continue
        if "ffn_down_t" not in name:
            assert got[name].data.tobytes() == raw and got[name].tensor_type.name == kind
            continue
        turned = got[name.replace("down_t", "down")]
        assert tuple(turned.shape.tolist()) == shape[::-1]
        assert turned.tensor_type.name == ("Q8_0" if kind == "Q6_K" else kind)
        original = gguf.quants.dequantize(
            np.frombuffer(raw, np.uint8).reshape(shape[1], -1), gguf.GGMLQuantizationType[kind]
        )
        values = gguf.quants.dequantize(turned.data, turned.tensor_type).reshape(shape)
        step = {"F32": 0, "F16": 0, "Q4_0": 1 / 8, "Q5_0": 1 / 16, "Q8_0": 1 / 127, "Q6_K": 1 / 127}[kind]
        block = original.T.reshape(shape[0], -1, 32)
        bound = np.repeat(np.abs(block).max(axis=2), 32, axis=1).reshape(shape[0], -1) * step * 1.01 + 1e-7
        assert (np.abs(values - original.T) <= bound).all()

    with GGUFFile(out) as file, find_section(file) as section:  # type: ignore[union-attr]
        assert ModelConfig.from_gguf(file).activation == fields[f"{tiny.arch}.hidden_activation"]
        assert not file.powerinfer and section.attached and section.damaged() == []
        for layer in range(2):
            raw = section.image.data(f"blk.{layer}.ffn_down_t.weight").tobytes()
            assert raw == theirs[f"blk.{layer}.ffn_down_t.weight"][2]
            if tiny.predictors:
                np.testing.assert_array_equal(section.cut(layer), np.full(96, 0.5, np.float32))
                assert (
                    section.image.data(f"blk.{layer}.ffn_pred_a.weight").tobytes()
                    == theirs[f"blk.{layer}.fc1.weight"][2]
                )
                assert (
                    section.image.data(f"blk.{layer}.ffn_pred_b.weight").tobytes()
                    == theirs[f"blk.{layer}.fc2.weight"][2]
                )
        predictors = section.predictors()
        assert (predictors is not None) is tiny.predictors
        assert predictors is None or (predictors.kind, predictors.input) == ("relu", "residual")


def test_a_converted_model_runs_as_the_original(tmp_path: Path) -> None:
    source = Tiny(qtype="Q8_0", threshold=0.75).write(tmp_path / "m.powerinfer.gguf")
    convert(source, tmp_path / "out.gguf", silent)
    for mode in ("exact", "predict"):
        np.testing.assert_array_equal(logits(tmp_path / "out.gguf", mode), logits(source, mode))


def test_metadata_of_every_kind_is_kept(tmp_path: Path) -> None:
    pairs = [kv("a.u64", 10, scalar(10, 2**40)), kv("a.i32", 5, scalar(5, -7)), kv("a.f64", 12, scalar(12, 0.1))]
    pairs += [kv("a.i64", 11, scalar(11, -(2**40))), kv("a.empty", 8, string("")), kv("a.bool", 7, b"\0")]
    source = Tiny(pairs=tuple(pairs)).write(tmp_path / "m.gguf")
    convert(source, tmp_path / "out.gguf", silent)
    with GGUFFile(source) as one, GGUFFile(tmp_path / "out.gguf") as two:
        for key, value in one.metadata.items():
            np.testing.assert_array_equal(two.metadata[key], value)
            assert type(two.metadata[key]) is type(value)


def test_what_is_not_converted(tmp_path: Path, tiny_model: Any) -> None:
    source = Tiny().write(tmp_path / "m.gguf")
    with pytest.raises(UnsupportedError, match="is not one of PowerInfer's files"):
        convert(tiny_model(), tmp_path / "out.gguf", silent)
    with pytest.raises(ParameterError, match="is the file to convert"):
        convert(source, tmp_path / "." / "m.gguf", silent)
    with pytest.raises(StorageError, match="No such file or directory; name a file that can be written there"):
        convert(source, tmp_path / "nowhere" / "out.gguf", silent)
    shutil.copy(source, sidecar_path(tmp_path / "out.gguf"))
    with pytest.raises(StorageError, match="the section of an earlier out.gguf; delete it"):
        convert(source, tmp_path / "out.gguf", silent)


def test_commands(tmp_path: Path) -> None:
    def invoke(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    source, out = Tiny(threshold=0.5).write(tmp_path / "m.powerinfer.gguf"), tmp_path / "out.gguf"
    shown = invoke("section", source).stdout
    assert "relu on residual" in shown and "rank    64" in shown and "F32" in shown
    assert "Section: predictors, down_t; " in invoke("inspect", source).stdout
    result = invoke("convert", source, out)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    assert "llama.cpp would run it with silu" in result.stderr and "relu model" in result.stderr
    assert "Section: predictors, down_t; " in invoke("inspect", out).stdout
    result = invoke("convert", Tiny("bamboo").write(source), tmp_path / "b.gguf")
    assert "llama.cpp does not know the architecture bamboo" in result.stderr
    result = invoke("convert", Tiny("falcon").write(source), out)
    assert result.exit_code == 1 and "architecture 'falcon' are not supported" in result.stderr
