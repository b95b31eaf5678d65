"""`--vram-budget` and its kin on the command line, in the simulator: placed, loaded, said in one line, or why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_simulator  # noqa: F401
import pytest
from adapters import FFN, make_adapter, matrices
from typer.testing import CliRunner, Result

from hotcold.tools.cli import app

MakeModel = Callable[..., Path]
SIZES: dict[str, Any] = {"n_embd": 32, "n_head": 2, "n_head_kv": 1, "n_ff": 128}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine whose GPU is worth using; what is solved is kept in a folder of the test's own."""
    from hotcold.solver import hardware, placement

    free = 1 << 30
    made_up = hardware.Hardware(
        name="made up",
        cpu_read={1: 1e6, 2: 1e6},
        gpu_read=1e12,
        link_latency=1e-6,
        link_bandwidth=1e10,
        sync=1e-6,
        launch=1e-6,
        gpu_free=free,
        gpu_total=free,
        processors=2,
    )
    monkeypatch.setattr(placement, "this_machine", lambda *_, **__: (made_up, ""))
    monkeypatch.setenv("HOTCOLD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOTCOLD_SIM_VRAM", str(1 << 30))


def run(model: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["run", str(model), "-p", "he", "-n", "2", "--temp", "0", "-c", "64", *options])


def test_the_gpu_answers_as_the_cpu_does_and_one_line_says_so(tiny_model: MakeModel, tmp_path: Path) -> None:
    model, trace = tiny_model(**SIZES), tmp_path / "trace.json"
    got = run(model, "--vram-budget", "700MiB", "--trace", str(trace))
    assert got.exit_code == 0, got.stderr
    assert got.stdout == run(model).stdout
    (line,) = [line for line in got.stderr.splitlines() if "of the neurons" in line]
    assert "made up" in line and "of 700.0 MiB" in line and "attention of 2 of 2 layers" in line
    units = {event["tid"] for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"}
    assert units == {1, 2}


def test_a_budget_for_nothing_goes_to_the_cpu_with_the_reason(tiny_model: MakeModel) -> None:
    model = tiny_model(**SIZES)
    got = run(model, "--vram-budget", "1MiB")
    assert got.exit_code == 0 and got.stdout == run(model).stdout
    assert "the GPU is not used: nothing of the model is put on the GPU" in got.stderr
    required = run(model, "--vram-budget", "1MiB", "--require-gpu")
    assert (required.exit_code, required.stdout) == (1, "")
    assert "hotcold: error: nothing of the model" in required.stderr


def test_memory_that_another_process_took_meanwhile(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(**SIZES)
    monkeypatch.setenv("HOTCOLD_SIM_VRAM", "300000")
    got = run(model, "--vram-budget", "700MiB")
    assert got.exit_code == 0 and got.stdout == run(model).stdout
    assert "the GPU is not used: GPU 0 (CUDA simulator): out of memory: wanted" in got.stderr
    assert run(model, "--vram-budget", "700MiB", "--require-gpu").exit_code == 1


def test_a_relufy_adapter(tiny_model: MakeModel, tmp_path: Path) -> None:
    """The merged model is what is placed; ordinary adapters stay refused."""
    model, path, other = tiny_model(**SIZES), tmp_path / "adapter.gguf", tmp_path / "other.gguf"
    keys = {"llama.hidden_activation": "relu"}
    make_adapter(path, matrices(model, FFN), metadata=keys, strength=1.0)
    make_adapter(other, matrices(model))
    got = run(model, "--vram-budget", "700MiB", "--lora", str(path))
    assert got.exit_code == 0, got.stderr
    assert "of the neurons" in got.stderr and "once" in got.stderr
    assert got.stdout == run(model, "--lora", str(path)).stdout
    refused = run(model, "--vram-budget", "700MiB", "--lora", str(path), "--lora", str(other))
    assert refused.exit_code == 1 and "lora: adapters run on the CPU alone" in refused.stderr


@pytest.mark.parametrize("budget", ["lots", "-1", "8 Gb x", "120%"])
def test_a_budget_that_is_none(tiny_model: MakeModel, budget: str) -> None:
    got = run(tiny_model(**SIZES), "--vram-budget", budget)
    assert got.exit_code == 1 and got.stdout == ""
    assert len(got.stderr.strip().splitlines()) == 1 and "budget: got" in got.stderr
