"""What costs.py plans for a family is what its engine takes of a GPU's memory, to the byte, on the device's books."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_simulator  # noqa: F401
import numpy as np
import pytest
import sections
from families import BY_NAME

from hotcold import Engine
from hotcold.formats.config import ModelConfig
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import Placement
from hotcold.formats.section_file import update_section
from hotcold.runtime import vram
from hotcold.runtime.cuda import jit
from hotcold.runtime.engine import MAX_OUTPUTS, MICRO_BATCH
from hotcold.solver import costs
from hotcold.solver.hardware import Hardware
from hotcold.solver.problem import Choice, nbytes
from hotcold.solver.stored import neurons

pytestmark = pytest.mark.skipif(not jit.simulated(), reason="a GPU's memory is taken in pages, and by others")
MACHINE = Hardware("test", {1: 1e9}, 1e11, 1e-6, 1e10, 2e-6, 1e-7, 2**30, 2**31, 16)
# Left out: those that differ from another one in attention or embeddings only; gemma3's layers are one group.
SAME = ("falcon-40b", "gemma2-27b", "gemma3", "mistral", "phi3-longrope-short", "qwen3moe")


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in SAME])
@pytest.mark.parametrize("cold", ["cpu", "mapped"])
def test_planned_is_loaded(
    family_file: Callable[[str], Path], name: str, cold: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "allocated", lambda each: each)  # the simulator takes no whole pages
    monkeypatch.setattr(costs, "GROUP", 32)
    same(family_file(name), "auto", cold)


@pytest.mark.parametrize("name", ["llama-rope3-bias", "opt", "falcon-7b"])
@pytest.mark.parametrize("cold", ["cpu", "mapped"])
def test_with_predictors(
    family_file: Callable[[str], Path], name: str, cold: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "allocated", lambda each: each)
    monkeypatch.setattr(costs, "GROUP", 32)
    path = tmp_path / "model.gguf"
    path.write_bytes(family_file(name).read_bytes())
    with GGUFFile(path) as file:
        c = ModelConfig.from_gguf(file)
    update_section(path, sections.contents("predictors", sizes=(c.n_layer, c.n_embd, c.n_ff)))
    same(path, "predict", cold)


@pytest.mark.parametrize("mode", ["dense", "exact", "predict"])
@pytest.mark.parametrize("cold", ["cpu", "mapped"])
def test_with_a_bypass(
    tiny_model: Callable[..., Path], tmp_path: Path, mode: str, cold: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "allocated", lambda each: each)
    monkeypatch.setattr(costs, "GROUP", 32)
    path = tmp_path / "model.gguf"
    relu = {
        "metadata": {"llama.hidden_activation": "relu"},
        "bypass": True,
        "types": {"blk.1.ffn_bypass.weight": "F16"},
    }
    path.write_bytes(tiny_model(**relu).read_bytes())
    if mode == "predict":
        update_section(path, sections.contents("predictors"))
    same(path, mode, cold)


def same(path: Path, sparsity: str, cold: str) -> None:
    """Load a layer with one hot group, and all of the others."""
    with Engine(path, n_ctx=64, n_threads=1, sparsity=sparsity) as engine:
        c, mode = engine.config, str(engine.plan.sparsity) if engine.plan else "dense"
        settings: dict[str, Any] = {"capacity": 1 << 30, "n_ctx": 64, "threads": 1, "sparsity": mode}
        made = costs.costs(engine.file, c, engine.section, MACHINE, mapped=cold == "mapped", **settings)
    problem = made.problem
    some = Choice((1,) + (len(problem.layers[0].nbytes) - 1,) * (c.n_layer - 1), (True,) * c.n_layer, True)
    hot = neurons(problem, some)
    place = Placement(hot, some.attention, some.head, 64, 1 << 30, problem.group, cold, "ours", "simulator")
    with Engine(path, n_ctx=64, n_threads=1, sparsity=mode, placement=place) as engine:
        device = engine._executor._gpu.device  # type: ignore[union-attr]
        used = device.memory().used_by_us
        ranks = engine._ranks()
    work = vram.work_bytes(c, 64, MICRO_BATCH, MAX_OUTPUTS, ranks, device.processors)
    if cold == "mapped":  # the CPU sends no sums
        work -= 4 * c.n_embd * MICRO_BATCH
    assert used - work == nbytes(problem, some)
    assert 0 < len(hot[0]) < c.n_ff
    np.testing.assert_array_equal(hot[-1], np.arange(c.n_ff))
