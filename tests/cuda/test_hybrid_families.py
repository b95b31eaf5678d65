"""Every kind of model on the hybrid engine: wherever its parts are placed, it gives transformers' logits.

The tolerance is tests/models/test_families.py's; a bias, norm or setting left out moves logits by five times that.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_simulator  # noqa: F401
import numpy as np
import pytest
from bypasses import with_bypass
from checkpoints import copied
from families import BY_NAME, relative_error

from hotcold import Engine
from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import ParameterError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import Placement
from hotcold.formats.section_file import Contents, SectionTensor, update_section
from hotcold.formats.types import GGMLType
from hotcold.runtime import vram
from hotcold.runtime.cuda import jit
from hotcold.runtime.engine import MAX_OUTPUTS, MICRO_BATCH
from hotcold.runtime.usage import Usage
from hotcold.solver import costs
from hotcold.solver.convert import convert
from hotcold.solver.hardware import Hardware

TOLERANCE = 1e-3
MACHINE = Hardware("test", {1: 1e9}, 1e11, 1e-6, 1e10, 2e-6, 1e-7, 2**30, 2**31, 16)
N_CTX = 64
Make = Callable[[str], Path]


def config_of(path: Path) -> ModelConfig:
    with GGUFFile(path) as file:
        return ModelConfig.from_gguf(file)


def some(config: ModelConfig, share: float, seed: int = 0) -> np.ndarray:
    """A share of a layer's neurons, in groups of 32 or whole experts."""
    rng = np.random.default_rng(seed)
    if config.n_expert:
        each = config.expert_neurons
        experts = np.sort(rng.permutation(config.n_expert)[: round(share * config.n_expert)])
        return (experts[:, None] * each + np.arange(each)).reshape(-1).astype(np.int32)
    n = int(share * config.n_ff) // 32 * 32 if share < 1 else config.n_ff
    return np.sort(rng.permutation(config.n_ff)[:n]).astype(np.int32)


def placed(config: ModelConfig, where: str) -> Placement:
    """all: everything on the GPU. split, mapped: all but the output and the cold half of the neurons.

    alternate: every other layer has its attention on the GPU and its FFN on the CPU, the rest half of their FFN only.
    """
    n, nothing, half = config.n_layer, np.zeros(0, np.int32), some(config, 0.5)
    attention, hot = (True,) * n, (some(config, 1.0) if where == "all" else half,) * n
    if where == "alternate":
        attention = tuple(layer % 2 == 0 for layer in range(n))
        hot = tuple(nothing if layer % 2 == 0 else half for layer in range(n))
    cold = "mapped" if where == "mapped" else "cpu"
    return Placement(hot, attention, where == "all", N_CTX, 1 << 30, 32, cold, "ours", "simulator")


def run(path: Path, placement: Placement | None, ids: np.ndarray, mode: str = "auto") -> np.ndarray:
    """Logits of all tokens: of a prompt, and of the last one by itself."""
    with Engine(path, n_ctx=N_CTX, n_threads=2, sparsity=mode, placement=placement) as engine:
        sequence = engine.new_sequence()
        prompt = engine.eval(sequence, ids[:-1], all_logits=True).copy()
        return np.concatenate([prompt, engine.eval(sequence, ids[-1:])])


@pytest.mark.parametrize(
    ("name", "where", "n_tokens"),
    [
        ("falcon-7b", "split", 3),  # parallel, layer norm, GELU with erf, no gate
        ("gemma2", "alternate", 11),  # norms before sums, scores and logits capped; every other layer has a window
        ("gemma3", "alternate", 3),  # norms of heads, two bases of rotations
        ("gpt2", "all", 3),  # learned positions, biases
        ("gptneox", "mapped", 3),  # parallel, with biases
        ("granite", "alternate", 3),  # scales
        ("llama-rope3-bias", "split", 3),  # biases of gate and up
        ("mixtral", "all", 3),
        ("olmo2", "split", 3),  # no norms before, norms of q and k as a whole
        ("olmoe", "alternate", 3),  # experts' weights that do not sum to 1
        ("opt", "split", 3),  # ReLU, exact
        ("qwen3moe", "split", 3),
        ("stablelm-12b", "split", 3),  # parallel with a gate, each head's own norm, partly rotated
    ],
)
def test_transformers_logits(family_file: Make, name: str, where: str, n_tokens: int) -> None:
    path, (ids, logits) = family_file(name), BY_NAME[name].batch[0]
    got = run(path, placed(config_of(path), where), ids[:n_tokens])
    assert relative_error(got, logits[:n_tokens]) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "where"),
    [("falcon-7b", "split"), ("gemma2", "split"), ("gemma2", "all"), ("olmo2", "mapped"), ("opt", "alternate")],
)
def test_a_bypass_is_the_cpus(family_file: Make, tmp_path: Path, name: str, where: str) -> None:
    """Set in or added to what norms come after, beside parallel attention, and with sums of both sides."""
    path, ids = with_bypass(family_file(name), tmp_path / "m.gguf"), BY_NAME[name].batch[0][0][:3]
    wanted = run(path, None, ids)
    assert relative_error(run(family_file(name), None, ids), wanted) > 20 * TOLERANCE
    assert relative_error(run(path, placed(config_of(path), where), ids), wanted) < TOLERANCE


