"""hotcold sparsify: thresholds hit their densities, the cheapest are cheaper, ffn_down_t is ffn_down, the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from typer.testing import CliRunner
from watched import WatchedEngine

from hotcold import Engine
from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import ParameterError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import find_section
from hotcold.formats.section_file import Contents, update_section
from hotcold.formats.tokenizer import load_tokenizer
from hotcold.solver import corpus, perplexity, thresholds, transpose
from hotcold.solver.corpus import Corpus
from hotcold.tools.cli import app

Make = Callable[..., Path]
TEXT = "the hello world and a cat\nin a hat, on the mat. " * 60
IDS = np.arange(300, dtype=np.int32)
NORMS = np.linspace(0.5, 2, 120).reshape(3, 40).astype(np.float32)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class Seen:
    """What a WatchedEngine showed: sizes |act(gate)| and errors of dropping, by layer [n_tok, n_ff]."""

    def __init__(self, engine: WatchedEngine) -> None:
        self.size, self.error = [], []
        for layer in range(engine.config.n_layer):
            shown = zip(*(engine.values(int(i), layer) for i in IDS), strict=True)
            x, _, gate, up = (np.array(part, np.float64) for part in shown)
            act = naive.ACTIVATIONS[engine.config.activation](gate)
            self.size.append(np.abs(act))
            value = naive.glu(gate, up, engine.config.activation)
            self.error.append((value * NORMS[layer]) ** 2 / (x**2).mean(axis=1, keepdims=True))

    def density(self, limits: np.ndarray) -> list[float]:
        return [float((size > limit).mean()) for size, limit in zip(self.size, limits, strict=True)]

    def cost(self, limits: np.ndarray) -> float:
        """The sum that `cheapest` makes small."""
        by_layer = [e[s <= limit].sum() for s, e, limit in zip(self.size, self.error, limits, strict=True)]
        return float(np.sqrt(np.arange(1, len(by_layer) + 1)) @ by_layer)


@cache
def watched(activation: str = "silu") -> tuple[thresholds.Histograms, Seen]:
    engine = WatchedEngine(activation=activation)
    return thresholds.collect(engine, Corpus("x", IDS, None), NORMS), Seen(engine)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("density", [0.9, 0.5, 0.3, 0.05])
def test_densities_are_hit(activation: str, density: float) -> None:
    found, seen = watched(activation)
    assert found.tokens == 300 and (found.count.sum(axis=1) == 300 * 40).all()
    limits = thresholds.equal(found, density)
    assert limits.dtype == np.float32
    np.testing.assert_allclose(seen.density(limits), density, atol=0.005)
    wanted = [np.quantile(size, 1 - density) for size in seen.size]
    np.testing.assert_allclose(limits, wanted, rtol=0.01, atol=1e-3)
    cheap = thresholds.cheapest(found, density)
    assert np.mean(seen.density(cheap)) == pytest.approx(density, abs=0.005)
    for chosen in (limits, cheap):
        np.testing.assert_allclose(thresholds.densities(found, chosen), seen.density(chosen), atol=1e-3)


def test_the_errors_are_those_of_dropping() -> None:
    found, seen = watched()
    np.testing.assert_allclose(found.error.sum(axis=1), [e.sum() for e in seen.error], rtol=1e-4)
    limits = thresholds.equal(found, 0.4)
    first = thresholds._bins(limits) + 1
    for layer in range(3):
        kept = seen.size[layer] > limits[layer]
        assert found.error[layer, first[layer] :].sum() == pytest.approx(seen.error[layer][kept].sum(), rel=1e-3)


@pytest.mark.parametrize("density", [0.7, 0.4, 0.2])
def test_the_cheapest_cost_least(density: float) -> None:
    found, seen = watched()
    cheap = thresholds.cheapest(found, density)
    least = seen.cost(cheap)
    assert least < seen.cost(thresholds.equal(found, density))
    rng = np.random.default_rng(0)
    for _ in range(200):  # no other way of spending as much density is cheaper
        shares = np.clip(np.array(seen.density(cheap)) + rng.normal(0, 0.05, 3), 0.001, 0.999)
        other = np.array([np.quantile(size, 1 - share) for size, share in zip(seen.size, shares, strict=True)])
        if np.mean(seen.density(other)) <= np.mean(seen.density(cheap)):
            assert seen.cost(other) >= least * 0.99


def test_zeros_stay_inactive() -> None:
    found, seen = watched("relu")
    for how in (thresholds.equal, thresholds.cheapest):
        limits = how(found, 0.99)  # more than are not zero
        np.testing.assert_allclose(limits, 0, atol=1e-30)
        assert np.mean(seen.density(limits)) == pytest.approx(thresholds.densities(found, limits).mean(), abs=1e-3)
        assert max(seen.density(limits)) < 0.8


# ffn_down_t


@pytest.mark.parametrize(
    ("qtype", "stored", "n_embd"),
    [("F32", "F32", 64), ("F16", "F16", 64), ("BF16", "BF16", 64), ("Q8_0", "Q8_0", 64), ("Q4_0", "Q8_0", 96)],
)
def test_down_t_is_down(tiny_model: Make, tmp_path: Path, qtype: str, stored: str, n_embd: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_model(qtype=qtype, n_embd=n_embd).read_bytes())
    with GGUFFile(path) as file:
        config = ModelConfig.from_gguf(file)
        update_section(path, transpose.contents(file, config))
    with GGUFFile(path) as file:
        section = find_section(file)
        assert section is not None and section.has_down_t()
        with section:
            for layer in range(config.n_layer):
                info = section.image.tensors[f"blk.{layer}.ffn_down_t.weight"]
                assert (info.shape, info.type.name) == ((n_embd, 96), stored)
                raw = section.image.data(info.name).reshape(96, -1)
                got = dequantize(raw, GGMLQuantizationType(info.type)).view(np.float32).reshape(96, n_embd)
                wanted = file.dequantized(f"blk.{layer}.ffn_down.weight").T
                exact = stored != "Q8_0"
                np.testing.assert_allclose(got, wanted, rtol=0, atol=0 if exact else np.abs(wanted).max() / 250)
        norms = transpose.down_norms(file, config)
        np.testing.assert_allclose(norms[1], np.sqrt((wanted**2).sum(axis=1)), rtol=1e-5)
        reads = thresholds.reads(file, config)
        each = {part: file.tensors[f"blk.0.ffn_{part}.weight"].nbytes for part in ("gate", "up", "down")}
        assert reads.dense == 2 * sum(each.values()) and reads.at(0.0) == 2 * each["gate"]
        assert reads.at(0.25) == pytest.approx(2 * (each["gate"] + 0.25 * (each["up"] + info.nbytes)))


# the command


def test_the_command(tiny_model: Make, tmp_path: Path) -> None:
    path, text = tmp_path / "model.gguf", tmp_path / "text.txt"
    path.write_bytes(tiny_model().read_bytes())
    text.write_text(TEXT)
    before = path.read_bytes()
    arguments = ["sparsify", path, text, "-t", "1"]
    dry = invoke(*arguments, "--dry-run")
    assert dry.exit_code == 0 and path.read_bytes() == before, dry.output
    assert "without --dry-run" in dry.stderr
    result = invoke(*arguments, "--json", "-d", "0.3", "-d", "0.9", "-d", "0.5")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert path.read_bytes()[: len(before)] == before
    assert [row["wanted"] for row in report["rows"]] == [1.0, 0.9, 0.5, 0.3]
    with GGUFFile(path) as file:
        config = ModelConfig.from_gguf(file)
        words = load_tokenizer(file)
        section = find_section(file)
        assert section is not None
        with section:
            table = section.thresholds()
            assert section.has_down_t() and table is not None
    np.testing.assert_allclose(table.densities, [0.9, 0.5, 0.3], rtol=1e-6)
    assert table.values.shape == (3, config.n_layer) and (np.diff(table.values, axis=0) > 0).all()
    ids = corpus.load([text], words, few=0).ids
    assert report["tokens"] + report["held_out"] == len(ids) and report["held_out"] == int(0.4 * len(ids))
    held_out = ids[-report["held_out"] :].tolist()
    for row, mode in zip(report["rows"], ["dense", "threshold=0.9", "threshold=0.5", "threshold=0.3"], strict=True):
        with Engine(path, n_threads=1, sparsity=mode, use_section=mode != "dense") as engine:
            window = min(512, engine.n_ctx)
            wanted = perplexity.perplexity(engine, held_out, window, None, len(held_out) // window).ppl
        assert row["perplexity"] == pytest.approx(wanted, rel=1e-6)
        assert row["density"] == pytest.approx(row["wanted"], abs=0.05)
        assert row["ratio"] == pytest.approx((1 + 2 * row["density"]) / 3, rel=1e-6)  # F32: all rows alike


def test_it_keeps_what_else_the_section_has(tiny_model: Make, tmp_path: Path) -> None:
    path, text = tmp_path / "model.gguf", tmp_path / "text.txt"
    path.write_bytes(tiny_model().read_bytes())
    text.write_text(TEXT)
    from hotcold.solver import profile

    update_section(path, profile.contents(np.full((2, 96), 0.25, np.float32), 5, "before", "exact"))
    result = invoke("sparsify", path, text, "-t", "1", "--no-perplexity", "--sidecar")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 2 + 5 and lines[2].split()[0] == "1" and lines[-1].split()[0] == "0.3"
    with GGUFFile(path) as file:
        section = find_section(file)
        assert section is not None and not section.attached
        with section:
            kept = section.profile()
    assert kept is not None and kept.dataset == "before"


@pytest.mark.parametrize("density", ["0", "1", "-0.5", "nan", "7"])
def test_densities_that_make_no_sense(tiny_model: Make, density: str) -> None:
    result = invoke("sparsify", tiny_model(), "--density", density)
    assert result.exit_code == 1 and "wanted a number between 0 and 1" in result.stderr


def test_contents_are_descending_rows(tiny_model: Make, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_model().read_bytes())
    values = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], np.float32)
    made = thresholds.contents([0.7, 0.5, 0.25], values)
    assert isinstance(made, Contents)
    update_section(path, made)
    with GGUFFile(path) as file:
        section = find_section(file)
        assert section is not None
        with section:
            table = section.thresholds()
            assert table is not None
            np.testing.assert_array_equal(table.values, values)


def test_the_type_of_the_copy_may_be_chosen(tiny_model: Callable[..., Path]) -> None:
    with GGUFFile(tiny_model(qtype="Q4_0")) as file:
        config = ModelConfig.from_gguf(file)
        chosen = transpose.contents(file, config, transpose.check_type("q5_1", config)).tensors
        assert {tensor.type.name for tensor in chosen} == {"Q5_1"}
        assert {tensor.type.name for tensor in transpose.contents(file, config).tensors} == {"Q8_0"}
        with pytest.raises(ParameterError, match="down-type: got 'q4_k', wanted one of F32"):
            transpose.check_type("q4_k", config)
    with GGUFFile(tiny_model(n_embd=36, n_head=2)) as file, pytest.raises(ParameterError, match="n_embd is 36"):
        transpose.check_type("Q8_0", ModelConfig.from_gguf(file))
