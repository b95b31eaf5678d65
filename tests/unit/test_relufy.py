"""relufy without PyTorch: arguments, the work folder, and the file that is written from given matrices."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from typer.testing import CliRunner

from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import ParameterError, StorageError, TrainingError, UnsupportedError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import find_section
from hotcold.formats.section_file import update_section
from hotcold.formats.types import GGMLType
from hotcold.solver import relu_file, relufy, relufy_checks
from hotcold.solver.corpus import Corpus
from hotcold.solver.relufy_checks import Effort, Recipe
from hotcold.tools.cli import app

Make = Callable[..., Path]
NOTES = {"general.description": "made for a test", "hotcold.relufy.tokens": 5, "hotcold.relufy.texts": ["a", "b"]}
N_TOKENS = (relufy_checks.MIN_WINDOWS + relufy_checks.HELD_OUT) * relufy_checks.WINDOW


def new_weights(config: ModelConfig, seed: int = 0) -> list[Mapping[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    shapes = {"gate": (config.n_ff, config.n_embd), "up": (config.n_ff, config.n_embd)}
    shapes["down"] = (config.n_embd, config.n_ff)
    return [
        {part: rng.normal(0, 0.1, shape).astype(np.float32) for part, shape in shapes.items()}
        for _ in range(config.n_layer)
    ]


def written(source: Path, out: Path, kind: GGMLType) -> list[Mapping[str, np.ndarray]]:
    with GGUFFile(source) as file:
        config = ModelConfig.from_gguf(file)
        weights = new_weights(config)
        relu_file.write(file, config, out, kind, lambda layer: weights[layer], [0.0] * config.n_layer, NOTES)
    return weights


def corpus(n_tokens: int, name: str = "text.txt") -> Corpus:
    return Corpus(name, np.arange(n_tokens, dtype=np.int32) % 250, None)


@pytest.mark.parametrize("name", relu_file.TYPES)
def test_new_matrices_are_written_and_all_else_is_copied(tiny_model: Make, tmp_path: Path, name: str) -> None:
    source, out = tiny_model(qtype="Q8_0", biases=True), tmp_path / "out.gguf"
    weights = written(source, out, GGMLType[name])
    before = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    after = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    assert list(after) == list(before)
    steps = {"F32": 0.0, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 1e-2}
    for tensor in after.values():
        if ".ffn_" in tensor.name and "norm" not in tensor.name:
            _, layer, part, _ = tensor.name.split(".")
            wanted = weights[int(layer)][part.removeprefix("ffn_")]
            got = dequantize(tensor.data, tensor.tensor_type).reshape(wanted.shape)
            assert tensor.tensor_type == GGMLQuantizationType[name]
            assert np.abs(got - wanted).max() <= steps.get(name, 0.15) * np.abs(wanted).max()
        else:
            assert tensor.tensor_type == before[tensor.name].tensor_type
            assert tensor.data.tobytes() == before[tensor.name].data.tobytes()


def test_metadata_is_kept_and_says_how_the_file_was_made(tiny_model: Make, tmp_path: Path) -> None:
    source, out = tiny_model(metadata={"general.base_model.0.name": "older", "some.flag": True}), tmp_path / "out.gguf"
    written(source, out, GGMLType.Q8_0)
    with GGUFFile(source) as before, GGUFFile(out) as after:
        changed = {"general.name", "general.base_model.0.name", "general.file_type"}
        for key, value in before.metadata.items():
            if key not in changed:
                assert np.array_equal(after.metadata[key], value), key
        assert after.get("general.name") == "tiny ReLU"
        assert after.get("general.base_model.0.name") == "tiny"
        assert after.get("general.base_model.count") == 1
        assert after.get("general.file_type") == 7  # llama.cpp: mostly Q8_0
        assert after.get("general.quantization_version") == 2
        assert {key: after.metadata[key] for key in NOTES} == NOTES
        assert ModelConfig.from_gguf(before).activation == "silu"
        assert ModelConfig.from_gguf(after).activation == "relu"


def test_the_file_is_read_as_a_relu_model(tiny_model: Make, tmp_path: Path) -> None:
    """With the source's own matrices, the oracle's logits change by the activation alone."""
    source, out = tiny_model(), tmp_path / "out.gguf"
    with GGUFFile(source) as file:
        config = ModelConfig.from_gguf(file)

        def own(layer: int) -> dict[str, np.ndarray]:
            return {part: file.dequantized(f"blk.{layer}.ffn_{part}.weight") for part in relu_file.PARTS}

        relu_file.write(file, config, out, GGMLType.F32, own, [0.0] * config.n_layer, NOTES)
    silu = naive.load(source)
    got, before = naive.forward(out, [1, 5, 9]), silu.forward([1, 5, 9])
    silu.activation = "relu"
    assert np.array_equal(got, silu.forward([1, 5, 9]))
    assert np.abs(got - before).max() > 0.01


def test_the_section_has_down_by_neuron(tiny_model: Make, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    weights = written(tiny_model(), out, GGMLType.F16)
    with GGUFFile(out) as file:
        config = ModelConfig.from_gguf(file)
    update_section(out, relu_file.section(config, GGMLType.F16, lambda layer: weights[layer]))
    with GGUFFile(out) as file, find_section(file) as section:
        assert section.attached
        assert section.has_down_t()
        for layer in range(config.n_layer):
            name = f"blk.{layer}.ffn_down_t.weight"
            assert section.image.tensors[name].type == GGMLType.F16
            assert np.array_equal(section.image.dequantized(name), file.dequantized(name.replace("_t", "")).T)


def test_a_failed_write_leaves_nothing(tiny_model: Make, tmp_path: Path) -> None:
    def fail(layer: int) -> dict[str, np.ndarray]:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out.gguf"
    with GGUFFile(tiny_model()) as file, pytest.raises(StorageError, match="No space left"):
        relu_file.write(file, ModelConfig.from_gguf(file), out, GGMLType.F32, fail, [0.0, 0.0], NOTES)
    assert list(tmp_path.iterdir()) == []


def test_types(tiny_model: Make) -> None:
    def choose(qtype: str, name: str | None = None, **options: Any) -> str:
        with GGUFFile(tiny_model(qtype=qtype, **options)) as file:
            return relu_file.choose_type(file, ModelConfig.from_gguf(file), name).name

    assert choose("F16") == "F16"
    assert choose("Q4_0") == "Q8_0"
    assert choose("F16", "q5_1") == "Q5_1"
    assert choose("Q4_K", n_embd=256, n_ff=256, n_head_kv=4) == "Q8_0"
    with pytest.raises(ParameterError, match="got 'Q4_K', wanted one of F32, F16, BF16, Q4_0"):
        choose("F32", "Q4_K")
    with pytest.raises(ParameterError, match="n_ff = 80, such as F16"):
        choose("F32", "Q8_0", n_ff=80)


@pytest.mark.parametrize(
    "kind, name, value",
    [
        *(
            (Recipe, "fit_tokens", 100),
            (Recipe, "sweeps", 0),
            (Recipe, "seed", -1),
            (Recipe, "seed", 1 << 31),
            (Recipe, "chat", -0.1),
        ),
        *(
            (Recipe, "chat", 1.0),
            (Recipe, "own", 1.0),
            (Recipe, "low_rank", -1),
            (Recipe, "batch_size", 100),
            (Recipe, "batch_size", 3000),
        ),
        *((Effort, "density", 0.0), (Effort, "density", 1.5), (Effort, "minutes", 0.0), (Effort, "lr", 0.0)),
        (Effort, "ubatch_size", 10),
    ],
)
def test_settings_out_of_range(kind: type, name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=f"{name}: got {value}, wanted"):
        kind(**{name: value})


def test_an_effort_is_a_time_or_a_number_of_tokens() -> None:
    with pytest.raises(ParameterError, match="both or neither"):
        Effort(minutes=5.0, tokens=2048)
    with pytest.raises(ParameterError, match="tokens: got -1"):
        Effort(minutes=None, tokens=-1)


def test_what_cannot_be_done_is_said_first(tiny_model: Make, tmp_path: Path) -> None:
    effort = Effort()
    with GGUFFile(tiny_model()) as file, GGUFFile(tiny_model(metadata={"llama.hidden_activation": "relu"})) as relu:
        config, out = ModelConfig.from_gguf(file), tmp_path / "out.gguf"
        relufy_checks.check(config, corpus(N_TOKENS), Recipe(), effort)
        with pytest.raises(UnsupportedError, match="relu already"):
            relufy_checks.check(ModelConfig.from_gguf(relu), corpus(N_TOKENS), Recipe(), effort)
    with pytest.raises(ParameterError, match=f"text.txt: got {N_TOKENS - 1} tokens, wanted at least {N_TOKENS}"):
        relufy_checks.check(config, corpus(N_TOKENS - 1), Recipe(), effort)
    with pytest.raises(ParameterError, match=f"low_rank: got 500, wanted at most {config.n_embd // 2}"):
        relufy_checks.check(config, None, Recipe(low_rank=500), effort)
    with pytest.raises(ParameterError, match="tokens: got 100, wanted 0 or at least 2048"):
        relufy_checks.check(config, None, Recipe(), Effort(minutes=None, tokens=100))
    relufy_checks.check_out(out, [tiny_model()])
    with pytest.raises(StorageError, match="a folder"):
        relufy_checks.check_out(tmp_path, [])
    with pytest.raises(StorageError, match="no such folder"):
        relufy_checks.check_out(tmp_path / "no" / "out.gguf", [])
    text = tmp_path / "text.txt"
    text.touch()
    with pytest.raises(StorageError, match="the file to read, which would be replaced"):
        relufy_checks.check_out(tmp_path / "." / "text.txt", [tiny_model(), text])
    (tmp_path / "hotcold-out.gguf").touch()
    with pytest.raises(StorageError, match="hotcold-out.gguf: the section of an earlier out.gguf"):
        relufy_checks.check_out(out, [])


def test_models_that_have_what_relufy_adds_are_refused(tiny_model: Make) -> None:
    for options, what in (({"bypass": True}, "a bypass beside"), ({"floors": [0.1, 0.2]}, "floors of its activations")):
        with GGUFFile(tiny_model(**options)) as file, pytest.raises(UnsupportedError, match=what):
            relufy_checks.check_model(file, ModelConfig.from_gguf(file))


def test_notes_of_a_number_of_tokens_have_no_time_in_them() -> None:
    report = relufy.Report(30.0, 33.0, [0.3], 2048, 7.0)
    timed, counted = Effort(minutes=8.0), Effort(minutes=None, tokens=2048)
    found = [relufy._notes(None, Recipe(), effort, report)["general.description"] for effort in (timed, counted)]
    assert " in 7 minutes" in found[0] and "minutes" not in found[1]


def test_memory_errors_are_told() -> None:
    class OutOfMemoryError(RuntimeError):
        """As PyTorch's."""

    for error in (MemoryError(), OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(TrainingError, match="out of memory with all of it; .* with --less"):
            with relufy_checks.memory("all of it", "--less"):
                raise error
    with pytest.raises(RuntimeError, match="another"), relufy_checks.memory("", ""):
        raise RuntimeError("another")


def test_work_is_kept_and_only_taken_up_for_equal_settings(tiny_model: Make, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"

    def begin(model: Path, text: Corpus | None, recipe: Recipe) -> bool:
        with GGUFFile(model) as file:
            work = relufy_checks.work_folder(out, file, text, recipe)
            with work.locked():
                return work.begin()

    folder, text, recipe = tmp_path / "out.gguf.relufy", corpus(N_TOKENS), Recipe()
    assert not begin(tiny_model(), text, Recipe(seed=7))
    (folder / "dtype.pt").write_bytes(b"chosen")
    assert not begin(tiny_model(), text, recipe)  # nothing was done for the other yet
    (folder / "layer-0.pt").write_bytes(b"trained")
    for other in (
        (tiny_model(seed=1), text, recipe),
        (tiny_model(), corpus(N_TOKENS + 1), recipe),
        (tiny_model(), None, recipe),
        (tiny_model(), text, Recipe(low_rank=8)),
    ):
        with pytest.raises(StorageError, match=r"out.gguf.relufy: .* of other settings.*; delete it, or name another"):
            begin(*other)
    assert begin(tiny_model(), text, recipe)
    (folder / "settings.json").write_text("{", encoding="utf-8")
    with pytest.raises(StorageError, match="settings.json: cannot be read"):
        begin(tiny_model(), text, recipe)
    assert (folder / "layer-0.pt").read_bytes() == b"trained"


def test_work_goes_on_where_a_killed_run_had_kept_nothing(tiny_model: Make, tmp_path: Path) -> None:
    (tmp_path / "out.gguf.relufy").mkdir()
    (tmp_path / "out.gguf.relufy" / ".settings.json.part").touch()
    with GGUFFile(tiny_model()) as file:
        assert not relufy_checks.work_folder(tmp_path / "out.gguf", file, corpus(N_TOKENS), Recipe()).begin()


def test_a_folder_of_somebody_else_is_left_alone(tiny_model: Make, tmp_path: Path) -> None:
    (tmp_path / "out.gguf.relufy").mkdir()
    (tmp_path / "out.gguf.relufy" / "diary").touch()
    with GGUFFile(tiny_model()) as file, pytest.raises(StorageError, match="out.gguf.relufy"):
        relufy_checks.work_folder(tmp_path / "out.gguf", file, corpus(N_TOKENS), Recipe()).begin()
    assert (tmp_path / "out.gguf.relufy" / "diary").exists()


def test_two_processes_do_not_make_one_file(tiny_model: Make, tmp_path: Path) -> None:
    with GGUFFile(tiny_model()) as file:
        works = [relufy_checks.work_folder(tmp_path / "o.gguf", file, corpus(N_TOKENS), Recipe()) for _ in range(2)]
        first, second = works
        with first.locked(), pytest.raises(StorageError, match="another process"), second.locked():
            pass
        with second.locked():
            pass


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["relufy", *arguments])
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    return line


def test_the_command_refuses_in_one_line(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, text, empty = (str(tmp_path / name) for name in ("out.gguf", "text.txt", "empty.txt"))
    Path(text).write_text("hello the world " * 100, encoding="utf-8")
    Path(empty).touch()
    model = str(tiny_model())
    assert "wanted one of F32" in refused(model, text, "-o", out, "--type", "Q3_K")
    assert "density: got 2.0, wanted 0.01 to 1" in refused(model, text, "-o", out, "--density", "2")
    assert "--minutes: got it with --tokens" in refused(model, text, "-o", out, "--minutes", "9", "--tokens", "2048")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs PyTorch: pip install 'hotcold[train]'" in refused(model, text, "-o", out)
    monkeypatch.setattr(relufy_checks, "require_torch", lambda threads=None: None)
    assert "empty text" in refused(model, empty, "-o", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "text.txt"]