@pytest.fixture(scope="module")
def with_section(family_file: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    """A model without gates, with biases, thresholds, and predictors of random weights that choose about half of it."""
    path = Path(shutil.copy(family_file("gptneox"), tmp_path_factory.mktemp("section")))
    config, rng, found = config_of(path), np.random.default_rng(0), []

    def add(name: str, values: np.ndarray) -> None:
        data = values.astype(np.float32)
        found.append(SectionTensor(name, values.shape[::-1], GGMLType.F32, lambda: data.view(np.uint8)))

    for layer in range(config.n_layer):
        add(f"blk.{layer}.ffn_pred_a.weight", rng.normal(0, 1, (32, config.n_embd)))
        add(f"blk.{layer}.ffn_pred_b.weight", rng.normal(0, 1, (config.n_ff, 32)))
        add(f"blk.{layer}.ffn_pred_cut", rng.normal(0, 1, config.n_ff))
    add("ffn_thresholds", np.full((1, config.n_layer), 0.16))
    about = {"hotcold.predictor.kind": "relu", "hotcold.predictor.input": "ffn_norm"}
    update_section(path, Contents({**about, "hotcold.threshold.densities": [0.5]}, found))
    return path, config


@pytest.mark.parametrize(("where", "mode"), [("split", "predict"), ("mapped", "threshold=0.5")])
def test_a_choice_of_neurons_without_gates(with_section: tuple[Path, ModelConfig], where: str, mode: str) -> None:
    path, config = with_section
    ids = BY_NAME["gptneox"].prompt[:2]
    wanted = run(path, None, ids, mode)
    assert relative_error(run(path, None, ids, "dense"), wanted) > 1e-2
    assert relative_error(run(path, placed(config, where), ids, mode), wanted) < 1e-4


@pytest.mark.parametrize(("where", "mode"), [("split", "dense"), ("all", "dense"), ("split", "exact")])
def test_fatrelu_has_its_floor_on_both_sides(tmp_path: Path, where: str, mode: str) -> None:
    settings = {"hidden_act": "fatrelu", "hidden_act_param": 0.25}
    folder = copied(BY_NAME["llama-relu"].folder, tmp_path / "fat", settings)
    path = convert(folder, tmp_path / "fat.gguf", "f32").path
    config, ids = config_of(path), BY_NAME["llama-relu"].prompt[:3]
    wanted = run(path, None, ids, "dense")
    assert relative_error(BY_NAME["llama-relu"].logits[:3], wanted) > 1e-2
    assert relative_error(run(path, placed(config, where), ids, mode), wanted) < 1e-4


@pytest.mark.skipif(not jit.simulated(), reason="a GPU's memory is taken in pages, and by others")
def test_both_tables_of_rotations_are_planned(family_file: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3's layers are too small to be split here, so tests/cuda/test_planned_families.py leaves it out."""
    monkeypatch.setattr(costs, "allocated", lambda nbytes: nbytes)
    path = family_file("gemma3")
    config = config_of(path)
    with Engine(path, n_ctx=N_CTX, n_threads=1, placement=placed(config, "all")) as engine:
        device = engine._executor._gpu.device  # type: ignore[union-attr]
        used, processors = device.memory().used_by_us, device.processors
        asked: dict[str, Any] = {"capacity": 1 << 30, "n_ctx": N_CTX, "threads": 1, "sparsity": "auto"}
        problem = costs.costs(engine.file, config, None, MACHINE, **asked).problem
    weights = problem.head.nbytes + sum(layer.attention.nbytes + int(layer.nbytes[-1]) for layer in problem.layers)
    work = vram.work_bytes(config, N_CTX, MICRO_BATCH, MAX_OUTPUTS, processors=processors)
    split_only = 4 * (MICRO_BATCH * config.n_embd + vram.down_floats(config, MICRO_BATCH))  # base and parts
    assert used == weights + work - split_only


@pytest.mark.parametrize("where", ["split", "alternate", "mapped"])
def test_both_sides_count_the_experts_in_use(family_file: Make, where: str) -> None:
    """Neurons of the chosen experts; token by token, both sides read what one would, and each its own router."""
    path, ids = family_file("mixtral"), BY_NAME["mixtral"].prompt[:2]
    config = config_of(path)

    def counted(placement: Placement | None) -> Usage:
        with Engine(path, n_ctx=N_CTX, n_threads=2, placement=placement) as engine:
            sequence = engine.new_sequence()
            for token in ids:
                engine.eval(sequence, [token])
            assert engine.usage.steps == 2
            return engine.usage

    alone, both = counted(None), counted(placed(config, where))
    assert (both.places, both.active) == (alone.places, alone.active)
    assert both.density == pytest.approx(config.n_expert_used / config.n_expert)
    routers = {"split": 2, "alternate": 1, "mapped": 0}[where] * 2 * config.n_expert * config.n_embd * 4
    assert both.ffn_bytes == alone.ffn_bytes + routers


def test_experts_are_placed_whole(family_file: Make) -> None:
    path = family_file("mixtral")
    config = config_of(path)
    for hot in (np.arange(1), np.arange(1, config.expert_neurons + 1), np.arange(config.n_ff - 1)):
        placement = placed(config, "split")
        parts = (placement.hot[0], hot.astype(np.int32))
        wrong = Placement(parts, (True, True), True, N_CTX, 1 << 30, 32, "cpu", "ours", "simulator")
        with pytest.raises(ParameterError, match="placement: layer 1: got [0-9]+ hot neurons of expert [0-9]+, wanted"):
            Engine(path, n_ctx=N_CTX, n_threads=1, placement=wrong)
