"""train-predictor with PyTorch, on tiny models: targets, the start, training, the command, PowerInfer's counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from typer.testing import CliRunner

from hotcold import Engine
from hotcold.formats.errors import FormatError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import find_section
from hotcold.solver import priors
from hotcold.tools.cli import app

torch = pytest.importorskip("torch")

from hotcold.solver.predictor_torch import _SLOPE, FFN, prepare, train  # noqa: E402

Make = Callable[..., Path]
N_TOK, N_EMBD, N_FF = 2048, 32, 48
RELU = {"llama.hidden_activation": "relu"}


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ffn(activation: str = "relu", limit: float | None = None) -> FFN:
    rng = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(N_FF, N_EMBD, generator=rng) for _ in range(2))
    return FFN(gate, up, torch.rand(N_FF, generator=rng) + 0.5, activation, limit)


def inputs(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Normed inputs of few important directions and a mean that is not zero, as of real models; residuals' squares."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N_TOK, N_EMBD)) * np.geomspace(3, 0.05, N_EMBD) + np.linspace(1, -1, N_EMBD)
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True))
    return x.astype(np.float16), rng.lognormal(3, 1, N_TOK).astype(np.float32)


@pytest.mark.parametrize(("activation", "limit"), [("relu", None), ("relu2", None), ("drelu", None), ("silu", 0.3)])
def test_what_neurons_really_do(activation: str, limit: float | None) -> None:
    layer, (x, size) = ffn(activation, limit), inputs()
    active, energy = layer.see(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(size))
    gate, up = (x.astype(np.float64) @ w.numpy().T for w in (layer.gate, layer.up))
    value = naive.glu(gate, up, activation)
    wanted = gate > 0 if limit is None else np.abs(naive.silu(gate)) > limit
    assert (active.numpy() != wanted).mean() < 1e-4
    squares = (value * layer.down_norms.numpy()) ** 2
    share = squares / (size[:, None] + squares.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(energy, share, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(("activation", "limit"), [("relu", None), ("relu2", None), ("silu", 0.6)])
def test_below_a_floor_they_are_not_there(activation: str, limit: float | None) -> None:
    layer, (x, size) = replace(ffn(activation, limit), floor=0.5), inputs()
    active, energy = layer.see(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(size))
    gate, up = (x.astype(np.float64) @ w.numpy().T for w in (layer.gate, layer.up))
    strength = np.abs(naive.ACTIVATIONS[activation](gate))
    assert (active.numpy() != (strength > (limit or 0.5))).mean() < 1e-4
    sure = np.abs(strength - 0.5).min(axis=1) > 1e-4
    squares = np.where(strength >= 0.5, naive.glu(gate, up, activation) * layer.down_norms.numpy(), 0) ** 2
    share = squares / (size[:, None] + squares.sum(axis=1, keepdims=True))
    assert sure.mean() > 0.9 and 0.01 < ((strength > 0) & (strength < 0.5)).mean()
    np.testing.assert_allclose(energy[sure], share[sure], rtol=1e-2, atol=1e-6)


def test_without_a_gate_with_biases_and_a_norm_after() -> None:
    rng = torch.Generator().manual_seed(0)
    up, bias = torch.randn(N_FF, N_EMBD, generator=rng), torch.randn(N_FF, generator=rng) * 3
    norms, (x, size) = torch.rand(N_FF, generator=rng) + 0.5, inputs()
    wide = x.astype(np.float64)
    raw = wide @ up.numpy().T + bias.numpy()
    for post in (0.0, 20.0):
        layer = FFN(up, None, norms, "relu2", None, bias, post=post)
        active, energy = layer.see(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(size))
        assert (active.numpy() == (raw > 0)).mean() > 0.999
        squares = (np.maximum(raw, 0) ** 2 * norms.numpy()) ** 2
        total = squares.sum(axis=1, keepdims=True)
        share = squares / total * post / (size[:, None] + post) if post else squares / (size[:, None] + total)
        np.testing.assert_allclose(energy, share, rtol=2e-2, atol=1e-6)
    a, b, start = (m.double().numpy() for m in prepare(layer, x, size).start(N_EMBD, "dejavu"))
    spread = (raw - raw.mean(axis=0)).std(axis=0)
    np.testing.assert_allclose((wide @ a.T) @ b.T + start, raw / spread * _SLOPE, rtol=0.02, atol=0.05)
    both = FFN(up, up, norms, "silu", 0.3, bias, bias)
    _, energy = both.see(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(size))
    squares = (naive.silu(raw) * raw * norms.numpy()) ** 2
    share = squares / (size[:, None] + squares.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(energy, share, rtol=2e-2, atol=1e-6)


def test_targets_and_start() -> None:
    layer_ffn, (x, size) = ffn(), inputs()
    layer = prepare(layer_ffn, x, size)
    wide = x.astype(np.float64)
    gate = wide @ layer_ffn.gate.double().numpy().T
    sure = np.abs(gate) > 0.1  # bfloat16 may err on smaller ones
    target = layer.target.numpy()
    assert ((target > 0) == (gate > 0))[sure].all() and (target[gate < -0.1] == -1).all()
    assert 0.5 <= target[target > 0].min() and target.max() <= 4.6
    # of full rank, the start is the gate itself, in units of its standard deviation
    a, b, bias = (m.double().numpy() for m in layer.start(N_EMBD, "dejavu"))
    logits = (wide @ a.T) @ b.T + bias
    np.testing.assert_allclose(logits, gate / gate.std(axis=0) * _SLOPE, rtol=0.02, atol=0.02)
    # and of lower rank, it explains most of it, with a relu in the way too
    for kind, least in (("dejavu", 0.9), ("relu", 0.85)):
        a, b, bias = (m.double().numpy() for m in layer.start(12, kind))
        middle = wide @ a.T
        assert a.shape == (12, N_EMBD) and b.shape == (N_FF, 12)
        if kind == "relu":
            assert (middle > 0).mean() > 0.9
            middle = np.maximum(middle, 0)
        assert (((middle @ b.T + bias) > 0) == (gate > 0)).mean() > least


@pytest.mark.parametrize("kind", ["dejavu", "relu"])
def test_training_makes_it_better_and_repeats(kind: str) -> None:
    layer = prepare(ffn(), *inputs())
    target = layer.target.float()

    def loss(a: Any, b: Any, bias: Any) -> float:
        middle = layer.inputs.float() @ torch.as_tensor(a).T
        logits = (middle.relu() if kind == "relu" else middle) @ torch.as_tensor(b).T + torch.as_tensor(bias)
        each = torch.nn.functional.binary_cross_entropy_with_logits(logits, (target > 0).float(), reduction="none")
        return float((each * target.abs()).mean())

    told: list[int] = []
    first = train(layer, 8, kind, 12, told.append)
    assert loss(*first) < 0.97 * loss(*layer.start(8, kind))
    assert told[-1] >= 12 * N_TOK and [m.shape for m in first] == [(8, N_EMBD), (N_FF, 8), (N_FF,)]
    for one, two in zip(first, train(layer, 8, kind, 12), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.fixture
def model(tiny_model: Make, tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_model(metadata=RELU, n_vocab=4000).read_bytes())
    return path


TEXT = "the hello world and a cat\nin a hat, on the mat; is it? "


def text_file(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    words = TEXT.split()
    (folder / "text.txt").write_text(" ".join(rng.choice(words, 1500)))
    return folder / "text.txt"


def test_the_command(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    arguments = ["train-predictor", model, text_file(tmp_path), "-t", "1", "--epochs", "1"]
    dry = invoke(*arguments, "--dry-run")
    assert dry.exit_code == 0 and model.read_bytes() == before, dry.output
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert model.read_bytes()[: len(before)] == before
    assert report["overall"]["recall"] >= 0.93 and report["overall"]["energy"] > 0.98
    assert report["parameter_share"] <= 0.1 and len(report["layers"]) == 2
    with GGUFFile(model) as file:
        parameters = sum(np.prod(info.shape) for info in file.tensors.values())
        section = find_section(file)
        assert section is not None
        with section:
            found = section.predictors()
            assert section.has_down_t()
    assert found is not None and found.kind == "relu" and found.input == "ffn_norm"
    assert list(found.ranks) == [row["rank"] for row in report["layers"]]
    assert report["parameter_share"] == pytest.approx(sum(found.ranks) * (64 + 96) / parameters)
    assert abs(report["perplexity"] / report["perplexity_dense"] - 1) < 0.02
    ids = list(range(5, 60))
    with Engine(model, n_threads=1, sparsity="predict") as engine:
        predicted = np.array(engine.eval(engine.new_sequence(), ids))
    with Engine(model, n_threads=1, sparsity="dense") as engine:
        assert np.abs(engine.eval(engine.new_sequence(), ids) - predicted).max() < np.abs(predicted).max() * 0.5


def test_a_model_with_a_bypass_and_floors(tiny_model: Make, tmp_path: Path) -> None:
    """Predictors learn which neurons reach their floor; what goes past the neurons is no matter of theirs."""
    path, arguments = tmp_path / "model.gguf", ["-t", "1", "--epochs", "1", "--json", "--no-perplexity", "--dry-run"]
    found = {}
    for floors in ((0.0, 0.0), (0.3, 0.3)):
        path.write_bytes(tiny_model(metadata=RELU, n_vocab=4000, bypass=True, floors=floors).read_bytes())
        result = invoke("train-predictor", path, text_file(tmp_path), *arguments)
        assert result.exit_code == 0, result.output
        found[floors] = json.loads(result.stdout)["overall"]
    assert found[0.3, 0.3]["active"] < 0.8 * found[0.0, 0.0]["active"]
    assert all(each["recall"] >= 0.93 and each["energy"] > 0.98 for each in found.values())


def test_dejavu_and_other_types(model: Path, tmp_path: Path) -> None:
    arguments = ["train-predictor", model, text_file(tmp_path), "-t", "1", "--no-perplexity", "--sidecar", "--json"]
    result = invoke(*arguments, "--kind", "dejavu", "--type", "f16", "--tokens", "600")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["kind"], report["type"]) == ("dejavu", "F16")
    assert [row["rank"] for row in report["layers"]] == [64, 64]
    assert report["overall"]["precision"] > 0.9  # of full rank, it nearly is the gate
    assert (tmp_path / "hotcold-model.gguf").exists()


def test_a_model_without_zeros_needs_thresholds(tiny_model: Make, tmp_path: Path) -> None:
    path, text = tmp_path / "model.gguf", text_file(tmp_path)
    path.write_bytes(tiny_model(n_vocab=4000).read_bytes())
    refused = invoke("train-predictor", path, text, "-t", "1")
    assert refused.exit_code == 1 and "SILU" in refused.stderr and "--threshold" in refused.stderr
    refused = invoke("train-predictor", path, text, "-t", "1", "--threshold", "0.5")
    assert refused.exit_code == 1 and "hotcold sparsify" in refused.stderr
    assert invoke("sparsify", path, text, "-t", "1", "--no-perplexity").exit_code == 0
    result = invoke("train-predictor", path, text, "-t", "1", "--threshold", "0.5", "--json", "--tokens", "900")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["overall"]["active"] == pytest.approx(0.5, abs=0.1)


def test_too_little_text(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(TEXT)
    for command in ("train-predictor", "sparsify"):
        result = invoke(command, model, tmp_path / "short.txt", "-t", "1")
        assert result.exit_code == 1 and "tokens, wanted at least" in result.stderr


def test_powerinfer_counts_are_sorted_by_number(tmp_path: Path) -> None:
    for layer in range(12):
        counts = torch.zeros(5, dtype=torch.int64)
        counts[0], counts[1] = 100, layer
        torch.save(counts, tmp_path / f"activation_{layer}.pt")
    (tmp_path / "readme.txt").write_text("not a count")
    prior = priors.load(tmp_path, 12, 5, 0.5)
    np.testing.assert_allclose(prior.freq[:, 1], np.arange(12) / 100, rtol=1e-6)
    assert prior.tokens == 100 and (prior.freq[:, 0] == 1).all()
    assert priors.load(tmp_path / "activation_3.pt", 12, 5, 0.5).freq.shape == (12, 5)
    with pytest.raises(FormatError, match="got 5 values, wanted 6 counts"):
        priors.load(tmp_path, 12, 6, 0.5)
    (tmp_path / "activation_4.pt").write_bytes(b"no tensor")
    with pytest.raises(FormatError, match="activation_4.pt: contents"):
        priors.load(tmp_path, 12, 5, 0.5)


def test_a_mixture_of_experts_is_refused(family_file: Make, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello " * 500)
    result = invoke("train-predictor", family_file("mixtral"), tmp_path / "text.txt")
    said = "the router of a mixture of experts says which neurons are needed"
    assert result.exit_code == 1 and said in result.stderr and result.stderr.count("error:") == 1
