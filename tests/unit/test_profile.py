"""hotcold profile: counts against a NumPy forward pass, statistics, taking up a count again, priors, bad input."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from gguf import GGUFWriter
from typer.testing import CliRunner
from watched import WatchedEngine

from hotcold import Engine
from hotcold.formats.errors import FormatError, ParameterError, StorageError, UnsupportedError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import find_section
from hotcold.formats.tokenizer import load_tokenizer
from hotcold.solver import corpus, neurons, priors, profile
from hotcold.solver.corpus import Corpus
from hotcold.tools.cli import app

Make = Callable[..., Path]
RELU = {"llama.hidden_activation": "relu"}
TEXT = "the hello world and a cat\nin a hat, on the mat. " * 8


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOTCOLD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def copied(tiny_model: Make, tmp_path: Path) -> Make:
    """A tiny model of one's own: these commands write into it."""

    def copy(**options: Any) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(tiny_model(**options).read_bytes())
        return path

    return copy


def text_file(folder: Path, text: str = TEXT) -> Path:
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


# counting


class Gates(naive.Model):
    """Keeps every layer's raw gates."""

    def _ffn(self, layer: int, x: np.ndarray) -> np.ndarray:
        gates = self.__dict__.setdefault("gates", {})
        gates.setdefault(layer, []).append(self._linear(f"blk.{layer}.ffn_gate", x))
        return super()._ffn(layer, x)


@pytest.mark.parametrize("density", [None, 0.5])
def test_counts_equal_those_of_a_naive_forward_pass(tiny_model: Make, tmp_path: Path, density: float | None) -> None:
    path = tiny_model(metadata=RELU if density is None else {}, tokenizer="llama", n_vocab=320)
    limits = np.array([0.3, 0.6], np.float32)
    rule = neurons.exact("relu") if density is None else neurons.Rule("silu", density, limits)
    with Engine(path, n_ctx=32, n_threads=1, sparsity="dense", use_section=False) as engine:
        text = corpus.load([text_file(tmp_path)], load_tokenizer(engine.file), few=0)
        kept = profile.Count(tmp_path / "kept.npz", 2, 96)
        freq = profile.count(engine, text, rule, kept)
    assert len(text) % 32 != 0 and text.bos == 1 and freq.dtype == np.float32
    oracle = Gates(**vars(naive.load(path, kv_f16=True)))
    for start in range(0, len(text), 32):
        oracle.forward([1, *text.ids[start + 1 : start + 32].tolist()])
    for layer in range(2):
        gate = np.concatenate(oracle.__dict__["gates"][layer])
        value = gate if density is None else np.abs(naive.silu(gate))
        distance = value - (0.0 if density is None else limits[layer])
        doubtful = (np.abs(distance) < 2e-3).sum(axis=0)
        assert doubtful.sum() < distance.size / 100
        assert (np.abs(freq[layer] * len(text) - (distance > 0).sum(axis=0)) <= doubtful + 1e-3).all()


@pytest.mark.parametrize("name", ["relu", "relu2", "drelu", "silu", "gelu", "gelu_erf"])
def test_activations_equal_the_naive_ones(name: str) -> None:
    gate, up = np.random.default_rng(0).normal(0, 3, (2, 50, 7)).astype(np.float32)
    gate[0] = [-200, 200, 0, -0.0, 1e-30, -1e-30, 88.8]
    np.testing.assert_allclose(neurons.hidden(name, gate, up), naive.glu(gate, up, name), rtol=2e-5, atol=1e-6)


def test_only_relus_have_exact_zeros() -> None:
    assert neurons.exact("drelu").name == "exact" and neurons.Rule("silu", 0.25).name == "threshold=0.25"
    with pytest.raises(ParameterError, match="--threshold"):
        neurons.exact("silu")


