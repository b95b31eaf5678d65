"""The file that holds a relufied model as what is added to the public one: what is in it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import ParameterError, StorageError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.lora import Adapter, Factors, norm_hash
from hotcold.solver import relu_adapter

Make = Callable[..., Path]
SHAPES = {"gate": (96, 64), "up": (96, 64), "down": (64, 96), "bypass": (64, 64)}
FLOORS = (0.0, 0.125)
NOTES = {"general.description": "made for a test", "hotcold.relufy.tokens": 5, "hotcold.relufy.texts": ["a", "b"]}


def factors(layer: int, rank: int = 4) -> dict[str, Factors]:
    """Of another rank for the bypass; representable in F16."""
    rng, found = np.random.default_rng(layer), {}
    for part, (n, k) in SHAPES.items():
        r = rank * 2 if part == "bypass" else rank
        a, b = (rng.normal(0, 0.1, shape).astype(np.float16).astype(np.float32) for shape in ((r, k), (n, r)))
        found[part] = Factors(a, b)
    return found


def write(model: Path, out: Path, given: Any = factors, floors: Any = FLOORS, **more: Any) -> None:
    with GGUFFile(model) as file:
        relu_adapter.write(file, ModelConfig.from_gguf(file), out, given, floors, NOTES, **more)


def test_as_the_public_reader_sees_it(tiny_model: Make, tmp_path: Path) -> None:
    model, out = tiny_model(), tmp_path / "out.gguf"
    asked: list[int] = []
    write(model, out, lambda layer: (asked.append(layer), factors(layer))[1])
    assert asked == [0, 1] and list(tmp_path.iterdir()) == [out]
    reader = GGUFReader(out)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    with GGUFFile(model) as file:
        assert fields == NOTES | {
            "general.architecture": "llama",
            "general.type": "adapter",
            "general.name": "tiny ReLU adapter",
            "general.base_model.count": 1,
            "general.base_model.0.name": "tiny",
            "adapter.type": "lora",
            "adapter.lora.alpha": 4.0,
            "llama.hidden_activation": "relu",
            "llama.hidden_activation_threshold": list(FLOORS),
            "hotcold.base.norm_hash": norm_hash(file),
        }
    names = [f"blk.{n}.ffn_{part}.weight.lora_{half}" for n in range(2) for part in SHAPES for half in "ab"]
    assert [tensor.name for tensor in reader.tensors] == names
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F16"}
    np.testing.assert_array_equal(reader.tensors[0].data, factors(0)["gate"].a)
    np.testing.assert_array_equal(reader.tensors[1].data, factors(0)["gate"].b)


@pytest.mark.parametrize("kind", ["F16", "F32"])
@pytest.mark.parametrize("alpha", [None, 0.5, 64.0])
def test_what_is_read_back_is_what_was_given(tiny_model: Make, tmp_path: Path, alpha: float | None, kind: str) -> None:
    write(tiny_model(), tmp_path / "out.gguf", alpha=alpha, kind=kind)
    with Adapter(tmp_path / "out.gguf") as adapter, GGUFFile(tiny_model()) as model:
        adapter.check(model)
        assert adapter.activation == "relu" and adapter.floors == FLOORS and adapter.alpha == (alpha or 4.0)
        for layer in range(2):
            for part, given in factors(layer).items():
                name = f"blk.{layer}.ffn_{part}.weight"
                got = adapter.factors(name)
                product = adapter.scale(1.0, name) * (got.b @ got.a)
                np.testing.assert_allclose(product, given.b @ given.a, rtol=2e-3, atol=1e-6)


def test_some_parts_and_none(tiny_model: Make, tmp_path: Path) -> None:
    write(tiny_model(), tmp_path / "out.gguf", lambda layer: {"up": factors(layer)["up"]} if layer else {})
    with Adapter(tmp_path / "out.gguf") as adapter:
        assert adapter.ranks == {"blk.1.ffn_up.weight": 4}
    with pytest.raises(ParameterError, match="factors: got none"):
        write(tiny_model(), tmp_path / "none.gguf", lambda layer: {})


def changed(part: str, a: Any = None, b: Any = None) -> Any:
    def given(layer: int) -> dict[str, Factors]:
        found = factors(layer)
        old = found.get(part, found["up"])
        found[part] = Factors(old.a if a is None else np.float32(a), old.b if b is None else np.float32(b))
        return found

    return given


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": (dict(given=changed("down", b=np.full((64, 4), np.nan))), "ffn_down.weight.lora_b: got .*not finite in F16"),
    "beyond F16": (dict(given=changed("up", a=np.full((4, 64), 1e5))), "ffn_up.weight.lora_a: got .*not finite in F16"),
    "beyond F16 by alpha": (dict(given=changed("up", b=np.full((96, 4), 3e4)), alpha=1.0), "ffn_up.weight.lora_b"),
    "shape": (dict(given=changed("bypass", a=np.zeros((8, 96)))), r"layer 0, bypass: got a \(8, 96\) .*\(rank, 64\)"),
    "ranks": (dict(given=changed("gate", b=np.zeros((96, 5)))), r"layer 0, gate: got .*\(96, 5\)"),
    "rank 0": (dict(given=changed("gate", np.zeros((0, 64)), np.zeros((96, 0)))), "layer 0, gate"),
    "part": (dict(given=changed("norm")), "got 'norm', wanted some of gate, up, down, bypass"),
    "floors": (dict(floors=[0.0]), "floors: got 1, wanted 2"),
    "alpha": (dict(alpha=0.0), "alpha: got 0.0"),
    "kind": (dict(kind="Q8_0"), "got 'Q8_0', wanted one of F16, F32"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, tiny_model: Make, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=BAD[name][1]):
        write(tiny_model(), tmp_path / "out.gguf", **BAD[name][0])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf import GGUFWriter

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(StorageError, match="No space left.*can be written"):
        write(tiny_model(), tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []
