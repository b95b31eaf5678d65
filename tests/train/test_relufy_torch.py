"""relufy with PyTorch, on tiny models: the forward pass, the training, taking up interrupted work, the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from tiny import RopeOptions
from typer.testing import CliRunner

from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import TrainingError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import find_section
from hotcold.formats.tokenizer import load_tokenizer
from hotcold.formats.types import GGMLType
from hotcold.solver import dialogues, relufy
from hotcold.solver.corpus import Corpus
from hotcold.tools.cli import app

torch = pytest.importorskip("torch")

from hotcold.solver import distill  # noqa: E402
from hotcold.solver.distill import Ffn, Sequential, Student, Together, _divergence  # noqa: E402
from hotcold.solver.torch_model import TorchModel, fastest_dtype  # noqa: E402

Make = Callable[..., Path]
IDS = [1, 5, 9, 200, 33, 270, 7, 7, 64, 12, 99, 250, 3, 4]
SMALL = relufy.Recipe(tokens=relufy.MIN_WINDOWS * relufy.WINDOW, epochs=2, polish=20480, density=0.4)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "wide heads, some dimensions turned": {"head_dim": 32, "rope_dim": 16},
    "qwen2": {"arch": "qwen2", "tied": True},
    "linear": {"rope": RopeOptions("linear")},
    "yarn with factors": {"rope": RopeOptions("yarn", freqs=True)},
    "window": {"sliding_window": 5},
    "gelu": {"metadata": {"llama.hidden_activation": "gelu"}},
    "relu2": {"metadata": {"llama.hidden_activation": "relu2"}},
}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(path: Path, n_ctx: int = 64) -> TorchModel:
    with GGUFFile(path) as file:
        return TorchModel(file, ModelConfig.from_gguf(file), n_ctx, torch.float32)


def text(n_windows: int = relufy.MIN_WINDOWS + relufy.HELD_OUT, seed: int = 0) -> Corpus:
    """Ids that follow one another with some order: each is the one before plus one of a few steps."""
    steps = np.random.default_rng(seed).choice([1, 2, 3, 50], n_windows * relufy.WINDOW)
    return Corpus("steps", (np.cumsum(steps) % 300).astype(np.int32), None)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_agrees_with_the_oracle(tiny_model: Make, family: str) -> None:
    path = tiny_model(**FAMILIES[family])
    model = load(path)
    with torch.no_grad():
        normed = model.forward(torch.tensor([IDS, IDS[::-1]]))
        logits = normed @ model.head().T
    for got, ids in zip(logits, (IDS, IDS[::-1]), strict=True):
        wanted = naive.forward(path, ids)
        assert np.abs(got.numpy() - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_perplexity_agrees_with_the_oracle(tiny_model: Make) -> None:
    path = tiny_model()
    perplexity, densities = Student(load(path), []).evaluate(torch.tensor([IDS, IDS[::-1]]))
    nll = []
    for ids in (IDS, IDS[::-1]):
        logits = naive.forward(path, ids)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll += [-log_p[i - 1, ids[i]] for i in range(len(IDS) // 2 + 1, len(IDS))]
    assert densities == []
    assert perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)


def test_a_student_is_the_relu_model(tiny_model: Make) -> None:
    path = tiny_model()
    model, oracle = load(path), naive.load(path)
    oracle.activation = "relu"
    student = Student(model, [Ffn.of(model, layer) for layer in range(model.config.n_layer)])
    with torch.no_grad():
        normed, gates = student.forward(model.embed(torch.tensor([IDS])))
        logits = (normed[0] @ model.head().T).numpy()
    wanted = oracle.forward(IDS)
    assert np.abs(logits - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert [gate.shape for gate in gates] == [(1, len(IDS), model.config.n_ff)] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_dialogues_are_what_the_model_says(tiny_model: Make, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """At a temperature near zero, each token is the one that the whole window's forward pass has on top."""
    monkeypatch.setattr(dialogues, "TEMPERATURE", 1e-6)
    model = load(tiny_model(**FAMILIES[family]))
    (window,) = dialogues.write(model, IDS[:4], 1, 40, 0, lambda done, total: None)
    with torch.no_grad():
        top = (model.forward(window[None])[0] @ model.head().T).argmax(-1)
    assert window[:4].tolist() == IDS[:4]
    assert window[4:].tolist() == top[3:-1].tolist()


def test_dialogues_are_many_and_the_same_for_a_seed(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogues, "BATCH", 2)
    model = load(tiny_model())
    first, again, other = (dialogues.write(model, IDS[:4], 5, 20, seed, lambda d, t: None) for seed in (0, 0, 9))
    assert first.shape == (5, 20)
    assert len({tuple(window) for window in first.tolist()}) == 5
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_opening_of_a_chat(tiny_model: Make) -> None:
    with GGUFFile(tiny_model()) as chat, GGUFFile(tiny_model(chat_template=None)) as plain:
        tokenizer = load_tokenizer(chat)
        assert dialogues.opening(chat, 256) == tokenizer.encode("<|im_start|>user\n", special=True)
        assert dialogues.opening(chat, 4) is None
        assert dialogues.opening(plain, 256) is None


def test_windows_are_mixed() -> None:
    windows, written = torch.arange(10)[:, None], torch.tensor([[100], [101]])
    assert relufy._mixed(windows, written, 8, 8, 0.5).flatten().tolist() == [8, 9, 0, 1, 100, 101, 100, 101]
    assert relufy._mixed(windows, None, 3, 4, 0.5).flatten().tolist() == [3, 4, 5, 6]


def test_divergence_and_its_gradient() -> None:
    torch.manual_seed(0)
    wanted, given, head = torch.randn(700, 16), torch.randn(700, 16), torch.randn(40, 16)
    given.requires_grad_(True)
    p, q = ((x @ head.T).log_softmax(-1) for x in (wanted, given))
    loss = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    loss.backward()
    got, gradient = _divergence(wanted, given.detach(), head)
    assert got == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, given.grad, rtol=1e-4, atol=1e-7)


def test_a_layer_learns_and_gets_sparser(tiny_model: Make) -> None:
    model = load(tiny_model(), relufy.WINDOW)
    windows = torch.from_numpy(text().ids.reshape(-1, relufy.WINDOW)).long()

    def train(epochs: int, density: float) -> tuple[float, float]:
        streams = Sequential(model, windows)
        streams.attend()
        result = streams.train(density, epochs, 0, lambda done, total: None)
        return result.error, result.density

    short, long, sparse = train(1, 1.0), train(4, 1.0), train(4, 0.05)
    assert long[0] < 0.7 * short[0] < 0.7
    assert sparse[1] < 0.96 * long[1]


def test_all_layers_learn_and_get_sparser(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "MODEL_LR", 2e-3)  # few steps
    model = load(tiny_model(), relufy.WINDOW)
    windows = torch.from_numpy(text().ids.reshape(-1, relufy.WINDOW)).long()
    student = Student(model, [Ffn.of(model, layer) for layer in range(model.config.n_layer)])
    training = Together(student, windows.repeat(8, 1), 0.35, 0)
    found = np.array([training.step() for _ in range(training.steps)])
    assert found[-5:, 0].mean() < 0.8 * found[:5, 0].mean()
    assert found[-5:, 1].mean() < 0.37 < 0.45 < found[0, 1]


def test_losses_that_are_no_numbers_are_told(tiny_model: Make) -> None:
    model = load(tiny_model(), relufy.WINDOW)
    model.weights["blk.0.ffn_up.weight"][0, 0] = float("nan")
    windows = torch.from_numpy(text().ids.reshape(-1, relufy.WINDOW)).long()
    streams = Sequential(model, windows)
    streams.attend()
    with pytest.raises(TrainingError, match="layer 0: the loss is nan at step 1"):
        streams.train(1.0, 1, 0, lambda done, total: None)
    student = Student(model, [Ffn.of(model, layer) for layer in range(model.config.n_layer)])
    with pytest.raises(TrainingError, match="the loss is nan at step 1 of all layers"):
        Together(student, windows, 1.0, 0).step()


def make(model: Path, out: Path, stop_in: str = "", stop_at: int = -1) -> list[str]:
    """The lines that relufy says; interrupted, as by Ctrl-C, when its progress is at stop_at of a stage."""

    def advance(what: str, done: int, total: int) -> None:
        if done == stop_at and what.startswith(stop_in):
            raise KeyboardInterrupt

    said: list[str] = []
    with GGUFFile(model) as file:
        relufy.relufy(file, text(), out, SMALL, GGMLType.F32, said.append, advance)
    return said


def test_interrupted_work_is_taken_up_and_gives_the_same_file(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relufy, "SAVES", 3)  # a state is kept after steps 4, 8 and 10
    model, whole, pieces = tiny_model(), tmp_path / "whole.gguf", tmp_path / "pieces.gguf"
    said = make(model, whole)
    assert [line.split(":")[0] for line in said] == [
        "teacher", "layer 0 of 0-1", "layer 1 of 0-1", *(f"all layers, step {n} of 10" for n in (4, 8, 10)),
    ]  # fmt: skip
    assert not (tmp_path / "whole.gguf.relufy").exists()
    for stop in (("layer 0", 7), ("layer 1: attention", 1), ("layer 1", 3), ("all layers", 2), ("all layers", 7)):
        with pytest.raises(KeyboardInterrupt):
            make(model, pieces, *stop)
        assert not pieces.exists()
    again = make(model, pieces)
    assert again[0].startswith("going on with the work kept in")
    assert [line.split(":")[0] for line in again[2:]] == [f"all layers, step {n} of 10" for n in (8, 10)]
    assert pieces.read_bytes() == whole.read_bytes()


def test_the_command(tiny_model: Make, tmp_path: Path) -> None:
    model, out, words = tiny_model(), tmp_path / "out.gguf", tmp_path / "words.txt"
    words.write_text("the hello world and a cat sat on the mat in here. " * 1100, encoding="utf-8")
    options = ["--tokens", "16384", "--epochs", "1", "--polish", "4096", "--type", "F16", "-t", "1"]
    result = CliRunner().invoke(app, ["relufy", str(model), str(words), "-o", str(out), *options])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == str(out)
    assert "active neurons" in result.stdout and "x the teacher's" in result.stdout
    assert "llama.cpp would run this file with SiLU" in result.stderr
    with GGUFFile(out) as file, find_section(file) as section:
        assert section.attached and section.has_down_t()
        assert ModelConfig.from_gguf(file).activation == "relu"
        assert file.get("hotcold.relufy.texts") == ["words.txt"]
        assert file.tensors["blk.1.ffn_down.weight"].type == GGMLType.F16


def test_the_faster_type_is_one_of_two() -> None:
    assert fastest_dtype() in (torch.float32, torch.bfloat16)
