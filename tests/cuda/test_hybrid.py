"""The hybrid engine on tiny models: whatever is placed where, it computes what the CPU alone computes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_simulator  # noqa: F401
import naive
import numpy as np
import pytest
import tiny

from hotcold import Engine
from hotcold.formats.errors import GPUError, ParameterError
from hotcold.formats.section import Placement
from hotcold.formats.section_file import Contents, SectionTensor, update_section
from hotcold.formats.types import GGMLType
from hotcold.runtime import vram
from hotcold.runtime.cuda import jit
from hotcold.runtime.cuda.repack import packed_bytes
from hotcold.runtime.engine import MAX_OUTPUTS, MICRO_BATCH
from hotcold.runtime.executor import CPUExecutor
from hotcold.runtime.trace import Trace

SIMULATED = pytest.mark.skipif(not jit.simulated(), reason="a GPU's memory is what it is, and taken in pages")
N_FF = 96
SIZES: dict[str, Any] = {"n_embd": 32, "n_head": 2, "n_head_kv": 1, "n_ff": N_FF}  # the simulator is slow
PLACES = {  # attention by layer, hot neurons by layer, head
    "all on the GPU": ("gg", (96, 96), True),
    "split": ("gg", (32, 64), True),
    "head on the CPU": ("gg", (64, 32), False),
    "attention on the CPU": ("cc", (32, 96), False),
    "one layer each": ("gc", (96, 0), False),
    "split and whole": ("gg", (32, 96), True),
    "mixed": ("cg", (0, 64), True),
}


def placed(where: str, seed: int = 0, budget: int = 1 << 30) -> Placement:
    attention, counts, head = PLACES[where]
    rng = np.random.default_rng(seed)
    hot = tuple(np.sort(rng.permutation(N_FF)[:n]).astype(np.int32) for n in counts)
    on_gpu = tuple(c == "g" for c in attention)
    return Placement(hot, on_gpu, head, 64, budget, 32, "cpu", "ours", "simulator")


def run(path: Path, mode: str, placement: Placement | None, tokens: int = 2, trace: Trace | None = None) -> np.ndarray:
    """Logits of a prompt and of a few greedy tokens after it, float32 [tokens + 1, n_vocab]."""
    with Engine(path, n_ctx=64, n_threads=2, sparsity=mode, placement=placement, trace=trace) as engine:
        sequence = engine.new_sequence()
        rows = [engine.eval(sequence, np.arange(5, 8))[-1].copy()]
        for _ in range(tokens):
            rows.append(engine.eval(sequence, [int(rows[-1].argmax())])[-1].copy())
        return np.array(rows)


def close(got: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    assert (got.argmax(1) == wanted.argmax(1)).all()
    assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("hybrid")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """A SwiGLU model."""
    return tiny.make_tiny_model(folder / "plain.gguf", **SIZES)


@pytest.fixture(scope="module")
def relu(folder: Path) -> Path:
    """A ReLU model."""
    return tiny.make_tiny_model(folder / "relu.gguf", metadata={"llama.hidden_activation": "relu"}, seed=3, **SIZES)


@pytest.mark.parametrize("where", PLACES)
def test_a_dense_model_is_the_cpus(plain: Path, where: str) -> None:
    close(run(plain, "dense", placed(where)), run(plain, "dense", None), 1e-4)


@pytest.mark.parametrize("where", ["all on the GPU", "split", "mixed"])
def test_an_exact_model_is_the_cpus(relu: Path, where: str) -> None:
    close(run(relu, "exact", placed(where)), run(relu, "exact", None), 1e-4)


def tensor(name: str, values: np.ndarray) -> SectionTensor:
    data = values.astype(np.float32)
    return SectionTensor(name, values.shape[::-1], GGMLType.F32, lambda: data.view(np.uint8))


def random_predictors() -> list[SectionTensor]:
    """For two layers."""
    rng = np.random.default_rng(4)
    return [
        tensor(f"blk.{layer}.{name}", rng.normal(0, 1, shape))
        for layer in range(2)
        for name, shape in (
            ("ffn_pred_a.weight", (32, 32)), ("ffn_pred_b.weight", (N_FF, 32)), ("ffn_pred_cut", (N_FF,))
        )
    ]  # fmt: skip


@pytest.fixture(scope="module")
def with_section(folder: Path, relu: Path) -> Path:
    """The ReLU model with thresholds and predictors of random weights, that choose about half of the neurons."""
    found = random_predictors()
    found.append(tensor("ffn_thresholds", np.array([[0.05, 0.1]])))
    about = {"hotcold.predictor.kind": "relu", "hotcold.predictor.input": "ffn_norm"}
    path = Path(shutil.copy(relu, folder / "section.gguf"))
    update_section(path, Contents({**about, "hotcold.threshold.densities": [0.5]}, found))
    return path


@pytest.mark.parametrize("mode", ["predict", "threshold=0.5"])
@pytest.mark.parametrize("where", ["all on the GPU", "split"])
def test_the_approximate_modes_choose_the_same_neurons(with_section: Path, mode: str, where: str) -> None:
    wanted = run(with_section, mode, None)
    assert np.abs(wanted - run(with_section, "dense", None)).max() > 1e-2 * np.abs(wanted).max()
    close(run(with_section, mode, placed(where)), wanted, 1e-4)


@pytest.fixture(scope="module")
def with_bypass(folder: Path) -> Path:
    """A ReLU model with a bypass, floors by layer, and predictors that look at the residual before it was added to."""
    meta = {"llama.hidden_activation": "relu"}
    path = tiny.make_tiny_model(folder / "bypass.gguf", metadata=meta, bypass=True, floors=(0.05, 0.2), seed=3, **SIZES)
    found = random_predictors()
    update_section(path, Contents({"hotcold.predictor.kind": "relu", "hotcold.predictor.input": "residual"}, found))
    return path


@pytest.mark.parametrize(
    ("mode", "where", "cold"),
    [
        ("dense", "all on the GPU", "cpu"),
        ("dense", "split and whole", "cpu"),
        ("dense", "split and whole", "mapped"),
        ("exact", "all on the GPU", "cpu"),
        ("exact", "split", "cpu"),
        ("exact", "mixed", "cpu"),
        ("exact", "split", "mapped"),
        ("predict", "all on the GPU", "cpu"),
        ("predict", "split", "cpu"),
        ("predict", "split", "mapped"),
    ],
)
def test_a_bypass_is_added_once(with_bypass: Path, mode: str, where: str, cold: str) -> None:
    wanted = run(with_bypass, mode, None)
    close(run(with_bypass, mode, replace(placed(where), cold=cold)), wanted, 1e-4)
    ids = [5, 6, 7, *wanted[:2].argmax(1)]
    if mode != "predict":
        close(wanted, naive.forward(with_bypass, ids, kv_f16=True)[2:], 1e-3)


@pytest.mark.parametrize("mode", ["exact", "predict"])
def test_cold_rows_out_of_the_hosts_memory(with_section: Path, mode: str) -> None:
    mapped = replace(placed("split"), cold="mapped")
    close(run(with_section, mode, mapped), run(with_section, mode, None), 1e-4)


def test_quantised_weights(folder: Path) -> None:
    """The CPU rounds activations to 8 bits and the GPU does not, so they agree as the two do."""
    path = tiny.make_tiny_model(folder / "q8.gguf", qtype="Q8_0", **SIZES)
    got, wanted = run(path, "dense", placed("split")), run(path, "dense", None)
    assert np.sqrt(((got - wanted) ** 2).mean()) < 0.02 * wanted.std()


def test_usage_counts_both_sides(relu: Path) -> None:
    def density(placement: Placement | None) -> tuple[float, int]:
        with Engine(relu, n_ctx=64, n_threads=2, sparsity="exact", placement=placement) as engine:
            sequence = engine.new_sequence()
            for token in (5, 6, 7):
                engine.eval(sequence, [token])
            return engine.usage.density, engine.usage.places

    assert density(placed("split")) == density(None)
    assert density(placed("all on the GPU")) == density(None)


@SIMULATED
def test_what_is_loaded_is_what_was_planned(plain: Path) -> None:
    """Weights as repack counts them, the KV cache and work memory as vram does: to the byte, on the device's books."""
    placement = placed("split and whole")
    with Engine(plain, n_ctx=64, n_threads=1, placement=placement) as engine:
        config, device = engine.config, engine._executor._gpu.device  # type: ignore[union-attr]
        used = device.memory().used_by_us
    per_layer = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32}
    weights = sum(packed_bytes("F32", n, 32) for n in per_layer.values()) * 2
    weights += sum(packed_bytes("F32", len(hot), 32) * 3 for hot in placement.hot) + packed_bytes("F32", 300, 32)
    vectors = 4 * 32 * 5  # two norms a layer, and the last
    kv = 2 * vram.kv_bytes(config, 64)
    work = vram.work_bytes(config, 64, MICRO_BATCH, MAX_OUTPUTS, processors=device.processors)
    assert used == weights + vectors + kv + work