def test_a_count_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    text = Corpus("x", np.arange(1000, 1330, dtype=np.int32), None)
    rule = neurons.Rule("silu", 0.5, np.full(3, 0.4, np.float32))
    whole = profile.count(WatchedEngine(), text, rule, profile.Count(tmp_path / "whole.npz", 3, 40))  # type: ignore[arg-type]
    direct = np.array(
        [
            np.mean([np.abs(naive.silu(WatchedEngine().values(i, n)[2])) > 0.4 for i in text.ids], axis=0)
            for n in range(3)
        ]
    )
    np.testing.assert_allclose(whole, direct, atol=1e-6)

    class Stopping(WatchedEngine):
        """Is interrupted in the middle of the third window, after the second layer."""

        def values(self, token: int, layer: int) -> Any:
            if token == 1000 + 2 * 64 + 10 and layer == 2:
                raise KeyboardInterrupt
            return super().values(token, layer)

    file = tmp_path / "kept" / "part.npz"
    with pytest.raises(KeyboardInterrupt):
        profile.count(Stopping(), text, rule, profile.Count(file, 3, 40))  # type: ignore[arg-type]
    again = profile.Count(file, 3, 40)
    assert again.tokens == 128 and again.counts.sum() > 0
    told: list[int] = []
    np.testing.assert_array_equal(profile.count(WatchedEngine(), text, rule, again, told.append), whole)  # type: ignore[arg-type]
    assert told == [192, 256, 320, 330]
    again.drop()
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04 torn", b"nonsense"])
def test_a_broken_kept_count_is_counted_anew(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "kept.npz").write_bytes(contents)
    assert profile.Count(tmp_path / "kept.npz", 2, 4).tokens == 0


def test_a_kept_count_belongs_to_model_text_and_rule(tiny_model: Make) -> None:
    text = Corpus("x", np.arange(9, dtype=np.int32), None)
    rule = neurons.Rule("silu", 0.5, np.zeros(2, np.float32))
    with GGUFFile(tiny_model()) as one, GGUFFile(tiny_model(seed=1)) as other:
        names = {
            profile.kept_name(one, text, rule),
            profile.kept_name(other, text, rule),
            profile.kept_name(one, Corpus("x", text.ids, 0), rule),
            profile.kept_name(one, text.split(1)[0], rule),
            profile.kept_name(one, text, neurons.Rule("silu", 0.5, np.ones(2, np.float32))),
        }
        assert len(names) == 5
        assert profile.kept_name(one, Corpus("y", text.ids, None), rule) in names


# statistics


def test_statistics_by_hand() -> None:
    stats = profile.statistics(np.array([0.1, 0.5, 0.0, 0.3, 0.1], np.float32))  # ordered: .5 .3 .1 .1 0, of 1.0
    assert stats.density == pytest.approx(0.2) and stats.skew == pytest.approx(2 / 5) and stats.dead == 1
    x, y = profile.cdf(np.array([0.1, 0.5, 0.0, 0.3, 0.1], np.float32))
    np.testing.assert_allclose(x, [0, 0.2, 0.4, 0.6, 0.8, 1])
    np.testing.assert_allclose(y, [0, 0.5, 0.8, 0.9, 1, 1], atol=1e-7)
    assert profile.statistics(np.full(10, 0.25, np.float32)).skew == pytest.approx(0.8)
    assert profile.statistics(np.zeros(4, np.float32)) == profile.LayerStats(0.0, 0.0, 4)


def test_mixing_with_a_prior() -> None:
    mixed = profile.mixed(np.array([[0.0, 1.0]]), 100, np.array([[0.5, 0.5]]), 300)
    np.testing.assert_allclose(mixed, [[0.375, 0.625]])


# the corpus


def test_windows_and_splits() -> None:
    text = Corpus("x", np.arange(10, dtype=np.int32), 99)
    assert [window.tolist() for window in text.windows(4)] == [[99, 1, 2, 3], [99, 5, 6, 7], [99, 9]]
    assert [window.tolist() for window in text.windows(4, 8)] == [[99, 9]]
    assert text.ids.tolist() == list(range(10))
    first, last = text.split(3)
    assert (len(first), last.ids.tolist()) == (7, [7, 8, 9])


def test_reading_texts(tiny_model: Make, tmp_path: Path) -> None:
    with GGUFFile(tiny_model()) as file:
        words = load_tokenizer(file)
    one = text_file(tmp_path)
    two = tmp_path / "two.txt"
    two.write_bytes(b"hello \xff world")
    text = corpus.load([one, two], words, few=0)
    assert text.name == "text.txt, two.txt" and text.ids.tolist() == words.encode(TEXT + "\n\nhello \ufffd world")
    limited = corpus.load([one, two], words, limit=5, few=0)
    assert limited.ids.tolist() == text.ids[:5].tolist()
    with pytest.warns(UserWarning, match=r"text.txt: only \d+ tokens"):
        corpus.load([one], words)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        default = corpus.load([], words, limit=12_000)
        corpus.load([one], words, limit=20)  # few, but as asked for
    assert default.name == "pydoc_data.topics" and len(default) == 12_000


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_an_empty_text(tiny_model: Make, tmp_path: Path, text: str) -> None:
    result = invoke("profile", tiny_model(), text_file(tmp_path, text))
    assert result.exit_code == 1 and "text.txt: got an empty text" in result.stderr


