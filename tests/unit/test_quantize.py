"""`hotcold quantize`: what is in the file, what is refused, and that nothing half-written is left."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from tiny import make_tiny_model
from typer.testing import CliRunner

from hotcold.formats import gguf_rewrite
from hotcold.formats.errors import FormatError, HotcoldError, ParameterError, StorageError, UnsupportedError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.imatrix import read
from hotcold.formats.section_file import Contents, SectionTensor, update_section
from hotcold.formats.types import GGMLType
from hotcold.runtime.encode import encode
from hotcold.solver.quantize import Options, quantize
from hotcold.tools.cli import app

SIZES: dict[str, Any] = {"n_embd": 256, "n_ff": 512, "n_layer": 4}
WIDE = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("f16") / "in.gguf", qtype="F16", **SIZES)


def raw(path: Path, name: str) -> np.ndarray:
    with GGUFFile(path) as file:
        return np.array(file.data(name))


def test_all_but_matrices_and_two_keys_is_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    seen: list[tuple[int, int]] = []
    report = quantize(source, out, "q4_k_m", progress=lambda what, done, total: seen.append((done, total)))
    assert list(tmp_path.iterdir()) == [out] and seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    before, after = GGUFReader(source), GGUFReader(out)
    changed = {"general.file_type": 15, "general.quantization_version": 2}
    kept = [name for name in before.fields if not name.startswith("GGUF.")]
    names = [name for name in after.fields if not name.startswith("GGUF.")]
    assert names == kept + [name for name in changed if name not in kept]
    for name in names:
        wanted = changed[name] if name in changed else before.fields[name].contents()
        assert after.fields[name].contents() == wanted
        if name in before.fields:
            assert after.fields[name].types == before.fields[name].types
    assert [tensor.name for tensor in after.tensors] == [tensor.name for tensor in before.tensors]
    types = {tensor.name: tensor.tensor_type.name for tensor in after.tensors}
    assert types["output.weight"] == "Q6_K" and types["token_embd.weight"] == "Q4_K"
    assert [types[f"blk.{layer}.ffn_down.weight"] for layer in range(4)] == ["Q4_K", "Q4_K", "Q6_K", "Q6_K"]
    with GGUFFile(source) as old, GGUFFile(out) as new:
        for name, info in new.tensors.items():
            if types[name] == "F32":
                np.testing.assert_array_equal(new.data(name), old.data(name))
            else:
                wanted = encode(types[name], old.dequantized(name))
                np.testing.assert_array_equal(new.data(name).reshape(wanted.shape), wanted)
            assert info.shape == old.tensors[name].shape
        assert report.bytes_after == sum(info.nbytes for info in new.tensors.values())
        assert report.types == {"F32": 9, "Q4_K": 25, "Q6_K": 5} and report.mix.name == "Q4_K_M"
    assert not report.fallen and not report.unweighted and not report.section


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q2_K", "Q3_K_L", "Q5_K_M"])
def test_the_model_still_says_the_same(source: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out.gguf"
    quantize(source, out, name)
    wanted, got = (naive.forward(path, [1, 70, 200]) for path in (source, out))
    least = {"Q2_K": 0.6, "Q3_K_L": 0.9}.get(name, 0.985)  # random weights forgive little
    assert np.corrcoef(wanted.reshape(-1), got.reshape(-1))[0, 1] > least


def test_rows_that_blocks_do_not_divide(tmp_path: Path) -> None:
    narrow = make_tiny_model(tmp_path / "in.gguf", n_embd=96, n_ff=40, n_layer=1)
    report = quantize(narrow, tmp_path / "out.gguf", "Q4_K_M")
    with GGUFFile(tmp_path / "out.gguf") as file:
        types = {name: info.type.name for name, info in file.tensors.items()}
    assert types["blk.0.ffn_up.weight"] == "Q5_0" and types["blk.0.ffn_down.weight"] == "F16"
    assert types["output.weight"] == types["blk.0.attn_v.weight"] == "Q8_0"
    assert ("blk.0.ffn_up.weight", "Q4_K", "Q5_0") in report.fallen


def test_experts_are_quantised_and_routers_are_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    experts = rng.standard_normal((3, 64, 256)).astype(np.float32)
    router = rng.standard_normal((3, 256)).astype(np.float32)
    writer = GGUFWriter(str(tmp_path / "in.gguf"), "qwen3moe")
    writer.add_block_count(1)
    writer.add_expert_count(3)
    writer.add_custom_alignment(64)
    writer.add_tensor("blk.0.ffn_up_exps.weight", experts)
    writer.add_tensor("blk.0.ffn_gate_inp.weight", router)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sums = np.abs(rng.standard_normal((3, 256))).astype(np.float32) * 7
    counts = np.array([[7], [7], [0]], np.float32)
    matrix = imatrix(tmp_path / "im.gguf", {"blk.0.ffn_up_exps.weight": (sums, counts)})
    report = quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q4_K_S", importance=matrix)
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert file.alignment == 64 and file.tensors["blk.0.ffn_up_exps.weight"].shape == (256, 64, 3)
        assert file.tensors["blk.0.ffn_gate_inp.weight"].type.name == "F32"
        rows = file.data("blk.0.ffn_up_exps.weight").reshape(3, 64, -1)
    for i in range(3):  # the third saw no token: all its columns count alike
        counts = sums[i] if i < 2 else np.ones(256, np.float32)
        np.testing.assert_array_equal(rows[i], encode("Q4_K", experts[i], counts))
    assert not report.unweighted


def test_quantised_sources(tmp_path: Path) -> None:
    """Refused without leave; with it, from every type, and byte for byte where the type stays."""
    kinds = dict(zip(WIDE, ("Q4_0", "Q5_1", "Q8_0", "Q6_K", "Q2_K", "Q3_K", "Q5_K"), strict=True))
    types = {f"blk.0.{part}.weight": kind for part, kind in kinds.items()}
    path = make_tiny_model(tmp_path / "in.gguf", qtype="BF16", types=types, n_embd=256, n_ff=512, n_layer=1)
    with pytest.raises(ParameterError, match="in.gguf: tensor 'blk.0.attn_q.weight' is Q4_0 already.*--allow-requ"):
        quantize(path, tmp_path / "out.gguf", "Q8_0")
    assert not (tmp_path / "out.gguf").exists()
    quantize(path, tmp_path / "out.gguf", "Q8_0", Options(allow_requantize=True))
    with GGUFFile(path) as old, GGUFFile(tmp_path / "out.gguf") as new:
        np.testing.assert_array_equal(new.data("blk.0.attn_v.weight"), old.data("blk.0.attn_v.weight"))
        for name in types:
            assert new.tensors[name].type.name == "Q8_0"
            size = np.abs(old.dequantized(name)).max()
            assert np.abs(new.dequantized(name) - old.dequantized(name)).max() < size / 200


def test_a_type_that_only_gguf_decodes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    kind = GGMLQuantizationType.IQ4_NL
    blocks = np.random.default_rng(1).integers(0, 256, (4, 8, 18), np.uint8)
    blocks[:, :, :2] = np.array([0.01], np.float16).view(np.uint8)
    writer = GGUFWriter(str(tmp_path / "in.gguf"), "llama")
    writer.add_tensor("a.weight", blocks.reshape(4, -1), raw_dtype=kind)
    writer.add_tensor("b.weight", values.astype(np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q8_0", Options(allow_requantize=True))
    wanted = quants.dequantize(blocks.reshape(4, -1), kind)
    np.testing.assert_array_equal(raw(tmp_path / "out.gguf", "a.weight").reshape(4, -1), encode("Q8_0", wanted))
    np.testing.assert_array_equal(raw(tmp_path / "out.gguf", "b.weight").view(np.int32), values.astype(int).reshape(-1))


# --- importance -----------------------------------------------------------------------------------------------------


def imatrix(path: Path, entries: dict[str, tuple[np.ndarray, np.ndarray]], kind: str = "imatrix") -> Path:
    writer = GGUFWriter(str(path), "")
    writer.add_type(kind)
    writer.add_uint32("imatrix.chunk_count", 9)
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def old_imatrix(path: Path, entries: dict[str, tuple[np.ndarray, int]]) -> Path:
    data = struct.pack("<i", len(entries))
    for name, (sums, calls) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, sums.size)
        data += sums.astype("<f4").tobytes()
    text = b"calibration.txt"
    path.write_bytes(data + struct.pack("<ii", 9, len(text)) + text)
    return path


def test_both_kinds_of_imatrix(source: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    names = [f"blk.{layer}.{part}.weight" for layer in range(4) for part in WIDE]
    means = {n: (rng.standard_normal(512 if "ffn_down" in n else 256) ** 2).astype(np.float32) for n in names}
    new = imatrix(
        tmp_path / "im.gguf", {n: (m[None] * np.float32(4), np.full((1, 1), 4, np.float32)) for n, m in means.items()}
    )
    old = old_imatrix(tmp_path / "im.dat", {n: (m * np.float32(4), 4) for n, m in means.items()})
    files = []
    for path in (new, old):
        found = read(path)
        assert found.chunks == 9 and found.datasets == ["calibration.txt"] and list(found.entries) == names
        np.testing.assert_array_equal(found.entries[names[3]], means[names[3]][None])
        files.append(tmp_path / f"{path.suffix[1:]}.out")
        report = quantize(source, files[-1], "Q4_K_M", importance=path)
        assert report.unweighted == ["token_embd.weight", "output.weight"]
    with GGUFFile(files[0]) as first, GGUFFile(files[1]) as second, GGUFFile(source) as file:
        for name in first.tensors:
            np.testing.assert_array_equal(first.data(name), second.data(name))
        name = names[0]
        wanted = encode("Q4_K", file.dequantized(name), means[name])
        np.testing.assert_array_equal(first.data(name).reshape(wanted.shape), wanted)
        assert first.get("quantize.imatrix.file") == "im.gguf"
        assert first.get("quantize.imatrix.entries_count") == len(names)
        assert first.get("quantize.imatrix.chunks_count") == 9
        assert first.get("quantize.imatrix.dataset") == "calibration.txt"


def test_bad_imatrices(source: Path, tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    good, one = np.ones((1, 256), np.float32), np.ones((1, 1), np.float32)
    bad: list[tuple[Path, str]] = [
        (imatrix(tmp_path / "a", {name: (good[:, :255], one)}), "entry 'blk.0.attn_q.weight': got 255 values"),
        (imatrix(tmp_path / "b", {name: (good, one)}, "model"), "general.type.*got 'model', wanted 'imatrix'"),
        (imatrix(tmp_path / "c", {name: (good * np.nan, one)}), "NaN, infinite or negative"),
        (imatrix(tmp_path / "d", {name: (-good, one)}), "NaN, infinite or negative"),
        (imatrix(tmp_path / "e", {"other.weight": (good, one)}), "got none for a tensor of in.gguf"),
        (imatrix(tmp_path / "f", {name: (good, np.ones((3, 1), np.float32))}), "256 sums, 3 counts"),
    ]
    whole = old_imatrix(tmp_path / "whole.dat", {name: (good[0], 1)}).read_bytes()
    for size in (0, 3, 4, 7, 20, 40, 100, len(whole) - 30, len(whole) - 5):
        (tmp_path / f"cut{size}").write_bytes(whole[:size])
        bad.append((tmp_path / f"cut{size}", "bytes left"))
    for i, head in enumerate((struct.pack("<ii", 1, -1), struct.pack("<ii", 1, 2**30), struct.pack("<i", 2**31 - 1))):
        (tmp_path / f"hostile{i}").write_bytes(head)
        bad.append((tmp_path / f"hostile{i}", "bytes left"))
    (tmp_path / "none").write_bytes(struct.pack("<i", 0))
    bad += [(tmp_path / "none", "entries: got 0"), (tmp_path / "missing", "No such file")]
    for path, message in bad:
        with pytest.raises(HotcoldError, match=message) as caught:
            quantize(source, tmp_path / "out.gguf", "Q4_K_M", importance=path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


# --- what is refused, and what is left ------------------------------------------------------------------------------


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    """By the tensor's name, in matrices and in what is copied."""
    path = make_tiny_model(tmp_path / "in.gguf", qtype="F16", **SIZES)
    for name, size, bits in (("blk.2.ffn_up.weight", 2, 0x7C00), ("blk.3.attn_norm.weight", 4, 0x7FC00000)):
        with GGUFFile(path) as file:
            at = file.tensors[name].offset + 100 * size
        good = path.read_bytes()
        path.write_bytes(good[:at] + bits.to_bytes(size, "little") + good[at + size :])
        with pytest.raises(FormatError, match=f"in.gguf: tensor '{name}': got weights that are NaN or infinite"):
            quantize(path, tmp_path / "out.gguf", "Q4_K_M")
        path.write_bytes(good)
    assert list(tmp_path.iterdir()) == [path]


