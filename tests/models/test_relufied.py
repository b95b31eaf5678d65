"""Relufy adapters: what merging makes of a model is what NumPy makes of it, once, whole, and for the right model."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from adapters import ATTENTION, FFN, make_adapter, matrices
from families import relative_error
from typer.testing import CliRunner

from hotcold import Engine, GGUFFile
from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import FormatError, HotcoldError, StorageError, UnsupportedError
from hotcold.formats.gguf_rewrite import rewrite
from hotcold.formats.lora import Factors
from hotcold.formats.section import find_section
from hotcold.formats.section_file import update_section
from hotcold.formats.types import GGMLType
from hotcold.runtime import merge as merging
from hotcold.runtime import merged
from hotcold.solver import relu_adapter, transpose
from hotcold.solver.quantize import Options, quantize
from hotcold.tools.cli import app

Make = Callable[..., Path]
IDS = [(7 * i + 3) % 290 for i in range(40)]
FLOORS = (0.3, 0.6)
BYPASS = {f"blk.{layer}.ffn_bypass.weight": (64, 64) for layer in range(2)}
KEY, FLOORS_KEY = "llama.hidden_activation", "llama.hidden_activation_threshold"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOTCOLD_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "merged"


def relufy_adapter(path: Path, model: Path, **more: Any) -> dict[str, np.ndarray]:
    """An adapter that changes all there is to change; what it adds to each matrix."""
    keys = {KEY: "relu", FLOORS_KEY: list(FLOORS), **more.pop("metadata", {})}
    keys = {key: value for key, value in keys.items() if value is not None}
    return make_adapter(path, matrices(model, FFN) | BYPASS, metadata=keys, strength=1.0, **more)


def relufied(model: Path, *added: Mapping[str, np.ndarray], **changes: Any) -> naive.Model:
    """A model and what is added to its matrices, with ReLU."""
    oracle = naive.load(model, kv_f16=True)
    oracle.activation, oracle.floors = "relu", list(FLOORS)
    for name, change in (item for one in added for item in one.items()):
        oracle.tensors[name] = oracle.tensors.get(name, 0.0) + change
    for name, value in changes.items():
        setattr(oracle, name, value)
    return oracle


def logits(model: Path, lora: Any = (), **options: Any) -> np.ndarray:
    with Engine(model, n_ctx=64, n_threads=2, lora=lora, **options) as engine:
        with closing(engine.new_sequence()) as sequence:
            return engine.eval(sequence, IDS, all_logits=True).copy()


def run(*arguments: object, fails: bool = False) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (result.exit_code != 0) == fails, result.output
    return result.output


def files(folder: Path) -> list[Path]:
    """What is there besides lock files."""
    return [path for path in folder.iterdir() if path.suffix != ".lock"] if folder.exists() else []


@pytest.mark.parametrize("sparsity", ["auto", "dense", "exact"])
def test_against_numpy(tiny_model: Make, tmp_path: Path, sparsity: str) -> None:
    model, path = tiny_model(), tmp_path / "adapter.gguf"
    added = relufy_adapter(path, model)
    wanted = relufied(model, added).forward(IDS)
    assert relative_error(logits(model, [path], sparsity=sparsity), wanted) < 1e-3
    without = {name: change for name, change in added.items() if "bypass" not in name}
    others = {
        "the model as it was": naive.load(model, kv_f16=True),
        "without the adapter": relufied(model),
        "without the bypass": relufied(model, without),
        "with SiLU": relufied(model, added, activation="silu"),
        "without floors": relufied(model, added, floors=[0.0, 0.0]),
        "with one floor": relufied(model, added, floors=[FLOORS[0]] * 2),
    }
    for what, oracle in others.items():
        assert relative_error(oracle.forward(IDS), wanted) > 2e-3, what


def test_without_floors_or_a_bypass(tiny_model: Make, tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "adapter.gguf"
    added = make_adapter(path, matrices(model, ("ffn_gate",)), metadata={KEY: "relu"}, alpha=None, rank=2)
    wanted = relufied(model, added, floors=[0.0, 0.0]).forward(IDS)
    assert relative_error(logits(model, [path]), wanted) < 1e-3


def test_other_adapters_run_beside_it(tiny_model: Make, tmp_path: Path) -> None:
    model, paths = tiny_model(), [tmp_path / f"{i}.gguf" for i in range(3)]
    first = make_adapter(paths[0], matrices(model, ATTENTION), seed=1)
    second = relufy_adapter(paths[1], model)
    third = make_adapter(paths[2], matrices(model), seed=2)
    half = {name: change * 0.5 for name, change in third.items()}
    lora = [paths[0], paths[1], (paths[2], 0.5)]
    wanted = relufied(model, first, second, half).forward(IDS)
    assert relative_error(logits(model, lora), wanted) < 1e-3
    assert relative_error(relufied(model, second).forward(IDS), wanted) > 0.01
    out = tmp_path / "out.gguf"
    run("convert", model, out, "--lora", paths[0], "--lora", paths[1], "--lora", f"{paths[2]}=0.5")
    assert relative_error(logits(out), wanted) < 1e-3


def test_what_is_in_the_file(tiny_model: Make, tmp_path: Path) -> None:
    """New matrices in Q8_0, made of the floats; ffn_down by neurons too; all else byte for byte."""
    model, path, out = tiny_model(qtype="Q4_0"), tmp_path / "adapter.gguf", tmp_path / "out.gguf"
    added = relufy_adapter(path, model, metadata={"general.description": "how", "hotcold.relufy.texts": "a"})
    said = run("convert", model, "-o", out, "--lora", path)
    assert "8 Q8_0" in said and str(out) in said
    assert sorted(one.name for one in files(tmp_path)) == ["adapter.gguf", "out.gguf"]
    base = naive.load(model).tensors
    with GGUFFile(model) as old, GGUFFile(out) as new, find_section(new) as section:
        assert list(new.tensors) == [*old.tensors, *BYPASS]
        for name, info in new.tensors.items():
            if name not in added:
                assert info.type == old.tensors[name].type
                np.testing.assert_array_equal(new.data(name), old.data(name))
                continue
            values = (base.get(name, 0.0) + added[name]).astype(np.float32)
            assert info.type == GGMLType.Q8_0
            assert np.abs(new.dequantized(name) - values).max() <= np.abs(values).max() / 127
            if "down" in name:
                turned = section.image.dequantized(name.replace("down", "down_t"))
                assert np.abs(turned - values.T).max() <= np.abs(values).max() / 127
        for key, value in old.metadata.items():
            if key not in ("general.name", "general.file_type"):
                assert np.array_equal(new.metadata[key], value), key
        got = {key: new.metadata[key] for key in ("general.description", "hotcold.relufy.texts", KEY, "general.name")}
        assert list(got.values()) == ["how", "a", "relu", "tiny ReLU"]
        assert new.metadata["general.base_model.0.name"] == "tiny" and new.metadata["general.file_type"] == 7
        assert new.metadata["general.quantization_version"] == 2
        np.testing.assert_allclose(new.metadata[FLOORS_KEY], FLOORS, rtol=1e-6)
    loaded, _ = merged.settle(model, [(path, 1.0)])
    assert loaded.read_bytes() == out.read_bytes()


@pytest.mark.parametrize("kind, turned", [("f16", "F16"), ("q5_0", "Q5_0"), ("q4_k", "Q8_0")])
def test_types(tiny_model: Make, tmp_path: Path, kind: str, turned: str) -> None:
    model, path, out = tiny_model(n_embd=256, n_ff=256, n_head_kv=4), tmp_path / "adapter.gguf", tmp_path / "out.gguf"
    make_adapter(path, matrices(model, FFN), metadata={KEY: "relu"})
    run("convert", model, out, "--lora", path, "--type", kind)
    with GGUFFile(out) as file, find_section(file) as section:
        assert {file.tensors[name].type.name for name in matrices(model, FFN)} == {kind.upper()}
        assert file.tensors["blk.0.attn_q.weight"].type == GGMLType.F32
        assert section.image.tensors["blk.1.ffn_down_t.weight"].type.name == turned


def test_matrices_that_an_adapter_leaves_alone(tiny_model: Make, tmp_path: Path) -> None:
    """They keep their bytes; a quantised ffn_down by neurons is Q8_0, as columns are not on the grid of rows."""
    model, path, out = tiny_model(qtype="Q4_0"), tmp_path / "adapter.gguf", tmp_path / "out.gguf"
    added = make_adapter(path, {"blk.0.ffn_gate.weight": (96, 64)}, metadata={KEY: "relu"})
    run("convert", model, out, "--lora", path)
    with GGUFFile(model) as old, GGUFFile(out) as new, find_section(new) as section:
        for name in matrices(model):
            assert (new.tensors[name].type == GGMLType.Q4_0) == (name not in added)
        for layer in range(2):
            turned = section.image.tensors[f"blk.{layer}.ffn_down_t.weight"]
            down = old.dequantized(f"blk.{layer}.ffn_down.weight")
            assert turned.type == GGMLType.Q8_0
            assert np.abs(section.image.dequantized(turned.name) - down.T).max() <= np.abs(down).max() / 127
    exact, dense = (logits(model, [path], sparsity=mode) for mode in ("exact", "dense"))
    assert relative_error(exact, dense) < 1e-3


def test_made_once(tiny_model: Make, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again for another adapter, or another model; not for one that was moved or has a section."""
    model, path = tmp_path / "model.gguf", tmp_path / "adapter.gguf"
    shutil.copy(tiny_model(), model)
    relufy_adapter(path, model)
    ask = ("run", model, "-p", "hello", "-n", "4", "--temp", "0", "-c", "64", "--lora", path)
    first = run(*ask)
    (made,) = files(home)
    assert f"merged adapter.gguf into model.gguf, once: {made}" in first
    number = made.stat().st_ino

    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("merged again")

    with monkeypatch.context() as patch:
        patch.setattr(merging, "merge", fail)
        second = run(*ask)
        assert "merged" not in second and first.endswith(second) and second
        moved = tmp_path / "renamed.gguf"
        shutil.copy(model, moved)
        with GGUFFile(model) as file:
            contents = transpose.contents(file, ModelConfig.from_gguf(file))
            update_section(moved, contents)
        logits(moved, [path])
    assert files(home) == [made] and made.stat().st_ino == number
    relufy_adapter(path, model, seed=1)
    logits(model, [path])
    assert len(files(home)) == 2
    shutil.copy(tiny_model(seed=1), model)
    logits(model, [path])
    assert len(files(home)) == 3
    made.unlink()
    relufy_adapter(path, model)
    shutil.copy(tiny_model(), model)
    assert "once" in run(*ask) and made.exists()