def test_a_text_that_cannot_be_read(tiny_model: Make, tmp_path: Path) -> None:
    for path in (tmp_path / "nosuch.txt", tmp_path):
        result = invoke("profile", tiny_model(), path)
        assert result.exit_code == 1 and f"{path}: cannot be read" in result.stderr


# the command


def test_the_command_attaches_a_profile(copied: Make, tmp_path: Path, home: Path) -> None:
    path = copied(metadata=RELU)
    before, text = path.read_bytes(), text_file(tmp_path)
    arguments = ["profile", path, text, "-t", "1"]
    dry = invoke(*arguments, "--dry-run", "--json")
    assert dry.exit_code == 0, dry.stderr
    report = json.loads(dry.stdout)
    assert path.read_bytes() == before and report["rule"] == "exact" and len(report["layers"]) == 2
    assert report["density"] == pytest.approx(np.mean([layer["density"] for layer in report["layers"]]))
    result = invoke(*arguments)
    assert result.exit_code == 0 and "all 2 layers" in result.stdout and "only" in result.stderr
    assert path.read_bytes()[: len(before)] == before
    assert not list(home.rglob("profile-*"))
    with GGUFFile(path) as file:
        section = find_section(file)
        assert section is not None and section.attached
        with section:
            found = section.profile()
    assert found is not None and found.freq.shape == (2, 96)
    assert (found.tokens, found.dataset, found.rule) == (report["tokens"], "text.txt", "exact")
    assert found.freq.mean() == pytest.approx(report["density"], rel=1e-6)


def test_a_model_without_zeros(copied: Make, tmp_path: Path) -> None:
    path = copied()
    result = invoke("profile", path, text_file(tmp_path), "-t", "1", "--sidecar", "--json")
    assert result.exit_code == 0, result.stderr
    assert "never exactly zero" in result.stderr or "no neurons that are exactly zero" in result.stderr
    report = json.loads(result.stdout)
    assert report["rule"] == "threshold=0.5" and report["density"] == pytest.approx(0.5, abs=0.02)
    assert (tmp_path / "hotcold-model.gguf").exists()
    assert invoke("profile", path, "--threshold", "1.5").exit_code == 1