def test_weights_beyond_float16(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "in.gguf", n_layer=1)
    with GGUFFile(path) as file:
        at = file.tensors["blk.0.ffn_up.weight"].offset
    data = path.read_bytes()
    path.write_bytes(data[:at] + struct.pack("<f", 1e5) + data[at + 4 :])
    with pytest.raises(FormatError, match="'blk.0.ffn_up.weight': got weights of up to 1e.05, beyond the range of F16"):
        quantize(path, tmp_path / "out.gguf", "F16")
    quantize(path, tmp_path / "out.gguf", "BF16")


def test_other_files_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    theirs = tmp_path / "m.powerinfer.gguf"
    theirs.write_bytes(b"PWRI" + source.read_bytes()[4:])
    with pytest.raises(UnsupportedError, match="one of PowerInfer's files; `hotcold convert`"):
        quantize(theirs, out, "Q8_0")
    matrix = imatrix(tmp_path / "im.gguf", {"a": (np.ones((1, 32), np.float32), np.ones((1, 1), np.float32))})
    with pytest.raises(UnsupportedError, match="general.type is 'imatrix'"):
        quantize(matrix, out, "Q8_0")
    part = make_tiny_model(tmp_path / "part.gguf", metadata={"split.count": 2})
    with pytest.raises(UnsupportedError, match="one of 2 parts"):
        quantize(part, out, "Q8_0")
    with pytest.raises(ParameterError, match="is the file to quantise"):
        quantize(source, source, "Q8_0")
    with pytest.raises(ParameterError, match="type: got 'Q9', wanted one of"):
        quantize(source, out, "Q9")
    (tmp_path / "hotcold-out.gguf").touch()
    with pytest.raises(StorageError, match="hotcold-out.gguf: the section of an earlier out.gguf"):
        quantize(source, out, "Q8_0")
    assert not out.exists()


