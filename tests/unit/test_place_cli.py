"""`hotcold place`: what it prints, stores and refuses, for a machine that a file describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from typer.testing import CliRunner, Result

from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import Placement, find_section
from hotcold.formats.section_file import update_section
from hotcold.solver import profile
from hotcold.solver.hardware import Hardware
from hotcold.tools.cli import app

MACHINE = Hardware("made up", {1: 1e6, 2: 1e6}, 1e9, 1e-6, 1e9, 1e-6, 1e-7, 1 << 30, 1 << 30, 16)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ReLU model with a profile; what is kept for the user goes to a folder of the test's own."""
    monkeypatch.setenv("HOTCOLD_HOME", str(tmp_path / "home"))
    path = tiny.make_tiny_model(tmp_path / "model.gguf", n_ff=512, metadata={"llama.hidden_activation": "relu"})
    freq = np.random.default_rng(0).random((2, 512)).astype(np.float32) ** 4
    update_section(path, profile.contents(freq, 100, "a text", "exact"))
    MACHINE.save(tmp_path / "machine.json")
    return path


def place(model: Path, *options: str, budget: str = "680MiB") -> Result:
    given = ["--hardware", str(model.with_name("machine.json")), "-b", budget, "-c", "64", "-t", "1", *options]
    return CliRunner().invoke(app, ["place", str(model), *given])


def stored(model: Path) -> Placement | None:
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        return section.placement()


def test_it_prints_the_solution_and_keeps_it(model: Path) -> None:
    done = place(model)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "made up, 1 threads; sparsity exact, context 64" in lines[0]
    assert [line.split()[0] for line in lines[2:4]] == ["0", "1"]
    assert any(line.startswith("budget 680.0 MiB:") for line in lines)
    assert any("<- this placement" in line and line.strip().startswith("ours") for line in lines)
    assert lines[-1].startswith("ours: optimal, gap ")
    kept = stored(model)
    assert kept is not None and kept.budget == 680 << 20 and all(len(ids) == 512 for ids in kept.hot)
    shown = CliRunner().invoke(app, ["section", str(model)])
    assert "placement" in shown.stdout and "made up" in shown.stdout


def test_the_least_budgets_hold_the_most_active_neurons(model: Path) -> None:
    found: dict[str, Any] = json.loads(place(model, "--json", "--dry-run").stdout)
    assert found["used"] + found["reserve"] <= found["budget"] == 680 << 20
    tight = found["reserve"] + found["used"] // 3
    less: dict[str, Any] = json.loads(place(model, "--json", "--dry-run", budget=str(tight)).stdout)
    assert less["used"] + less["reserve"] <= tight
    hot = sum(layer["hot"] for layer in less["layers"]) / 1024
    assert 0 < hot < 1 and less["active_share"] > hot  # the profile is skew
    speeds = less["tokens_per_second"]
    assert speeds["ours"] >= max(speeds[name] for name in ("cpu", "layers", "greedy", "paper")) * (1 - 1e-9)
    assert stored(model) is None


def test_a_budget_for_nothing_takes_the_stored_one_out(model: Path) -> None:
    assert place(model).exit_code == 0 and stored(model) is not None
    done = place(model, budget="1MiB")
    assert done.exit_code == 0 and "nothing is put on the GPU" in done.stderr
    assert stored(model) is None


def test_a_plot(model: Path) -> None:
    picture = model.with_name("placement.png")
    assert place(model, "--dry-run", "--plot", str(picture)).exit_code == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "budget", "said"),
    [
        ((), "lots", "budget: got 'lots'"),
        ((), "2GiB", "wanted at most"),
        (("--objective", "best"), "680MiB", "objective: got 'best'"),
        (("--solver", "glpk"), "680MiB", "solver: got 'glpk'"),
        (("--cold", "disk"), "680MiB", "cold: got 'disk'"),
        (("--hardware", "nowhere.json"), "680MiB", "nowhere.json"),
    ],
)
def test_one_line_for_what_is_wrong(model: Path, options: tuple[str, ...], budget: str, said: str) -> None:
    done = place(model, *options, budget=budget)
    assert done.exit_code == 1 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("hotcold: error: ") and said in line
    assert stored(model) is None