def test_an_interrupt_of_the_command(copied: Make, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, text = copied(metadata=RELU), text_file(tmp_path)
    monkeypatch.setattr(corpus, "N_CTX", 32)
    monkeypatch.setattr(profile, "N_CTX", 32)
    arguments = ["profile", path, text, "-t", "1", "--dry-run", "--json"]
    wanted = invoke(*arguments).stdout
    real, calls = Engine.observe, [0]

    def observe(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(Engine, "observe", observe)
    stopped = invoke(*arguments)
    assert stopped.exit_code == 130 and "stopped after 64 of" in stopped.stderr
    assert len(list((home / "partial").iterdir())) == 1
    resumed = invoke(*arguments)
    assert resumed.exit_code == 0 and "going on after 64 tokens" in resumed.stderr
    windows = -(-json.loads(wanted)["tokens"] // 32)
    assert resumed.stdout == wanted and calls[0] == windows + 1  # the third was begun twice


def test_the_plot(copied: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, text = copied(metadata=RELU), text_file(tmp_path)
    arguments = ["profile", path, text, "-t", "1", "--dry-run", "--plot"]
    result = invoke(*arguments, tmp_path / "cdf.png")
    assert result.exit_code == 0, result.stderr
    data = (tmp_path / "cdf.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000
    for name in ("cdf.nosuch", "nosuch/cdf.png"):
        assert "hotcold: error: " in invoke(*arguments, tmp_path / name).stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke(*arguments, tmp_path / "other.png")
    assert result.exit_code == 1 and "pip install 'hotcold[plot]'" in result.stderr


def test_a_cache_that_cannot_be_written(copied: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOTCOLD_HOME", str(tmp_path / "file"))
    kept = profile.Count(tmp_path / "file" / "partial" / "x.npz", 1, 2)
    assert kept.tokens == 0
    from hotcold.runtime import models

    with pytest.raises(StorageError), models.storage_errors(tmp_path / "file"):
        kept.save()


# priors


def imatrix(path: Path, sums: dict[str, np.ndarray], count: float = 50.0) -> Path:
    writer = GGUFWriter(str(path), "llama")
    writer.add_type("imatrix")
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values.astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.array([[count]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_imatrix_becomes_frequencies(tmp_path: Path) -> None:
    strength = [np.array([[4.0, 1.0, 1.0, 2.0]]), np.array([[100.0, 1.0, 1.0, 2.0]])]
    path = imatrix(tmp_path / "im.gguf", {f"blk.{n}.ffn_down.weight": s * 50 for n, s in enumerate(strength)})
    prior = priors.load(path, 2, 4, 0.5)
    # 8 / c = 2 gives c = 4; in the second, one neuron is always on, and 4 / c = 1 for the others
    np.testing.assert_allclose(prior.freq, [[1, 0.25, 0.25, 0.5], [1, 0.25, 0.25, 0.5]])
    assert prior.tokens == 50 and prior.source == "imatrix im.gguf"
    rng = np.random.default_rng(0)
    for density in (0.1, 0.5, 0.9):
        values = rng.lognormal(0, 2, (1, 500))
        path = imatrix(tmp_path / "more.gguf", {"blk.0.ffn_down.weight": values})
        freq = priors.load(path, 1, 500, density).freq[0]
        assert freq.mean() == pytest.approx(density, rel=1e-5) and freq.max() <= 1
        assert (np.diff(freq[np.argsort(values[0])]) >= 0).all()
    half = imatrix(tmp_path / "zeros.gguf", {"blk.0.ffn_down.weight": np.array([[0.0, 3.0, 0.0, 1.0]])})
    np.testing.assert_array_equal(priors.load(half, 1, 4, 0.7).freq, [[0, 1, 0, 1]])


def test_imatrices_that_do_not_fit(tiny_model: Make, tmp_path: Path) -> None:
    good = np.ones((1, 4))
    short = imatrix(tmp_path / "short.gguf", {"blk.0.ffn_down.weight": good})
    with pytest.raises(FormatError, match=r"blk.1.ffn_down.weight.in_sum2': got no such tensor"):
        priors.load(short, 2, 4, 0.5)
    with pytest.raises(FormatError, match="got 4 values, wanted the model's 5"):
        priors.load(short, 1, 5, 0.5)
    for count, values in ((0.0, good), (1.0, -good), (1.0, good * np.nan)):
        odd = imatrix(tmp_path / "odd.gguf", {"blk.0.ffn_down.weight": values}, count)
        with pytest.raises(FormatError, match="in_sum2"):
            priors.load(odd, 1, 4, 0.5)
    with pytest.raises(FormatError, match="in_sum2"):
        priors.load(tiny_model(), 2, 96, 0.5)


def test_importing_with_and_without_text(copied: Make, tmp_path: Path) -> None:
    path = copied(metadata=RELU)
    values = np.arange(1, 97, dtype=np.float32)[None]
    source = imatrix(tmp_path / "im.gguf", {f"blk.{n}.ffn_down.weight": values for n in range(2)}, 7)
    result = invoke("profile", path, "--import", source, "--threshold", "0.3", "--json")
    report = json.loads(result.stdout)
    assert (report["tokens"], report["rule"], report["dataset"]) == (7, "threshold=0.3", "imatrix im.gguf")
    assert report["density"] == pytest.approx(0.3, rel=1e-5)
    result = invoke("profile", path, text_file(tmp_path), "--import", source, "--json", "-t", "1", "--dry-run")
    mixed = json.loads(result.stdout)
    assert mixed["dataset"] == "text.txt + imatrix im.gguf" and mixed["rule"] == "exact"
    missing = invoke("profile", path, "--import", tmp_path / "nosuch")
    assert missing.exit_code == 1 and "no such file or folder" in missing.stderr


def test_powerinfer_files_must_be_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "activation_0.pt").write_bytes(b"")
    with pytest.raises(FormatError, match="activation_0.pt to activation_1.pt"):
        priors.load(tmp_path, 2, 4, 0.5)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hotcold\[train\]'"):
        priors.load(tmp_path / "activation_0.pt", 1, 4, 0.5)