def test_more_than_the_budget_is_refused_and_freed(plain: Path) -> None:
    with pytest.raises(GPUError, match="more than the budget"):
        run(plain, "dense", placed("split", budget=1000))
    close(run(plain, "dense", None), run(plain, "dense", None), 0.0)


@SIMULATED
def test_memory_that_runs_out_while_loading(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTCOLD_SIM_VRAM", "200000")
    with pytest.raises(GPUError, match="out of memory: wanted [0-9]+ bytes, [0-9]+ are free"):
        run(plain, "dense", placed("split"))


@pytest.mark.parametrize("hot", [np.arange(33), np.array([1, 1] * 16), np.arange(96, 128), np.arange(31, -1, -1)])
def test_a_placement_that_does_not_fit(plain: Path, hot: np.ndarray) -> None:
    with pytest.raises(ParameterError, match="placement: layer 1"):
        run(plain, "dense", replace(placed("split"), hot=(np.arange(32), hot.astype(np.int32))))


def test_a_fault_of_the_gpu_is_one_error(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of a step: the call fails, and again; closing works, and the CPU goes on."""

    class Fault(Exception):
        pass

    Fault.__module__ = "numba.cuda.cudadrv.driver"
    with Engine(plain, n_ctx=64, n_threads=2, placement=placed("split")) as engine:
        sequence = engine.new_sequence()
        engine.eval(sequence, [5])
        calls = 0
        launch = jit.Kernel.__call__

        def failing(self: jit.Kernel, *args: object) -> None:
            nonlocal calls
            calls += 1
            if calls == 12:
                raise Fault("CUDA_ERROR_ILLEGAL_ADDRESS")
            launch(self, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(jit.Kernel, "__call__", failing)
        with pytest.raises(GPUError, match="ILLEGAL_ADDRESS; the GPU cannot be used any more"):
            engine.eval(sequence, [6])
        assert sequence.tokens == [5]
        with pytest.raises(GPUError, match="ILLEGAL_ADDRESS"):
            engine.eval(sequence, [6])
    monkeypatch.undo()
    run(plain, "dense", None, 1)


def test_an_interrupt_stops_both_sides_and_the_engine_goes_on(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(plain, n_ctx=64, n_threads=2, placement=placed("split")) as engine:
        sequence = engine.new_sequence()
        wanted = engine.eval(sequence, [5]).copy()
        sequence.truncate(0)
        walk, walks = CPUExecutor.walk, 0

        def interrupted(self: CPUExecutor, first: int, end: int) -> None:
            nonlocal walks
            walk(self, first, end)
            walks += 1
            if walks == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(CPUExecutor, "walk", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.eval(sequence, [5])
        assert sequence.tokens == []
        np.testing.assert_array_equal(engine.eval(sequence, [5]), wanted)


def test_a_timeline_shows_both_units_at_work_at_once(plain: Path, tmp_path: Path) -> None:
    trace = Trace()
    run(plain, "dense", placed("split"), 1, trace)
    pairs = [(a, b) for a in trace.spans("cpu") for b in trace.spans("gpu")]
    assert any(a[0] < b[1] and b[0] < a[1] for a, b in pairs)  # the two overlap
    trace.write(tmp_path / "trace.json")
    assert '"CPU"' in (tmp_path / "trace.json").read_text()
