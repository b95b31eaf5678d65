"""Thousands of damaged files: each one loads or raises an error of ours, within bounds on work and memory."""

from __future__ import annotations

import math
import random
import struct
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from rawgguf import every_value_type, image, kv, string
from tiny import RopeOptions

from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import FormatError, HotcoldError, UnsupportedError
from hotcold.formats.gguf import GGUFFile

N_MUTANTS = 500  # of each source
EXTREMES = [0, 1, 2, 3, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1]
EXTREMES += [2**63, 2**64 - 32, 2**64 - 8, 2**64 - 1]
SMALL: dict[str, Any] = {"n_embd": 8, "n_head": 2, "n_head_kv": 1, "n_ff": 8, "n_layer": 2, "tied": True}
SOURCES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "arch": "llama"},
    "qwen2": {**SMALL, "arch": "qwen2", "tokenizer": "llama", "chat_template": None},
    "yarn": {**SMALL, "rope": RopeOptions("yarn", freqs=True), "metadata": {"general.sampling.temp": 0.5}},
    "quantised": {**SMALL, "n_embd": 32, "n_ff": 32, "n_layer": 1, "qtype": "Q4_0"},
}
Mutator = Callable[[random.Random, bytearray, int], None]


def flip_bytes(rng: random.Random, data: bytearray, header: int) -> None:
    for _ in range(rng.randint(1, 4)):
        data[place(rng, data, header)] ^= 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)


def truncate(rng: random.Random, data: bytearray, header: int) -> None:
    del data[place(rng, data, header) :]


def insert(rng: random.Random, data: bytearray, header: int) -> None:
    at = place(rng, data, header)
    data[at:at] = rng.choice([rng.randbytes(rng.randint(1, 40)), bytes(8), b"\xff" * 8, struct.pack("<Q", at)])


def delete(rng: random.Random, data: bytearray, header: int) -> None:
    at = place(rng, data, header)
    del data[at : at + rng.randint(1, 32)]


def swap_regions(rng: random.Random, data: bytearray, header: int) -> None:
    length = rng.choice([1, 4, 8, 12, 40])
    one, two = sorted((place(rng, data, header), place(rng, data, header)))
    if one + length <= two and two + length <= len(data):
        data[one : one + length], data[two : two + length] = (
            data[two : two + length],
            data[one : one + length],
        )


def repeat_region(rng: random.Random, data: bytearray, header: int) -> None:
    start, at = place(rng, data, header), place(rng, data, header)
    data[at:at] = data[start : start + rng.randint(1, 200)]


def extreme_integer(rng: random.Random, data: bytearray, header: int) -> None:
    at, size = place(rng, data, header), rng.choice([4, 8])
    data[at : at + size] = (rng.choice(EXTREMES) % 2 ** (8 * size)).to_bytes(size, "little")


def extreme_length(rng: random.Random, data: bytearray, header: int) -> None:
    """Overwrite eight bytes that look like a small integer: mostly a length, a count or a dimension."""
    for _ in range(200):
        at = place(rng, data, header)
        if at + 8 <= len(data) and data[at] and not any(data[at + 3 : at + 8]):
            data[at : at + 8] = (rng.choice([*EXTREMES, len(data), data[at] + 1]) % 2**64).to_bytes(8, "little")
            return


MUTATORS: list[Mutator] = [
    flip_bytes,
    truncate,
    insert,
    delete,
    swap_regions,
    repeat_region,
    extreme_integer,
    extreme_length,
    extreme_length,
]


def place(rng: random.Random, data: bytearray, header: int) -> int:
    """A random offset: mostly in the header, often in its first or last bytes, where the structure is."""
    header = max(1, min(header, len(data)))
    low, high = rng.choice([(0, header), (0, 24), (0, 700), (header - 1500, header), (0, len(data))])
    return min(rng.randrange(max(0, low), max(1, high)), max(0, len(data) - 1))


def mutate(rng: random.Random, original: bytes, header: int) -> bytes:
    data = bytearray(original)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        rng.choice(MUTATORS)(rng, data, header)
        if not data:
            break
    return bytes(data)


class Budget:
    """Counts function calls, and stops the reader once they are more than its file can need."""

    def __init__(self, limit: int) -> None:
        self.limit, self.calls = limit, 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        self.calls += event in ("call", "c_call")
        if self.calls > self.limit:
            sys.setprofile(None)
            raise AssertionError(f"more than {self.limit} calls")


def load(path: Path) -> str:
    """Open, configure and close; what came of it: "loaded", or how far it got and the error's class."""
    stage = "header"
    try:
        with GGUFFile(path) as file:
            size = path.stat().st_size
            for name, info in file.tensors.items():
                assert 0 < info.nbytes == len(file.data(name)) <= size - info.offset
            stage = "config"
            ModelConfig.from_gguf(file)
    except HotcoldError as error:
        text = str(error)
        assert type(error) in (FormatError, UnsupportedError), repr(error)
        assert text.startswith(f"{path}: "), text
        assert "\n" not in text and len(text) < len(str(path)) + 600, text
        return f"{stage} {type(error).__name__}"
    return "loaded"


def load_within_bounds(path: Path, size: int) -> str:
    tracemalloc.reset_peak()
    before, previous = tracemalloc.get_traced_memory()[0], sys.getprofile()
    sys.setprofile(Budget(20 * size + 20_000))
    try:
        outcome = load(path)
    finally:
        sys.setprofile(previous)
    peak = tracemalloc.get_traced_memory()[1] - before
    assert peak < 20 * size + 2**21, f"{peak} bytes at the peak for a file of {size}"
    return outcome