def test_two_that_want_it_at_once(
    tiny_model: Make, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = tiny_model(), tmp_path / "adapter.gguf"
    relufy_adapter(path, model)
    began, calls, said = threading.Event(), list[Path](), list[str]()
    real = merging.merge

    def merge(source: Path, lora: Any, out: Path, *more: Any, **options: Any) -> Any:
        calls.append(out)
        began.set()
        assert waits.wait(60)
        return real(source, lora, out, *more, **options)

    waits = threading.Event()

    def tell(line: str) -> None:
        said.append(line)
        if "waiting" in line:
            waits.set()

    monkeypatch.setattr(merging, "merge", merge)
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(merged.settle(model, [(path, 1.0)], 1, tell)[0]))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert began.is_set() and len(calls) == 1 and results == [calls[0]] * 2 and files(home) == [calls[0]]
    assert sum("waiting for another hotcold" in line for line in said) == 1


@pytest.mark.parametrize("at", ["tensors", "section", "rename"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_merge_that_ends_early_leaves_nothing(
    tiny_model: Make, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, at: str, error: BaseException
) -> None:
    model, path = tiny_model(), tmp_path / "adapter.gguf"
    relufy_adapter(path, model)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    wanted = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else StorageError
    with monkeypatch.context() as patch:
        if at == "rename":
            patch.setattr(merging.os, "replace", fail)
        else:
            patch.setattr(merging._Writer, "turned" if at == "section" else "_encoded", fail)
        with pytest.raises(wanted) as caught:
            Engine(model, lora=[path])
        if wanted is StorageError:
            assert "No space left on device; make room, or set HOTCOLD_HOME" in str(caught.value)
        assert files(home) == []
        with pytest.raises(wanted):
            merging.merge(model, [(path, 1.0)], tmp_path / "out.gguf")
        assert files(tmp_path) == [path, home.parent]
    (home / f".x-{home.name}.part").mkdir()  # another's
    logits(model, [path])
    assert len(files(home)) == 2


def test_what_a_killed_process_left_goes(tiny_model: Make, tmp_path: Path, home: Path) -> None:
    model, path = tiny_model(), tmp_path / "adapter.gguf"
    relufy_adapter(path, model)
    out, _ = merged.settle(model, [(path, 1.0)])
    out.unlink()
    (home / f".{out.name}.abc.part").mkdir()
    (home / f".{out.name}.abc.part" / out.name).touch()
    merged.settle(model, [(path, 1.0)])
    assert files(home) == [out]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (dict(arch="qwen2", metadata={KEY: None, "qwen2.hidden_activation": "relu"}), "'qwen2'.*'llama'"),
    "fewer floors": (dict(metadata={FLOORS_KEY: [0.1]}), "threshold'.*1 numbers.*2, one for each layer"),
    "floors below 0": (dict(metadata={FLOORS_KEY: [0.1, -0.1]}), "threshold'.*numbers from 0"),
    "NaN in floors": (dict(metadata={FLOORS_KEY: [0.1, float("nan")]}), "threshold'.*numbers from 0"),
    "one floor": (dict(metadata={FLOORS_KEY: "0.1"}), "threshold'"),
    "floors alone": (dict(metadata={KEY: None}), "threshold'.*without a key 'llama.hidden_activation'"),
    "activation": (dict(metadata={KEY: "tanh"}), "'tanh' is not supported in an adapter, only 'relu'"),
    "infinite": (dict(strength=float("inf")), "infinite values"),
    "bypass of one layer": (dict(shapes={"blk.0.ffn_bypass.weight": (64, 64)}), "blk.1.ffn_bypass.*other layers"),
    "bypass of no layer": (dict(shapes={"blk.2.ffn_bypass.weight": (64, 64)}), "blk.2.ffn_bypass.*none of that name"),
    "bypass too wide": (dict(shapes=BYPASS | {"blk.1.ffn_bypass.weight": (96, 64)}), "from 64 to 96.*64 to 64.*n_embd"),
    "gate too wide": (dict(shapes={"blk.0.ffn_gate.weight": (64, 64)}), "ffn_gate.*from 64 to 64.*64 to 96"),
    "norms": (dict(metadata={"hotcold.base.norm_hash": "0", "general.base_model.0.name": "B"}), "norm_hash.*'B'"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, tiny_model: Make, tmp_path: Path, home: Path) -> None:
    model, (options, message) = tiny_model(), BAD[name]
    keys = {KEY: "relu", FLOORS_KEY: list(FLOORS), **options.get("metadata", {})}
    keys = {key: value for key, value in keys.items() if value is not None}
    shapes = {"shapes": matrices(model, FFN) | BYPASS, **options, "metadata": keys}
    make_adapter(tmp_path / "bad.gguf", **shapes)
    for attempt in (
        lambda: Engine(model, lora=[tmp_path / "bad.gguf"]),
        lambda: merging.merge(model, [(tmp_path / "bad.gguf", 1.0)], tmp_path / "out.gguf"),
    ):
        with pytest.raises((FormatError, UnsupportedError), match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value) and "bad.gguf" in str(caught.value)
    assert not (tmp_path / "out.gguf").exists() and files(home) == []


def test_models_and_scales_that_are_refused(tiny_model: Make, tmp_path: Path) -> None:
    model, path, other = tiny_model(), tmp_path / "adapter.gguf", tmp_path / "other.gguf"
    relufy_adapter(path, model)
    shutil.copy(path, other)
    experts = tiny_model(n_expert=4)
    make_adapter(tmp_path / "attention.gguf", matrices(experts, ATTENTION), metadata={KEY: "relu"})
    make_adapter(tmp_path / "ordinary.gguf", BYPASS)
    relu = tiny_model(metadata={KEY: "relu"})
    out, _ = merged.settle(model, [(path, 1.0)])
    cases: list[tuple[Path, list[Any], str]] = [
        (model, [(path, 0.5)], "a scale of 0.5 for .*adapter.gguf, wanted 1"),
        (model, [path, other], "adapter.gguf and .*other.gguf both change the activation"),
        (relu, [path], "makes relu models, and 'tiny' is one already"),
        (out, [path], "makes relu models, and 'tiny ReLU' is one already"),
        (experts, [tmp_path / "attention.gguf"], "gated FFNs; 'tiny' has a mixture of experts"),
        (model, [tmp_path / "ordinary.gguf"], "ffn_bypass.weight.*none of that name"),
        (model, [model], "general.type"),
        (model, [tmp_path / "none.gguf"], "no such file"),
    ]
    for base, lora, message in cases:
        with pytest.raises(HotcoldError, match=message):
            Engine(base, lora=lora)


def test_a_wrong_adapter_is_one_line(tiny_model: Make, tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "adapter.gguf"
    relufy_adapter(path, model)
    said = run("run", model, "-p", "x", "--lora", f"{path}=0.5", fails=True)
    assert said.count("\n") == 1 and "wanted 1" in said
    for arguments, message in (
        ((model, "--lora", path), "wanted the file to write"),
        ((model, model, "--lora", path), "is the model itself"),
        ((tmp_path, tmp_path / "out.gguf", "--lora", path), "convert the checkpoint first"),
        ((model, tmp_path / "out.gguf", "--lora", path, "--type", "iq2_xxs"), "wanted one of F32"),
        ((model, tmp_path / "no" / "out.gguf", "--lora", path), "can be written"),
        ((model, tmp_path, "--lora", path), "is a folder; name the file"),
        ((model, tmp_path / "a.gguf", "-o", tmp_path / "b.gguf", "--lora", path), "given twice"),
    ):
        assert message in run("convert", *arguments, fails=True)
    (tmp_path / "hotcold-out.gguf").touch()
    assert "section of an earlier" in run("convert", model, tmp_path / "out.gguf", "--lora", path, fails=True)
    assert "makes a relu model" in run("inspect", path)


@pytest.mark.parametrize("qtype", ["F32", "Q4_0"])
def test_ordinary_adapters_are_merged_at_convert(tiny_model: Make, tmp_path: Path, qtype: str) -> None:
    """In the model's own types, as wanted, the model's section left behind."""
    model, path, out = tiny_model(qtype=qtype), tmp_path / "adapter.gguf", tmp_path / "out.gguf"
    added = make_adapter(path, matrices(model, ("attn_q", "ffn_down")))
    base = naive.load(model).tensors
    shutil.copy(model, tmp_path / "model.gguf")
    model = tmp_path / "model.gguf"
    with GGUFFile(model) as file:
        update_section(model, transpose.contents(file, ModelConfig.from_gguf(file)))
    said = run("convert", model, out, "--lora", f"{path}=-0.5")
    assert f"4 {qtype}" in said and "ReLU" not in said and "section of model.gguf is not carried over" in said
    for kind in (qtype, "Q8_0"):
        if kind != qtype:
            run("convert", model, out, "--lora", f"{path}=-0.5", "--type", kind)
        with GGUFFile(model) as old, GGUFFile(out) as new:
            assert list(new.tensors) == list(old.tensors) and find_section(new) is None
            assert new.metadata["general.name"] == "tiny"
            step = {"F32": 1e-6, "Q8_0": 1 / 127, "Q4_0": 1 / 7}[kind]
            for name, info in new.tensors.items():
                values = base[name] - 0.5 * added[name] if name in added else base[name]
                assert info.type.name == (kind if name in added else old.tensors[name].type.name)
                error = np.abs(new.dequantized(name) - values).max()
                assert error <= (step * np.abs(values).max() if name in added else 1e-6), name


def test_types_that_nothing_encodes(tiny_model: Make, tmp_path: Path) -> None:
    model, path, out = tmp_path / "model.gguf", tmp_path / "adapter.gguf", tmp_path / "out.gguf"
    rng = np.random.default_rng(0)
    with GGUFFile(tiny_model()) as file:
        types = {name: info.type for name, info in file.tensors.items()}
        types |= dict.fromkeys(("blk.0.attn_q.weight", "blk.0.ffn_up.weight"), GGMLType.IQ4_NL)

        def data(name: str) -> list[np.ndarray]:
            if types[name] == GGMLType.F32:
                return [file.data(name)]
            blocks = rng.integers(0, 256, (file.info(name).n_rows * 2, 18)).astype(np.uint8)
            blocks[:, :2] = np.array([0.002], np.float16).view(np.uint8)
            return [blocks.reshape(-1)]

        rewrite(file, model, types, data, {})
    added = make_adapter(path, {"blk.0.attn_q.weight": (64, 64)})
    assert "Q8_0 stands in for IQ4_NL" in run("convert", model, out, "--lora", path)
    with GGUFFile(model) as old, GGUFFile(out) as new:
        assert new.tensors["blk.0.attn_q.weight"].type == GGMLType.Q8_0
        np.testing.assert_array_equal(new.data("blk.0.ffn_up.weight"), old.data("blk.0.ffn_up.weight"))
        values = old.dequantized("blk.0.attn_q.weight") + added["blk.0.attn_q.weight"]
        assert np.abs(new.dequantized("blk.0.attn_q.weight") - values).max() <= np.abs(values).max() / 127


def test_the_same_model_in_another_type(tiny_model: Make, tmp_path: Path) -> None:
    """One written for the model in F16 is for it in Q8_0, and not for another of the same shape."""
    model, path, smaller = tiny_model(qtype="F16"), tmp_path / "adapter.gguf", tmp_path / "smaller.gguf"
    rng = np.random.default_rng(0)

    def factors(layer: int) -> dict[str, Factors]:
        shapes = {"gate": (96, 64), "down": (64, 96), "bypass": (64, 64)}
        draw = {part: [rng.normal(0, 0.2, shape) for shape in ((3, k), (n, 3))] for part, (n, k) in shapes.items()}
        return {part: Factors(a.astype(np.float32), b.astype(np.float32)) for part, (a, b) in draw.items()}

    with GGUFFile(model) as file:
        relu_adapter.write(file, ModelConfig.from_gguf(file), path, factors, [0.0, 0.0], {})
    quantize(model, smaller, "Q8_0", Options(n_threads=1))
    assert relative_error(logits(smaller, [path]), logits(model, [path])) < 0.05
    with pytest.raises(FormatError, match="norm_hash.*whose norms are others, wanted the model.*'tiny', in any type"):
        Engine(tiny_model(qtype="F16", seed=5), lora=[path])
