"""The GGUF reader: against gguf's own, on every value type, and on files that are broken in one way each."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from rawgguf import ARRAY, FORMS, STRING, array, every_value_type, image, kv, scalar, string, tensor

from hotcold.formats.errors import (
    ClosedError,
    FormatError,
    HotcoldError,
    ModelNotFoundError,
    UnsupportedError,
)
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.gguf_header import MAX_DEPTH
from hotcold.formats.types import BLOCKS, GGMLType


def write(folder: Path, content: bytes) -> Path:
    path = folder / "file.gguf"
    path.write_bytes(content)
    return path


def as_gguf_reads(path: Path) -> tuple[dict[str, Any], list[Any]]:
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return fields, list(reader.tensors)


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(ours, np.ndarray):
        ours = ours.tolist()
    assert ours == theirs and type(ours) is type(theirs)


def test_types_are_those_of_gguf() -> None:
    assert set(BLOCKS) == set(GGMLType)
    shared = [kind for kind in GGMLType if kind.name in gguf.GGMLQuantizationType.__members__]
    assert len(shared) >= 30
    for kind in shared:
        theirs = gguf.GGMLQuantizationType[kind.name]
        assert kind == theirs and hash(kind) == hash(theirs)
        assert gguf.GGML_QUANT_SIZES[theirs] == (kind.block_size, kind.type_size)


def test_importing_the_reader_loads_neither_gguf_nor_numba() -> None:
    code = "import sys, hotcold.formats.config; print(*sorted({'gguf', 'numba'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize("options", [{}, {"arch": "qwen2", "tokenizer": "llama", "qtype": "Q8_0", "tied": True}])
def test_models_read_as_gguf_reads_them(tiny_model: Any, options: dict[str, Any]) -> None:
    path = tiny_model(**options)
    fields, tensors = as_gguf_reads(path)
    with GGUFFile(path) as file:
        assert list(file.metadata) == list(fields)
        for key, value in fields.items():
            assert_same(file.metadata[key], value)
        assert list(file.tensors) == [theirs.name for theirs in tensors]
        for theirs in tensors:
            info = file.tensors[theirs.name]
            assert info.shape == tuple(theirs.shape.tolist()) and info.type == theirs.tensor_type
            assert (info.offset, info.nbytes) == (theirs.data_offset, theirs.n_bytes)
            assert info.n_rows * info.row_size == info.nbytes
            np.testing.assert_array_equal(file.data(theirs.name), theirs.data.view(np.uint8).reshape(-1))
            expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
            values = file.dequantized(theirs.name)
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, expected.reshape(values.shape))


def test_every_value_type_of_the_writer(tmp_path: Path) -> None:
    writer = GGUFWriter(str(tmp_path / "file.gguf"), "llama")
    extremes = {
        GGUFValueType.UINT8: 255,
        GGUFValueType.INT8: -128,
        GGUFValueType.UINT16: 65535,
        GGUFValueType.INT16: -32768,
        GGUFValueType.UINT32: 2**32 - 1,
        GGUFValueType.INT32: -(2**31),
        GGUFValueType.UINT64: 2**64 - 1,
        GGUFValueType.INT64: -(2**63),
        GGUFValueType.FLOAT32: -1.5,
        GGUFValueType.FLOAT64: 1e300,
        GGUFValueType.BOOL: True,
        GGUFValueType.STRING: "line\nbreak \0 and ünïcode",
    }
    for kind, value in extremes.items():
        writer.add_key_value(f"one.{kind.name}", value, kind)
        writer.add_key_value(f"many.{kind.name}", [value, value], GGUFValueType.ARRAY, sub_type=kind)
    writer.add_tensor("int64", np.array([[1, -2], [3, 4]], dtype=np.int64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields, _ = as_gguf_reads(tmp_path / "file.gguf")
    with GGUFFile(tmp_path / "file.gguf") as file:
        for kind, value in extremes.items():
            assert file.metadata[f"one.{kind.name}"] == value
            assert_same(file.metadata[f"one.{kind.name}"], fields[f"one.{kind.name}"])
            assert_same(file.metadata[f"many.{kind.name}"], fields[f"many.{kind.name}"])
        np.testing.assert_array_equal(file.dequantized("int64"), [[1, -2], [3, 4]])


@pytest.mark.parametrize("version", [2, 3])
def test_raw_image(tmp_path: Path, version: int) -> None:
    file = GGUFFile(write(tmp_path, every_value_type(version) + b"a section after the last tensor"))
    assert (file.version, file.alignment, file.data_offset % 64) == (version, 64, 0)
    assert file.metadata["scalar.7"] is True and type(file.metadata["scalar.6"]) is float
    for kind in FORMS:
        values = file.metadata[f"array.{kind}"]
        assert values.tolist() == [0, 1, 0, 1, 0] and not values.flags.writeable
    assert file.metadata["text"] == "naïve 日本 😀" and file.metadata["texts"] == ["", "a", "ß", "<|end|>"]
    assert file.metadata["empty.texts"] == [] and file.metadata["empty.numbers"].dtype == np.float32
    numbers, texts = file.metadata["nested"]
    assert numbers.tolist() == [-1, 2] and texts == ["x"]
    assert file.tensors["c"].shape == (256, 1, 1, 2) and file.tensors["c"].n_rows == 2
    assert [info.offset - file.data_offset for info in file.tensors.values()] == [0, 64, 192]
    data = file.data("b")
    assert data.dtype == np.uint8 and not data.flags.writeable
    assert data.tolist() == [i % 251 for i in range(64, 132)]
    assert data.__array_interface__["data"][0] == file.address("b")
    file.close()


def test_no_tensors_and_no_padding(tmp_path: Path) -> None:
    with GGUFFile(write(tmp_path, image([kv("a", 0, b"\1")], alignment=1))) as file:
        assert file.metadata == {"a": 1} and file.tensors == {}


F32_16 = bytes(64)
TOO_BIG = 2**63
DEEP = array(0, [])
for _ in range(MAX_DEPTH):
    DEEP = array(ARRAY, [DEEP])
BROKEN: dict[str, tuple[bytes, type[HotcoldError], str]] = {
    "empty": (b"", FormatError, "file size: got 0 bytes"),
    "one byte": (b"G", FormatError, "magic: got b'G', wanted b'GGUF'"),
    "text": (b"<!DOCTYPE html>", FormatError, "magic"),
    "magic only": (b"GGUF", FormatError, "version: got end of file"),
    "no counts": (b"GGUF\3\0\0\0", FormatError, "tensor count: got end of file"),
    "version 1": (image(version=1), UnsupportedError, "version 1"),
    "version 0": (image(version=0), UnsupportedError, "version 0"),
    "version 4": (image(version=4), UnsupportedError, "version 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UnsupportedError, "big-endian"),
    "metadata count": (image(n_pairs=2**64 - 1), FormatError, "metadata count: got 18446744073709551615"),
    "tensor count": (image(n_tensors=2**40), FormatError, "tensor count: got 1099511627776"),
    "key length": (image([string("k", 2**62) + bytes(99)]), FormatError, "metadata key 0: length"),
    "key past end": (image([string("key", 400) + bytes(9)]), FormatError, "metadata key 0: length: got 400"),
    "empty key": (image([kv("", 0, b"\1")]), FormatError, "metadata key 0: got 0 bytes"),
    "long key": (image([kv("k" * 65536, 0, b"\1")]), FormatError, "metadata key 0: got 65536 bytes"),
    "NUL in key": (image([kv("a\0b", 0, b"\1")]), FormatError, r"'a\x00b'"),
    "bad UTF-8 key": (image([kv(b"a\xff", 0, b"\1")]), FormatError, r"metadata key 0: got b'\xff'"),
    "key twice": (image([kv("a", 0, b"\1")] * 2), FormatError, "metadata key 1: got 'a' a second time"),
    "value type": (image([kv("a", 13, bytes(8))]), FormatError, "key 'a': got value type 13"),
    "no value": (image([kv("a", 12, b"\1")], alignment=1), FormatError, "key 'a': got end of file"),
    "bool": (image([kv("a", 7, b"\2")]), FormatError, "key 'a': got 2 as a bool"),
    "bools": (image([kv("a", ARRAY, array(7, [b"\1", b"\7"]))]), FormatError, "key 'a': got 7 as a bool"),
    "bad UTF-8": (image([kv("a", STRING, string(b"\xed\xa0\x80"))]), FormatError, "wanted UTF-8"),
    "array type": (image([kv("a", ARRAY, array(99, []))]), FormatError, "array of value type 99"),
    "array length": (image([kv("a", ARRAY, array(4, [], 2**61))]), FormatError, "key 'a': array length"),
    "string count": (image([kv("a", ARRAY, array(STRING, [], TOO_BIG))]), FormatError, "array length"),
    "token length": (
        image([kv("a", ARRAY, array(STRING, [string("x"), string("y", 999)]))]),
        FormatError,
        "key 'a'[1]: length: got 999",
    ),
    "token missing": (
        image([kv("a", ARRAY, array(STRING, [string(bytes(25))], 4))], alignment=1),
        FormatError,
        "key 'a'[1]: got end of file",
    ),
    "token UTF-8": (
        image([kv("a", ARRAY, array(STRING, [string("x"), string(b"ok\xc3")]))]),
        FormatError,
        r"key 'a'[1]: got b'\xc3' at byte 2 of the string, wanted UTF-8",
    ),
    "too deep": (image([kv("a", ARRAY, DEEP)]), FormatError, "arrays nested more than"),
    "alignment 24": (
        image([kv("general.alignment", 4, scalar(4, 24))]),
        FormatError,
        "got 24, wanted a power",
    ),
    "alignment 0": (image([kv("general.alignment", 4, scalar(4, 0))]), FormatError, "got 0, wanted a power"),
    "alignment text": (image([kv("general.alignment", STRING, string("32"))]), FormatError, "got '32'"),
    "alignment bool": (image([kv("general.alignment", 7, b"\1")]), FormatError, "got True"),
    "tensor UTF-8": (image((), [tensor(b"\xc0", (16,))], F32_16), FormatError, "name of tensor 0"),
    "tensor NUL": (image((), [tensor("a\0", (16,))], F32_16), FormatError, "without NUL"),
    "tensor no name": (
        image((), [tensor("", (16, 1, 1))], F32_16),
        FormatError,
        "name of tensor 0: got 0 bytes",
    ),
    "tensor twice": (
        image((), [tensor("a", (8,))] * 2, F32_16),
        FormatError,
        "'a': got the name a second time",
    ),
    "no dims": (image((), [tensor("a", ()) + bytes(8)], F32_16), FormatError, "dimensions: got 0"),
    "5 dims": (image((), [tensor("a", (1,) * 5)], F32_16), FormatError, "dimensions: got 5, wanted 1 to 4"),
    "zero dim": (image((), [tensor("a", (16, 0))], F32_16), FormatError, "shape: got (16, 0)"),
    "dims overflow": (image((), [tensor("a", (2**32, 2**32))], F32_16), FormatError, "below 2**63"),
    "dims wrap": (image((), [tensor("a", (2**33, 2**31, 2**32, 16))], F32_16), FormatError, "below 2**63"),
    "tensor type": (
        image((), [tensor("a", (16,), 99)], F32_16),
        UnsupportedError,
        "'a': unknown tensor type 99",
    ),
    "removed type": (image((), [tensor("a", (32,), 4)], F32_16), UnsupportedError, "unknown tensor type 4"),
    "row length": (
        image((), [tensor("a", (48,), 2)], F32_16),
        FormatError,
        "tensor 'a': row length: got 48, wanted a multiple of 32 for Q4_0",
    ),
    "unaligned": (
        image((), [tensor("a", (4,), 0, 16)], F32_16),
        FormatError,
        "got 16, wanted a multiple of 32",
    ),
    "truncated": (image((), [tensor("a", (16,))], F32_16[:-1]), FormatError, "truncated"),
    "offset past end": (image((), [tensor("a", (1,), 0, 2**40)], F32_16), FormatError, "tensor 'a': end"),
    "offset wraps": (image((), [tensor("a", (1,), 0, 2**64 - 32)], F32_16), FormatError, "tensor 'a': end"),
    "overlap": (
        image((), [tensor("a", (9,)), tensor("b", (2,), 0, 32)], F32_16),
        FormatError,
        "tensor 'b': offset: got byte",
    ),
    "same place": (image((), [tensor("a", (8,)), tensor("b", (8,))], F32_16), FormatError, "inside 'a'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(tmp_path: Path, name: str) -> None:
    content, kind, message = BROKEN[name]
    path = write(tmp_path, content)
    with pytest.raises(kind) as caught:
        GGUFFile(path)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and message in text and "\n" not in text and len(text) < 600


def test_error_messages_cannot_reach_the_terminal(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        GGUFFile(write(tmp_path, image([kv("\x1b]0;owned\a\n" + "😀" * 9000, 99, b"\1")])))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    wanted = {tmp_path / "absent.gguf": "no such file", tmp_path: "folder", "nul\0.gguf": "cannot be opened"}
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe")
        wanted |= {
            tmp_path / "pipe": "regular file",
            "/dev/null": "regular file",
            "x" * 5000: "cannot be opened",
        }
    for path, message in wanted.items():
        with pytest.raises(ModelNotFoundError, match=message):
            GGUFFile(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = write(tmp_path, image())
    path.chmod(0)
    with pytest.raises(ModelNotFoundError, match="cannot be opened"):
        GGUFFile(path)


def test_permission_error_is_one_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ModelNotFoundError, match="cannot be opened: Permission denied"):
        GGUFFile(Path(__file__))


def test_get(tmp_path: Path) -> None:
    file = GGUFFile(write(tmp_path, every_value_type()))
    assert file.get("absent") is None and file.get("absent", 7, int) == 7
    assert file.get("scalar.4", kind=int) == 1 and file.get("scalar.7", kind=bool) is True
    as_float = file.get("scalar.4", kind=float)
    assert as_float == 1.0 and type(as_float) is float
    assert file.get("text", kind=str).startswith("na")
    assert file.get("texts", kind=list)[1] == "a" and file.get("empty.texts", kind=list) == []
    assert file.get("array.5", kind=np.ndarray).dtype == np.int32
    wrong = {"text": int, "scalar.7": int, "scalar.6": int, "nested": list, "array.5": list, "texts": str}
    wrong |= {"scalar.5": bool, "array.6": float, "empty.numbers": list, "empty.texts": np.ndarray}
    for key, kind in wrong.items():
        with pytest.raises(FormatError, match=f"key '{key}': got .*, wanted {kind.__name__}") as caught:
            file.get(key, kind=kind)
        assert "\n" not in str(caught.value)
    file.close()


def test_unknown_tensor_and_undecodable_type(tmp_path: Path) -> None:
    with GGUFFile(write(tmp_path, image((), [tensor("q", (32,), 9)], bytes(40)))) as file:
        assert file.tensors["q"].type is GGMLType.Q8_1 and len(file.data("q")) == 40
        with pytest.raises(UnsupportedError, match="'q': Q8_1 cannot be decoded"):
            file.dequantized("q")
        with pytest.raises(FormatError, match="tensor 'nope'"):
            file.data("nope")


def test_close(tmp_path: Path) -> None:
    path = write(tmp_path, every_value_type())
    with GGUFFile(path) as file:
        assert not file.closed
        view = file.data("a")
    assert file.closed
    file.close()
    for use in (file.data, file.address, file.dequantized):
        with pytest.raises(ClosedError, match="is closed"):
            use("a")
    assert file.get("text") and view.tolist() == list(range(60))  # metadata and views outlive the file


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_mapping_goes_with_close_or_with_the_last_view(tmp_path: Path) -> None:
    path = write(tmp_path, every_value_type())

    def mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text()

    file = GGUFFile(path)
    assert mapped()
    file.close()
    assert not mapped()
    file = GGUFFile(path)
    view = file.data("a")[3:9]
    file.close()
    assert mapped() and view.tolist() == [3, 4, 5, 6, 7, 8]
    del view
    assert not mapped()
    path.write_bytes(every_value_type()[:-1])
    with pytest.raises(FormatError):
        GGUFFile(path)
    assert not mapped()