def outcomes_of_mutants(original: bytes, header: int, folder: Path, seed: int) -> Counter[str]:
    rng, path, outcomes = random.Random(seed), folder / "mutant.gguf", Counter[str]()
    tracemalloc.start()
    try:
        for number in range(N_MUTANTS):
            content = mutate(rng, original, header)
            path.unlink(missing_ok=True)  # a new file, as writing into a mapped one would change it
            path.write_bytes(content)
            try:
                outcomes[load_within_bounds(path, len(content))] += 1
            except Exception as error:
                kept = folder / f"mutant-{seed}-{number}.gguf"
                kept.write_bytes(content)
                raise AssertionError(f"{kept}: {error!r}") from error
    finally:
        tracemalloc.stop()
    return outcomes


@pytest.mark.parametrize("source", SOURCES)
def test_mutants_of_models(tiny_model: Any, tmp_path: Path, source: str) -> None:
    path = tiny_model(**SOURCES[source])
    with GGUFFile(path) as file:
        header = file.data_offset
    assert load(path) == "loaded"
    seed = 1000 + list(SOURCES).index(source)
    outcomes = outcomes_of_mutants(path.read_bytes(), header, tmp_path, seed)
    assert sum(outcomes.values()) == N_MUTANTS
    # Neither may be so rare that the test shows nothing about it.
    assert outcomes["loaded"] > N_MUTANTS // 50 and outcomes["header FormatError"] > N_MUTANTS // 4


@pytest.mark.parametrize("version", [2, 3])
def test_mutants_of_every_value_type(tmp_path: Path, version: int) -> None:
    outcomes = outcomes_of_mutants(every_value_type(version), 2100, tmp_path, version)
    assert sum(outcomes.values()) == N_MUTANTS and outcomes["header FormatError"] > N_MUTANTS // 2


@pytest.mark.parametrize("item", [bytes(8), struct.pack("<IQ", 9, 0), struct.pack("<IQ", 4, 0)])
def test_files_that_cost_the_most_memory_for_their_size(tmp_path: Path, item: bytes) -> None:
    """Empty strings and empty arrays: the smallest encodings of what Python needs an object for."""
    kind, count = (8 if len(item) == 8 else 9), 40_000
    payload = struct.pack("<IQ", kind, count) + item * count
    content = image([kv("general.architecture", 8, string("llama")), kv("items", 9, payload)])
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        assert load_within_bounds(path, len(content)) == "config FormatError"  # no block_count
    finally:
        tracemalloc.stop()


def test_every_truncation_of_a_header(tmp_path: Path) -> None:
    content = every_value_type()
    outcomes = Counter[str]()
    for length in range(0, len(content), 3):
        path = tmp_path / "file.gguf"
        path.unlink(missing_ok=True)
        path.write_bytes(content[:length])
        outcomes[load(path)] += 1
    assert set(outcomes) == {"header FormatError"}


ODD_VALUES: list[Any] = [
    0,
    1,
    -1,
    2,
    3,
    7,
    2**31 - 1,
    2**31,
    2**64 - 1,
    -(2**63),
    True,
    False,
    "",
    "yarn",
    "none",
]
ODD_VALUES += [0.0, -0.0, 1e-300, 0.5, 1.0, -1.0, 1e9, 1e300, float("nan"), float("inf"), [], ["x"], [["x"]]]
ODD_VALUES += [np.array(items, kind) for kind in ("i4", "u8", "f4", "?") for items in ([], [1], [1, 1], [0, 1])]
ODD_KEYS = ["rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.yarn_ext_factor"]
ODD_KEYS += ["attention.key_length", "attention.value_length", "attention.scale", "attention.causal"]
ODD_KEYS += ["attention.sliding_window", "expert_count", "rope.scaling.attn_factor"]


@pytest.mark.parametrize("source", SOURCES)
def test_configs_of_odd_metadata(tiny_model: Any, source: str) -> None:
    """Well-formed files whose values make no sense: a valid config or an error of ours."""
    rng, outcomes = random.Random(source), Counter[str]()
    with GGUFFile(tiny_model(**SOURCES[source])) as file:
        metadata, tensors = dict(file.metadata), dict(file.tensors)
        arch = file.get("general.architecture")
        keys = [*metadata, *(f"{arch}.{key}" for key in ODD_KEYS), "general.type", "split.count"]
        for _ in range(2000):
            file.metadata, file.tensors = dict(metadata), dict(tensors)
            for _ in range(rng.choice([1, 1, 2])):
                if rng.random() < 0.8:
                    file.metadata[rng.choice(keys)] = rng.choice(ODD_VALUES)
                elif rng.random() < 0.5:
                    del file.metadata[rng.choice(list(file.metadata))]
                else:
                    name = rng.choice(list(tensors))
                    shape = tuple(rng.choice([1, 4, 8, 300]) for _ in range(rng.randint(1, 4)))
                    file.tensors[rng.choice([name, "extra"])] = replace(tensors[name], shape=shape)
            try:
                config = ModelConfig.from_gguf(file)
            except (FormatError, UnsupportedError) as error:
                assert "\n" not in str(error)
                outcomes[type(error).__name__] += 1
            else:
                outcomes["loaded"] += 1
                numbers = [*asdict(config).values(), *asdict(config.rope_scaling).values()]
                assert all(math.isfinite(number) for number in numbers if isinstance(number, int | float))
    assert min(outcomes.values()) > 50 and len(outcomes) == 3
