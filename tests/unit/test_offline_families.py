"""Profiles, thresholds, and what is refused, for families that are not Llama's: experts, plain FFNs, fused tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from typer.testing import CliRunner

from hotcold import Engine
from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import FormatError, UnsupportedError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import find_section
from hotcold.formats.tokenizer import load_tokenizer
from hotcold.solver import corpus, neurons, priors, profile, relufy_checks
from hotcold.solver.corpus import Corpus
from hotcold.tools.cli import app

Make = Callable[[str], Path]
TEXT = "the hello world and a cat\nin a hat, on the mat. " * 30


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOTCOLD_HOME", str(tmp_path / "home"))


@pytest.fixture
def copied(family_file: Make, tmp_path: Path) -> Make:
    """A family's file of one's own: these commands write into it."""

    def copy(name: str) -> Path:
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(family_file(name).read_bytes())
        return path

    return copy


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


# mixtures of experts


def test_experts_are_counted_by_choices(family_file: Make, tmp_path: Path) -> None:
    """As many in windows as token by token."""
    ids = np.random.default_rng(0).integers(0, 250, 96).astype(np.int32)
    with Engine(family_file("olmoe"), n_ctx=32, n_threads=1) as engine:
        rule = neurons.Rule("silu", by_expert=True)
        kept = profile.Count(tmp_path / "kept.npz", 2, profile.counted(engine.config))
        freq = profile.count(engine, Corpus("x", ids, None), rule, kept)
        before = engine.usage.experts
        for window in ids.reshape(3, 32):
            sequence = engine.new_sequence()
            for token in window:
                engine.eval(sequence, [token])
            sequence.close()
        after = engine.usage.experts
    assert rule.name == "experts" and freq.shape == (2, 8) and before is not None and after is not None
    np.testing.assert_allclose(freq.sum(axis=1), 3, rtol=1e-6)  # of 8, a token uses 3
    assert np.abs(freq * 96 - (after - before)).max() <= 1  # rounding may turn a close choice
    assert freq.std() > 0.05


def zero_router(path: Path) -> Path:
    """All experts are equal to the routers, which then take the first ones."""
    with GGUFFile(path) as file:
        spans = [(info.offset, info.nbytes) for info in (file.info(f"blk.{n}.ffn_gate_inp.weight") for n in (0, 1))]
    data = bytearray(path.read_bytes())
    for offset, nbytes in spans:
        data[offset : offset + nbytes] = bytes(nbytes)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("name", "used", "of"), [("mixtral", 2, 4), ("qwen3moe", 3, 8)])
def test_the_command_shows_and_keeps_heat(copied: Make, text: Path, name: str, used: int, of: int) -> None:
    path = zero_router(copied(name))
    report = json.loads(invoke("profile", path, text, "-n", "100", "--json", "--dry-run").stdout)
    assert report["rule"] == "experts" and report["tokens"] == 100
    assert report["experts"] == [[1.0] * used + [0.0] * (of - used)] * 2
    assert report["density"] == used / of and report["dead"] == 2 * (of - used)
    shown = invoke("profile", path, text, "-n", "100")
    first = ", ".join(f"{expert} ({share}%)" for expert, share in zip(range(4), [100] * used + [0] * of, strict=False))
    assert shown.exit_code == 0 and first in shown.stdout
    assert f"a token uses {used / of:.1%} of {of} experts" in shown.stdout
    with GGUFFile(path) as file, find_section(file) as section:  # type: ignore[union-attr]
        found = section.profile()
        per = ModelConfig.from_gguf(file).expert_neurons
    assert found is not None and (found.rule, found.tokens) == ("experts", 100)
    np.testing.assert_array_equal(found.freq, np.repeat([[1.0] * used + [0.0] * (of - used)] * 2, per, axis=1))


def imatrix(path: Path, *counts: list[float]) -> Path:
    writer = GGUFWriter(str(path), "llama")
    writer.add_type("imatrix")
    for layer, row in enumerate(counts):
        name = f"blk.{layer}.ffn_down_exps.weight"
        writer.add_tensor(f"{name}.in_sum2", np.ones((len(row), 32), np.float32))
        writer.add_tensor(f"{name}.counts", np.array(row, np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_imatrix_says_how_often_experts_are_chosen(copied: Make, tmp_path: Path) -> None:
    path = copied("mixtral")
    source = imatrix(tmp_path / "im.gguf", [50, 30, 20, 100], [100, 100, 0, 0])
    result = invoke("profile", path, "--import", source, "--json")
    report = json.loads(result.stdout)
    assert (report["rule"], report["tokens"], report["dataset"]) == ("experts", 100, "imatrix im.gguf")
    assert report["experts"] == [[0.5, 0.3, 0.2, 1.0], [1.0, 1.0, 0.0, 0.0]]
    with GGUFFile(path) as file:
        config = ModelConfig.from_gguf(file)
    for rows, said in (
        ([[1, 2, 3, 4]], "blk.1.ffn_down_exps.weight.counts': got no such tensor"),
        ([[1, 2, 3], [1, 2, 3]], "got 3 values, wanted the model's 4"),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], "got no counts"),
        ([[1, 1, -1, 1], [1, 1, 1, 1]], "got no counts"),
    ):
        with pytest.raises(FormatError, match=said):
            priors.of_experts(imatrix(tmp_path / "odd.gguf", *rows), config)
    with pytest.raises(UnsupportedError, match="wanted an imatrix GGUF for a mixture of experts"):
        priors.of_experts(tmp_path, config)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["profile", "--threshold", "0.5"], "--threshold: got 0.5 for a mixture of experts"),
        (["sparsify"], "a mixture of experts reads few of its neurons already"),
    ],
)
def test_what_mixtures_are_refused(copied: Make, text: Path, arguments: list[str], said: str) -> None:
    command, *options = arguments
    result = invoke(command, copied("mixtral"), text, *options)
    assert result.exit_code == 1 and said in result.stderr and result.stderr.count("error:") == 1


# other FFNs


def density(path: Path, text: Path, mode: str, n: int) -> tuple[float, ModelConfig]:
    """Share of neurons that a mode finds active in the first n tokens, in windows as the offline tools have them."""
    with Engine(path, n_threads=1, sparsity=mode) as engine:
        found = corpus.load([text], load_tokenizer(engine.file), n, few=0)
        for window in found.windows(min(corpus.N_CTX, engine.n_ctx)):
            sequence = engine.new_sequence()
            engine.eval(sequence, window)
            sequence.close()
        return engine.usage.density, engine.config


@pytest.mark.parametrize("name", ["arcee", "bamboo", "opt"])
def test_profiles_count_what_exact_computes(copied: Make, text: Path, name: str) -> None:
    path = copied(name)
    report = json.loads(invoke("profile", path, text, "-n", "200", "--json").stdout)
    assert report["rule"] == "exact"
    assert density(path, text, "exact", 200)[0] == pytest.approx(report["density"], abs=0.01)


@pytest.mark.parametrize("name", ["falcon-40b", "gemma2", "gpt2", "olmo2", "phi3", "stablelm"])
def test_thresholds_hit_their_densities(copied: Make, text: Path, name: str) -> None:
    path = copied(name)
    options = ["--density", "0.4", "-n", "400", "--no-perplexity", "--json"]
    result = invoke("sparsify", path, text, *options)
    assert result.exit_code == 0, result.stderr
    dense, row = json.loads(result.stdout)["rows"]
    active, c = density(path, text, "threshold=0.4", 240)
    assert active == pytest.approx(0.4, abs=0.05)
    matrices = 3 if c.gated else 2
    assert dense["ffn_bytes_per_token"] == 2 * matrices * c.n_ff * c.n_embd * 4
    assert row["ratio"] == pytest.approx((1 + (matrices - 1) * row["density"]) / matrices, rel=1e-4)


def test_usage_without_a_gate(family_file: Make) -> None:
    with Engine(family_file("opt"), n_ctx=64, n_threads=1, sparsity="exact") as engine:
        sequence = engine.new_sequence()
        for token in (5, 6, 7):
            engine.eval(sequence, [token])
        used, row = engine.usage, 64 * 4
    assert used.dense_bytes == 3 * 2 * 2 * 96 * row
    assert used.ffn_bytes == (3 * 2 * 96 + used.active) * row and 0 < used.active < used.places == 3 * 2 * 96


def test_a_norm_after_the_ffn_makes_outputs_shares_of_its_weights(family_file: Make) -> None:
    with GGUFFile(family_file("olmo2")) as file:
        config = ModelConfig.from_gguf(file)
        post = neurons.post_norm(file, config, 1)
        assert post == pytest.approx(np.square(file.dequantized("blk.1.post_ffw_norm.weight")).sum())
    h, norms = np.array([[1, -2, 0], [3, 0, 0]], np.float32), np.array([2, 0.5, 7], np.float32)
    np.testing.assert_allclose(neurons.energy(h, norms, 0.0), [[4, 1, 0], [36, 0, 0]])
    np.testing.assert_allclose(neurons.energy(h, norms, 10.0), [[8, 2, 0], [10, 0, 0]])


# relufy

OBSTACLES = {
    "mixtral": "is a mixture of experts: each of them would need a bypass .* --sparsity threshold=D",
    "opt": "an FFN without a gate: .* applies here: --sparsity exact",
    "gpt2": "an FFN without a gate: .* applies here: hotcold sparsify",
    "phi3": "an FFN whose gate and up projections are one tensor",
    "stablelm": "layer norms",
    "gemma2": "norms after attention and FFN",
    "olmo2": "norms after attention and FFN",
    "qwen3": "",
    "granite": "scaled embeddings, residuals or logits",
    "llama-rope3-bias": "an FFN with biases",
    "llama": "",
    "mistral": "",
    "qwen2": "",
    "bamboo": "",  # whose activation is refused later
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_relufy_says_what_is_in_its_way(family_file: Make, name: str) -> None:
    with GGUFFile(family_file(name)) as file:
        config = ModelConfig.from_gguf(file)
        if not OBSTACLES[name]:
            relufy_checks.check_model(file, config)
            return
        with pytest.raises(UnsupportedError, match=OBSTACLES[name]) as caught:
            relufy_checks.check_model(file, config)
    assert "\n" not in str(caught.value)
    assert "applies here: " in str(caught.value) or config.n_expert


def test_the_command_says_so_too(family_file: Make, text: Path, tmp_path: Path) -> None:
    result = invoke("relufy", family_file("opt"), text, "--out", tmp_path / "out.gguf")
    assert result.exit_code == 1 and "has an FFN without a gate" in result.stderr
    assert not (tmp_path / "out.gguf").exists()
