"""The reader of safetensors: values, shards, and files that lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import entry, image, write

from hotcold.formats.errors import FormatError, HotcoldError, ModelNotFoundError, UnsupportedError
from hotcold.formats.safetensors import INDEX, SINGLE, SafetensorsFile, Weights, finite, to_float32

GOOD = image({"a": entry("F32", [2, 3], 0, 24), "b": entry("F32", [], 24, 28)}, bytes(range(28)))


def test_values(tmp_path: Path) -> None:
    single = np.array([[1.5, -2.0, 3.25]], np.float32)
    half = single.astype(np.float16)
    bits = (single.view(np.uint32) >> 16).astype(np.uint16)
    double = single.astype(np.float64)
    arrays = {"F32": single, "F16": half, "BF16": bits, "F64": double}
    write(tmp_path / SINGLE, {name: (name, array) for name, array in arrays.items()})
    with Weights(tmp_path) as weights:
        assert list(weights.tensors) == list(arrays)
        for name, weight in weights.tensors.items():
            assert weight.shape == (1, 3) and weight.dtype == name
            values = to_float32(weight.raw(), name)
            assert values.dtype == np.float32 and np.array_equal(values, single)
            weight.file.release(weight)
            assert np.array_equal(weight.raw(), arrays[name])


def test_scalars_empty_tensors_and_other_types(tmp_path: Path) -> None:
    mask = np.tril(np.ones((1, 1, 2, 2), np.uint8))
    arrays = {"mask": ("U8", mask), "none": ("F32", np.zeros((0, 4), np.float32)), "one": ("I64", np.array(7))}
    write(tmp_path / SINGLE, arrays)
    with Weights(tmp_path) as weights:
        for name, (_, array) in arrays.items():
            raw = weights.tensors[name].raw()
            assert raw.shape == array.shape and np.array_equal(raw, array)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_finite(dtype: str) -> None:
    kind = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(dtype, "<f4")
    for value, good in [(1.0, True), (65504.0, True), (np.nan, False), (np.inf, False), (-np.inf, False)]:
        array = np.array([0.0, value, 0.0], kind)
        raw = (array.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else array
        assert finite(raw, dtype) is good
    assert not finite(np.array([1e300]), "F64")  # infinite as float32


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x00" * 7,
    "no header": struct.pack("<Q", 0),
    "header past the end": image({}, length=3),
    "enormous header": image({}, length=2**63),
    "header over the limit": image({}, length=100_000_001),
    "no JSON": image(b"{a}"),
    "a list": image(b"[]"),
    "bad UTF-8": image(b'{"\xff": 1}'),
    "deep": image(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "huge number": image(b'{"a":' + b"9" * 10_000 + b"}"),
    "twice": image(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}'),
    "no entry": image({"a": 3}),
    "no dtype": image({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "unknown dtype": image({"a": entry("F33", [1], 0, 4)}, b"1234"),
    "dtype as a list": image({"a": {**entry("F32", [1], 0, 4), "dtype": ["F32"]}}, b"1234"),
    "negative size": image({"a": entry("F32", [-1], 0, 4)}, b"1234"),
    "float size": image({"a": {**entry("F32", [1], 0, 4), "shape": [1.0]}}, b"1234"),
    "bool size": image({"a": {**entry("F32", [1], 0, 4), "shape": [True]}}, b"1234"),
    "overflowing size": image({"a": entry("F32", [2**40, 2**40], 0, 4)}, b"1234"),
    "many sizes": image({"a": entry("F32", [1] * 9, 0, 4)}, b"1234"),
    "three offsets": image({"a": {**entry("F32", [1], 0, 4), "data_offsets": [0, 4, 8]}}, b"1234"),
    "backwards": image({"a": entry("F32", [1], 4, 0)}, b"1234"),
    "wrong length": image({"a": entry("F32", [2], 0, 4)}, b"1234"),
    "past the end": image({"a": entry("F32", [2], 0, 8)}, b"1234"),
    "far past the end": image({"a": entry("F32", [1], 2**50, 2**50 + 4)}, b"1234"),
    "overlap": image({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, b"12345678"),
    "same place": image({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, b"1234"),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        SafetensorsFile(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and len(text) < 400 and text.isprintable()


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(GOOD)
    SafetensorsFile(path).close()
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        with pytest.raises(FormatError):
            SafetensorsFile(path)


def test_changed_bytes_never_crash(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / SINGLE
    for _ in range(200):
        content = bytearray(GOOD)
        for position in rng.integers(0, len(GOOD) - 28, 3):
            content[position] = rng.integers(256)
        path.write_bytes(content)
        try:
            file = SafetensorsFile(path)
        except HotcoldError:
            continue
        for weight in file.weights.values():
            weight.raw().sum()
        file.close()


# ---- folders ----------------------------------------------------------------------------------------------------


def shards(folder: Path) -> dict[str, str]:
    """Three shards with one tensor each, and their index."""
    where = {}
    for i in range(3):
        name = f"model-{i + 1:05d}-of-00003.safetensors"
        write(folder / name, {f"t{i}": ("F32", np.full(2, i, np.float32))})
        where[f"t{i}"] = name
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": where}))
    return where


def test_shards(tmp_path: Path) -> None:
    shards(tmp_path)
    with Weights(tmp_path) as weights:
        assert [float(weights.tensors[f"t{i}"].raw()[0]) for i in range(3)] == [0.0, 1.0, 2.0]
    assert weights.tensors["t0"].file._map is None


def refuse(kind: type[HotcoldError], folder: Path, *said: str) -> None:
    with pytest.raises(kind) as caught:
        Weights(folder)
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in said), text


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    where = shards(tmp_path)
    for name in ("t0", "t2"):
        (tmp_path / where[name]).unlink()
    refuse(ModelNotFoundError, tmp_path, "2 of 3 shards", where["t0"], where["t2"])


def test_tensor_missing_from_its_shard(tmp_path: Path) -> None:
    where = shards(tmp_path)
    write(tmp_path / where["t1"], {"other": ("F32", np.zeros(2, np.float32))})
    refuse(FormatError, tmp_path, "'t1'", "no such tensor", where["t1"])


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    where = shards(tmp_path)
    write(tmp_path / where["t1"], {name: ("F32", np.zeros(2, np.float32)) for name in ("t0", "t1")})
    refuse(FormatError, tmp_path, "'t0'", where["t0"], where["t1"])


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "c:x.safetensors", "x"])
def test_index_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path.parent / "m.safetensors", {})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    refuse(FormatError, tmp_path, INDEX, "in its folder")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_broken_index(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    refuse(FormatError, tmp_path, INDEX)


def touch(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).write_bytes(b"x") for name in names] and None


NOTHING: dict[str, tuple[type[HotcoldError], Callable[[Path], None], tuple[str, ...]]] = {
    "empty": (ModelNotFoundError, touch(), ("no weights there",)),
    "pickled": (UnsupportedError, touch("pytorch_model.bin"), ("pickle", "any code", "safetensors")),
    "shards of pickles": (UnsupportedError, touch("pytorch_model-00001-of-00002.bin"), ("any code",)),
    "no index": (ModelNotFoundError, touch("model-00001-of-00002.safetensors"), (INDEX,)),
}


@pytest.mark.parametrize(("kind", "make", "said"), NOTHING.values(), ids=NOTHING)
def test_folders_without_weights(
    tmp_path: Path, kind: type[HotcoldError], make: Callable[[Path], None], said: tuple[str, ...]
) -> None:
    make(tmp_path)
    refuse(kind, tmp_path, str(tmp_path), *said)


def test_no_folder(tmp_path: Path) -> None:
    refuse(ModelNotFoundError, tmp_path / "none")