def test_a_section_is_left_behind(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "in.gguf", n_layer=1)
    freq = np.full(96, 0.5, np.float32)
    tensor = SectionTensor("blk.0.ffn_act_freq", freq.shape, GGMLType.F32, lambda: freq.view(np.uint8))
    metadata = {"hotcold.profile.tokens": 10, "hotcold.profile.dataset": "x", "hotcold.profile.rule": "exact"}
    update_section(path, Contents(metadata, [tensor]))
    bare = make_tiny_model(tmp_path / "bare.gguf", n_layer=1)
    assert quantize(path, tmp_path / "a.gguf", "Q8_0").section
    assert not quantize(bare, tmp_path / "b.gguf", "Q8_0").section
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_nothing_half_written_is_left(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")

    def interrupt(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, "Q8_0", progress=interrupt)
    with monkeypatch.context() as patch:
        patch.setattr(gguf_rewrite.os, "fsync", _full)
        with pytest.raises(StorageError, match="out.gguf: No space left on device"):
            quantize(source, out, "Q8_0")
    with pytest.raises(StorageError, match="missing/out.gguf: No such file or directory"):
        quantize(source, tmp_path / "missing" / "out.gguf", "Q8_0")
    assert list(tmp_path.iterdir()) == [out] and out.read_bytes() == b"precious"


def _full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(source: Path, tmp_path: Path) -> None:
    """The file that is written is a link to a disk that is always full."""
    out = tmp_path / "out.gguf"
    os.symlink("/dev/full", tmp_path / ".out.gguf.part")
    with pytest.raises(StorageError, match="No space left"):
        quantize(source, out, "Q8_0")
    assert list(tmp_path.iterdir()) == []


# --- the command ----------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "in.gguf", n_embd=96, n_ff=256, n_layer=1)
    matrix = imatrix(
        tmp_path / "im.gguf", {"blk.0.attn_q.weight": (np.ones((1, 96), np.float32), np.ones((1, 1), np.float32))}
    )
    out = tmp_path / "out.gguf"
    arguments = ["quantize", str(path), str(out), "q4_k_m", "--imatrix", str(matrix), "--threads", "1"]
    done = CliRunner().invoke(app, [*arguments, "--output-tensor-type", "f16", "--token-embedding-type", "q5_1"])
    assert done.exit_code == 0 and done.stdout.strip() == str(out), done.output
    assert "Q4_K_M: " in done.stderr and "bits a weight) ->" in done.stderr
    assert "6 tensors, such as blk.0.attn_q.weight, have rows that the type's blocks do not divide" in done.stderr
    assert "no entry in the imatrix for 7 tensors: token_embd.weight, blk.0.attn_k" in done.stderr
    with GGUFFile(out) as file:
        assert file.tensors["output.weight"].type.name == "F16"
        assert file.tensors["token_embd.weight"].type.name == "Q5_1"
    done = CliRunner().invoke(app, [*arguments, "--output-type", "q9"])
    assert done.exit_code == 1 and "--output-tensor-type: got 'q9', wanted one of F32" in done.stderr
    done = CliRunner().invoke(app, ["quantize", str(out), str(tmp_path / "again.gguf"), "q8_0"])
    assert done.exit_code == 1 and "--allow-requantize" in done.stderr and done.stderr.count("\n") == 1
