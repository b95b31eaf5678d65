"""Placements: against brute force, within budgets to the byte, costs against packed weights, stored ones, bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sections
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from placements import brute_force, make_layer, random_problem, real_problem

from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import HotcoldError, ParameterError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import find_section
from hotcold.formats.section_file import Contents, SectionTensor, update_section
from hotcold.formats.types import GGMLType
from hotcold.runtime import vram
from hotcold.runtime.cuda import repack
from hotcold.solver import baselines, budget, costs, milp, placement, profile, stored
from hotcold.solver.hardware import Hardware
from hotcold.solver.problem import Choice, Problem, nbytes, nothing, seconds

Make = Callable[..., Path]
RELU = {"llama.hidden_activation": "relu"}
SIZES = {"n_layer": 3, "n_embd": 64, "n_ff": 224, "metadata": RELU}  # three groups and a half
MACHINE = Hardware("test", {1: 1e9, 4: 3e9}, 1e11, 1e-6, 1e10, 2e-6, 1e-7, 2**30, 2**31, 16)
SOLVERS = ["cbc", pytest.param("highs", marks=pytest.mark.skipif(not find_spec("highspy"), reason="no highspy"))]

pytest.importorskip("mip")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOTCOLD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(tiny_model: Make, tmp_path: Path) -> Path:
    """A ReLU model of one's own, with a profile in which every neuron differs."""
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_model(**SIZES).read_bytes())
    update_section(path, profile.contents(frequencies(), 100, "a text", "exact"))
    return path


def frequencies(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(np.linspace(1, 224, 224)) / 256 for _ in range(3)]).astype(np.float32)


def walked(problem: Problem, choice: Choice, mapped: bool) -> float:
    """The time of a token, by walking as the decoder does: who has the residual, and who needs it."""
    s, total, have = problem.sync, 0.0, {"cpu"}
    for layer, k, on_gpu in zip(problem.layers, choice.hot, choice.attention, strict=True):
        unit = "gpu" if on_gpu else "cpu"
        total += s * (unit not in have) + (layer.attention.gpu if on_gpu else layer.attention.cpu)
        have = {unit}
        n_groups = len(layer.nbytes) - 1
        cpu = gpu = 0.0
        if k < n_groups and not (mapped and k):
            cpu = layer.cold[k] + s * ("cpu" not in have) + s * (k > 0)  # its sum goes to the GPU
        if k:
            gpu = layer.hot[k] + s * ("gpu" not in have) + (layer.mapped[k] if mapped else 0.0)
        total += max(cpu, gpu)
        have = {"gpu" if k else "cpu"}
    unit = "gpu" if choice.head else "cpu"
    total += s * (unit not in have) + (problem.head.gpu + s if choice.head else problem.head.cpu)
    return float(total)


def solved(problem: Problem, tables: milp.Tables, solver: str = "cbc", gap: float = 0.0) -> milp.Solved:
    return milp.solve(tables, [nothing(problem)], solver, 30.0, gap)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(8))
def test_optimal_against_brute_force(seed: int, solver: str) -> None:
    problem = random_problem(np.random.default_rng(seed), *((2, 6) if seed % 2 else (3, 4)))
    for mapped in (False, True):
        found = solved(problem, milp.ours(problem, mapped), solver)
        best = brute_force(problem, lambda choice, mapped=mapped: walked(problem, choice, mapped))  # type: ignore[misc]
        assert walked(problem, found.choice, mapped) == pytest.approx(best, rel=1e-9)
        assert found.status == "optimal" and found.bound is not None and found.bound <= best * (1 + 1e-6)
        assert nbytes(problem, found.choice) <= problem.capacity
    tables = milp.paper(problem)
    found = solved(problem, tables, solver)
    assert tables.value(found.choice) == pytest.approx(brute_force(problem, tables.value), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("mapped", [False, True])
def test_seconds_are_those_of_the_decoders_hand_overs(mapped: bool) -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        problem = replace(random_problem(rng, 4, 3), sync=1e-3)
        sizes = [len(layer.nbytes) for layer in problem.layers]
        choice = Choice(tuple(int(rng.integers(n)) for n in sizes), tuple(map(bool, rng.integers(2, size=4))),
                        bool(rng.integers(2)))  # fmt: skip
        wanted = walked(problem, choice, mapped)
        assert seconds(problem, choice, mapped) == pytest.approx(wanted, rel=1e-12)
        assert milp.ours(problem, mapped).value(choice) == pytest.approx(wanted, rel=1e-12)


def test_a_run_of_whole_layers_pays_no_hand_overs_within() -> None:
    problem = real_problem(6, 4, 256, 1.0, True, sync=1.0)
    inner = Choice((0, 4, 4, 4, 4, 0), (False, True, True, True, True, False), False)
    assert 1.99 < seconds(problem, inner) < 2.1  # in and out
    assert 1.99 < seconds(problem, Choice((4,) * 6, (True,) * 6, True)) < 2.1  # the input, and the logits


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.8])
def test_large_models_come_near_the_bound(sparse: bool, share: float) -> None:
    problem = real_problem(32, 172, 4096, share, sparse)
    found = milp.solve(milp.ours(problem), [nothing(problem)], "cbc", 60.0, 1e-3)
    assert found.gap is not None and found.gap <= 1e-3 and found.status == "optimal"
    assert problem.capacity * 0.95 < nbytes(problem, found.choice) <= problem.capacity


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 8), st.floats(0, 1.2), st.booleans())
def test_no_placement_exceeds_its_budget(seed: int, n_layer: int, n_groups: int, share: float, steps: bool) -> None:
    problem = random_problem(np.random.default_rng(seed), n_layer, n_groups)
    if steps:  # as memory is handed out: sizes that grow in jumps
        layers = [replace(layer, nbytes=-(-layer.nbytes // 20_000) * 20_000) for layer in problem.layers]
        problem = replace(problem, layers=tuple(layers))
    most = sum(int(layer.nbytes.max()) + layer.attention.nbytes for layer in problem.layers) + problem.head.nbytes
    problem = replace(problem, capacity=int(most * share))
    for choice in (baselines.greedy(problem), baselines.naive(problem)):
        assert nbytes(problem, choice) <= problem.capacity
    known = [nothing(problem), baselines.greedy(problem), baselines.naive(problem)]
    for tables in (milp.ours(problem), milp.ours(problem, True), milp.paper(problem)):
        allowed = [choice for choice in known if np.isfinite(tables.value(choice))]
        found = milp.solve(tables, allowed, "cbc", 5.0, 1e-3)
        assert nbytes(problem, found.choice) == tables.taken(found.choice) <= problem.capacity
        assert tables.value(found.choice) <= min(map(tables.value, allowed))


def test_many_groups_are_rounded_and_fit_exactly() -> None:
    """Beyond a few thousand numbers of groups the weights are continuous, and what is rounded off is filled again."""
    rng = np.random.default_rng(5)
    for share in (0.13, 0.37, 0.61):
        problem = real_problem(24, 100, 1024, share, True, seed=int(rng.integers(99)))
        layers = tuple(replace(layer, nbytes=-(-layer.nbytes // 300_000) * 300_000) for layer in problem.layers)
        problem = replace(problem, layers=layers)
        found = milp.solve(milp.ours(problem), [nothing(problem)], "cbc", 30.0, 1e-3)
        assert nbytes(problem, found.choice) <= problem.capacity
        assert found.gap is not None and found.gap < 0.01


def test_fit_takes_away_what_is_too_much() -> None:
    for seed in range(20):
        problem = random_problem(np.random.default_rng(seed), 3, 5)
        everything = Choice(tuple(len(layer.nbytes) - 1 for layer in problem.layers), (True,) * 3, True)
        for tables in (milp.ours(problem), milp.paper(problem)):
            fitted = milp.fit(tables, everything)
            assert tables.taken(fitted) <= problem.capacity and np.isfinite(tables.value(fitted))
            filled = milp.refill(tables, fitted)
            assert tables.taken(filled) <= problem.capacity and tables.value(filled) <= tables.value(fitted)


def test_no_layers_hot_neurons_cost_more_than_they_bring() -> None:
    problem = real_problem(16, 40, 1024, 0.3, True, sync=1e-4)
    choice = solved(problem, milp.ours(problem), gap=1e-4).choice
    now = seconds(problem, choice)
    for number in range(16):
        without = replace(choice, hot=choice.hot[:number] + (0,) + choice.hot[number + 1 :])
        assert seconds(problem, without) >= now * (1 - 1e-4)


@pytest.mark.parametrize("sync", [1e-4, 4e-4])
def test_beats_greedy_and_the_paper_where_hand_overs_are_dear(sync: float) -> None:
    problem = real_problem(32, 20, 4096, 0.4, True, sync=sync)
    known = [nothing(problem), baselines.naive(problem), baselines.greedy(problem)]
    paper = solved(problem, milp.paper(problem), gap=1e-3).choice
    ours = milp.solve(milp.ours(problem), known, "cbc", 30.0, 1e-3).choice
    assert seconds(problem, ours) < 0.95 * min(seconds(problem, other) for other in (*known, paper))


def test_the_papers_constraint() -> None:
    problem = real_problem(8, 20, 2048, 0.3, True, sync=1e-5)
    least = milp.least_groups(problem)
    assert max(least) > 1
    for layer, groups in zip(problem.layers, least, strict=True):
        saved = layer.cold[0] - layer.cold - layer.hot
        assert saved[groups] >= problem.sync > saved[groups - 1]
    hot = solved(problem, milp.paper(problem)).choice.hot
    assert all(k == 0 or k >= groups for k, groups in zip(hot, least, strict=True)) and any(hot)


def test_layers_are_whole_and_the_last_ones() -> None:
    problem = real_problem(8, 20, 2048, 0.5, True)
    choice = baselines.naive(problem)
    whole = [k > 0 for k in choice.hot]
    assert set(choice.hot) == {0, 20} and list(choice.attention) == whole == sorted(whole) and not choice.head
    first = whole.index(True)
    left = problem.capacity - nbytes(problem, choice)
    assert left < problem.layers[first - 1].nbytes[-1] + problem.layers[first - 1].attention.nbytes
    assert baselines.naive(replace(problem, capacity=2**60)).head


def test_greedy_takes_the_best_for_its_bytes() -> None:
    problem = real_problem(4, 100, 1024, 0.2, True)
    choice = baselines.greedy(problem)
    left = problem.capacity - nbytes(problem, choice)
    taken, refused = [], []
    for layer, k in zip(problem.layers, choice.hot, strict=True):
        rates = (layer.cold[:-1] - layer.cold[1:] - np.diff(layer.hot)) / np.diff(layer.nbytes)
        taken += rates[:k].tolist()
        refused += rates[k : k + 1].tolist()
    assert min(taken) >= max(refused) * (1 - 1e-9) and left < np.diff(problem.layers[0].nbytes).max()


def test_no_hot_neurons_of_one_group_only() -> None:
    """A layer of one group has no door for some of its neurons."""
    layer = make_layer(np.ones(64), 100.0, 1000, 10, 1e7, 1e9, 1e8, 0.0)
    problem = Problem((layer,), layer.attention, 1.0, 7000, 0.0, 64)
    assert solved(problem, milp.ours(problem)).choice == Choice((1,), (False,), False)


@pytest.mark.parametrize("outcome", ["NO_SOLUTION_FOUND", "ERROR", "INFEASIBLE"])
def test_a_relaxation_without_a_value(monkeypatch: pytest.MonkeyPatch, outcome: str) -> None:
    import mip

    monkeypatch.setattr(milp, "_optimize", lambda model, limit: mip.OptimizationStatus[outcome])
    problem = real_problem(4, 10, 1024, 0.35, True)
    greedy = baselines.greedy(problem)
    found = milp.solve(milp.ours(problem), [nothing(problem), greedy], "cbc")
    assert found.status == "no solution" and found.bound is None and found.gap is None
    assert seconds(problem, found.choice) <= seconds(problem, greedy)
    assert nbytes(problem, found.choice) <= problem.capacity


def test_a_failing_solver_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def optimize(self, **_: Any) -> None:
            raise RuntimeError("it\nbroke")

    with pytest.raises(HotcoldError, match="the solver failed: it broke; try the other one"):
        milp._optimize(Model(), 1.0)


def test_out_of_time_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mip

    optimize = milp._optimize

    def cut_short(program: Any, limit: float) -> Any:
        optimize(program, limit)
        return mip.OptimizationStatus.FEASIBLE

    monkeypatch.setattr(milp, "_optimize", cut_short)
    placed = placement.place(model, 500_000, hardware=MACHINE, reserve=0, n_threads=1)
    assert placed.status == "time-out" and placed.gap is not None
    assert placed.notes == ("the solver ran out of time after 30 s: the best solution found is used",)
    monkeypatch.setattr(milp, "_optimize", lambda program, limit: mip.OptimizationStatus.NO_SOLUTION_FOUND)
    placed = placement.place(model, 500_000, hardware=MACHINE, reserve=0, n_threads=1, time_limit=0.5)
    assert placed.status == "no solution" and placed.gap is None and not placed.placement.empty
    assert placed.notes == ("the solver ran out of time after 0.5 s: it found none, so a greedy one is used",)


# From a file


def made(path: Path, sparsity: str = "auto", **options: Any) -> costs.Costs:
    settings: dict[str, Any] = {"capacity": 10**6, "n_ctx": 64, "threads": 2, "sparsity": sparsity} | options
    with GGUFFile(path) as file:
        config = ModelConfig.from_gguf(file)
        section = find_section(file, config)
        try:
            return costs.costs(file, config, section, MACHINE, **settings)
        finally:
            if section is not None:
                section.close()


def driver_bytes(nbytes: int) -> int:
    """What the driver takes for an array."""
    unit = 2**21 if nbytes > 2**20 else 512
    return (nbytes + unit - 1) // unit * unit


def on_gpu(kind: str, n: int, k: int) -> int:
    """Bytes of an actual packed matrix."""
    size = GGMLType[kind].type_size * k // GGMLType[kind].block_size
    return sum(driver_bytes(array.nbytes) for array in repack.pack(kind, np.zeros((n, size), np.uint8), k))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q5_1"])
def test_bytes_are_those_of_packed_arrays(tiny_model: Make, kind: str) -> None:
    path = tiny_model(**(SIZES | {"qtype": kind, "types": {"token_embd.weight": "F16", "output.weight": "Q8_0"}}))
    problem = made(path, "exact").problem
    down = kind if kind in ("F32", "F16") else "Q8_0"
    for k, n in enumerate([0, 64, 128, 192, 224]):
        wanted = 2 * on_gpu(kind, n, 64) + on_gpu(down, n, 64) + 512 if n else 0
        assert problem.layers[1].nbytes[k] == wanted
    kv = vram.kv_bytes(ModelConfig.from_gguf(GGUFFile(path)), 64)
    attention = 2 * on_gpu(kind, 64, 64) + 2 * on_gpu(kind, 32, 64) + 512 + 2 * driver_bytes(kv // 2)
    assert problem.layers[1].attention.nbytes == attention
    assert problem.head.nbytes == on_gpu("Q8_0", 300, 64) + driver_bytes(4 * 64)
    matrix = costs.Matrix(GGMLType[kind], 96, 64)
    rows = np.array([0, 1, 95])
    assert (matrix.on_gpu(rows) == [on_gpu(kind, int(n), 64) for n in rows]).all()


def test_a_dense_models_whole_layer_has_ffn_down_as_it_is(tiny_model: Make) -> None:
    path = tiny_model(n_layer=1, n_embd=64, n_ff=224, qtype="Q4_0")
    found = made(path)
    layer, row = found.problem.layers[0], 64 // 32
    assert found.mode == "dense" and found.note == "" and (layer.order == np.arange(224)).all()
    assert layer.nbytes[-1] == 2 * on_gpu("Q4_0", 224, 64) + on_gpu("Q4_0", 64, 224) + 512
    assert layer.nbytes[-2] == 2 * on_gpu("Q4_0", 192, 64) + on_gpu("Q8_0", 192, 64) + 512
    # the CPU too: ffn_down of a whole layer, rows of Q8_0 of one that is split
    assert layer.cold[0] == pytest.approx((2 * 224 * 18 * row + 64 * 18 * 7) / 1e9)
    assert layer.cold[1] == pytest.approx(160 * (2 * 18 + 34) * row / 1e9)
    assert layer.cold[-1] == layer.hot[0] == layer.nbytes[0] == 0
    attention = (2 * 64 + 2 * 32) * 18 * row
    kv = 64 * 2 * (16 + 16) * 2
    assert layer.attention.cpu == pytest.approx((attention + kv) / 1e9)
    dense = layer.cold[0] + layer.attention.cpu + 300 * 18 * row / 1e9
    assert found.dense_cpu == pytest.approx(dense)
    assert seconds(found.problem, nothing(found.problem)) == pytest.approx(dense)


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_a_bypass_is_read_always_by_who_computes_the_rest(tiny_model: Make, mode: str) -> None:
    """Beside the same model without one."""
    options = SIZES | {"qtype": "Q4_0", "types": {f"blk.{layer}.ffn_bypass.weight": "Q8_0" for layer in range(3)}}
    plain, found = (made(tiny_model(**options, bypass=bypass), mode) for bypass in (False, True))
    size = 64 * 64 // 32 * 34
    on_cpu = size / MACHINE.cpu_bandwidth(2)
    on_device = repack.packed_bytes("Q8_0", 64, 64) / MACHINE.gpu_read + MACHINE.launch
    for one, two in zip(plain.problem.layers, found.problem.layers, strict=True):
        taken = on_gpu("Q8_0", 64, 64) + driver_bytes(4 * 64)
        assert (two.nbytes - one.nbytes).tolist() == [0, 0, 0, 0, taken]
        np.testing.assert_allclose(two.cold - one.cold, [on_cpu] * 4 + [0], rtol=1e-6, atol=1e-15)
        np.testing.assert_allclose(two.hot - one.hot, [0] * 4 + [on_device], rtol=1e-6, atol=1e-15)
        np.testing.assert_allclose((two.mapped - one.mapped)[1:], [on_device] * 3 + [0], rtol=1e-6, atol=1e-15)
        assert two.attention == one.attention and two.impact == one.impact
    assert found.dense_cpu - plain.dense_cpu == pytest.approx(3 * on_cpu)
    # what the GPU may have to compute of a split layer too is counted where it may
    mapped = made(tiny_model(**options, bypass=True), mode, mapped=True).problem.layers[0]
    assert (mapped.nbytes - plain.problem.layers[0].nbytes).tolist() == [0, taken, taken, taken, taken]
    tables = milp.ours(found.problem)
    best = solved(found.problem, tables)
    assert tables.value(best.choice) == pytest.approx(brute_force(found.problem, tables.value))


def test_times_follow_frequencies(model: Path) -> None:
    freq, found = frequencies().astype(np.float64), made(model, threads=9)
    assert found.mode == "exact" and found.note == "" and found.digest
    for number, layer in enumerate(found.problem.layers):
        assert (np.diff(freq[number][layer.order]) < 0).all()
        hottest = np.sort(freq[number])[::-1]
        for k, n in enumerate([0, 64, 128, 192, 224]):
            assert layer.active[k] == pytest.approx(hottest[:n].sum())
            if n < 224:
                read = 4 * 64 * ((224 - n) + 2 * hottest[n:].sum())  # gates of all, up and down of the active
                assert layer.cold[k] == pytest.approx(read / 3e9)
                assert layer.mapped[k] == pytest.approx(read / 1e10 + 4e-7)
            if n:
                read = 4 * 64 * (n + 2 * hottest[:n].sum())
                assert layer.hot[k] == pytest.approx(read / 1e11 + 4e-7)
    assert found.problem.sync == pytest.approx(2e-6 + 1e-6 + 4 * 64 / 1e10)


def test_predictors_and_thresholds(tiny_model: Make, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_model().read_bytes())
    update_section(path, sections.contents(*sections.PARTS))
    found = made(path, "predict")
    layer, rank = found.problem.layers[1], sections.RANKS[1]
    own = 2 * on_gpu("F32", 64, 64) + on_gpu("Q8_0", 64, 64) + 512
    assert layer.nbytes[1] == own + on_gpu("Q8_0", rank, 64) + on_gpu("Q8_0", 64, rank) + 512
    freq = np.sort(sections.values("blk.1.ffn_act_freq", 0, 96).astype(np.float64))[::-1]
    first, second = 34 * 2 * rank, 34 * rank // 32
    each = 2 * 4 * 64 + 34 * 2
    assert layer.cold[0] == pytest.approx((first + 96 * second + freq.sum() * each) / 1e9)
    assert layer.cold[1] == pytest.approx((first + 32 * second + freq[64:].sum() * each) / 1e9)
    assert layer.hot[2] == pytest.approx((first + 96 * second + freq.sum() * each) / 1e11 + 6e-7)
    assert "counted with the rule 'exact'" in made(path, "threshold=0.75").note


def test_without_a_profile_all_neurons_are_alike(tiny_model: Make) -> None:
    found = made(tiny_model(**SIZES))
    assert found.note == "no profile, so all neurons count as equally active (100%); run `hotcold profile` first"
    assert (found.problem.layers[0].order == np.arange(224)).all() and found.problem.layers[0].active[-1] == 224


# The public function


def placed(model: Path, wanted: str | int = 400_000, **options: Any) -> placement.Placed:
    settings: dict[str, Any] = {"hardware": MACHINE, "reserve": 100_000, "n_threads": 1, "n_ctx": 64}
    return placement.place(model, wanted, **(settings | options))


@pytest.mark.parametrize("wanted", [130_000, 250_000, 400_000, 600_000, 10**7])
@pytest.mark.parametrize("objective", placement.OBJECTIVES)
def test_place(model: Path, wanted: int, objective: str) -> None:
    found = placed(model, wanted, objective=objective)
    one = found.placement
    assert found.used + found.reserve <= wanted
    sizes = sum(layer.ffn_bytes + layer.attention_bytes for layer in found.layers) + found.head_bytes
    assert sizes == found.used
    freq = frequencies()
    for row, ids, on_gpu, layer in zip(freq, one.hot, one.attention, found.layers, strict=True):
        assert ids.dtype == np.int32 and (np.diff(ids) > 0).all() and len(ids) in (0, 64, 128, 192, 224)
        assert set(ids) == set(np.argsort(-row)[: len(ids)]) and layer.hot == len(ids)
        assert on_gpu == (layer.attention_bytes > 0)
    share = sum(row[ids].sum() for row, ids in zip(freq, one.hot, strict=True)) / freq.sum()
    assert found.share == pytest.approx(share, rel=1e-5)
    assert (one.n_ctx, one.budget, one.group, one.cold, one.objective) == (64, wanted, 64, "cpu", objective)
    assert one.hardware == "test, 1 threads" and one.sparsity == "exact"
    assert found.predicted["dense cpu"] <= found.predicted["cpu"]
    if objective == "ours":
        assert found.predicted["ours"] >= max(found.predicted.values()) * (1 - 1e-9)
    if wanted == 10**7 and objective != "greedy":
        assert one.head and all(one.attention) and found.share == 1 and not one.empty


def test_comparison_and_cold(model: Path) -> None:
    found = placed(model, compare=True)
    assert list(found.predicted) == ["dense cpu", "cpu", "layers", "greedy", "ours", "paper"]
    slow = replace(MACHINE, link_bandwidth=1e6)
    assert placed(model, cold="auto", hardware=slow).placement.cold == "cpu"
    fast = replace(MACHINE, link_bandwidth=5e10)
    auto = placed(model, cold="auto", hardware=fast)
    assert auto.placement.cold == "mapped"
    assert auto.predicted["ours"] > placed(model, cold="cpu", hardware=fast).predicted["ours"]
    assert placed(model, cold="mapped", hardware=slow).placement.cold == "mapped"


def test_a_budget_for_nothing_says_so(model: Path) -> None:
    small = placed(model, 100_600)
    assert small.placement.empty and small.used == 0 and small.share == 0
    assert small.notes[0].startswith("nothing is put on the GPU: the budget of 100600 bytes leaves 600 beside")
    assert placed(model, 1).notes[0].startswith("nothing is put on the GPU: the budget of 1 bytes leaves 0")
    far = replace(MACHINE, sync=1.0)
    why = "nothing is put on the GPU: no part that fits 300000 bytes makes a token faster"
    assert placed(model, hardware=far).notes == (why,)


def test_reserve_is_of_the_model(model: Path) -> None:
    found = placed(model, vram.CONTEXT_BYTES + 20 * 2**20, reserve=None)
    with GGUFFile(model) as file:
        config = ModelConfig.from_gguf(file)
    assert found.reserve == vram.CONTEXT_BYTES + vram.work_bytes(config, 64, 512, 128, (), 16)
    assert placement.place(model, "auto", hardware=MACHINE).placement.n_ctx == 256  # as trained


def test_stored_in_the_section(model: Path) -> None:
    found = placed(model)
    update_section(model, placement.contents(found.placement))
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        again = section.placement()
        assert again is not None and section.parts() == ["profile", "placement"]
    for ids, others in zip(again.hot, found.placement.hot, strict=True):
        np.testing.assert_array_equal(ids, others)
    assert replace(again, hot=()) == replace(found.placement, hot=())
    reused = placed(model, reuse=True)
    assert (reused.status, reused.saved, reused.notes) == ("stored", "section", ())
    assert reused.used == found.used and reused.predicted["ours"] == pytest.approx(found.predicted["ours"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"wanted": 399_999}, "its budget is 400000 bytes, not 399999"),
        ({"wanted": 500_000}, "its budget is 400000 bytes, not 500000"),
        ({"n_ctx": 65}, "its n_ctx is '64', not '65'"),
        ({"n_threads": 4}, "its hardware is 'test, 1 threads', not 'test, 4 threads'"),
        ({"hardware": replace(MACHINE, name="other")}, "its hardware is 'test, 1 threads', not 'other, 1 threads'"),
        ({"sparsity": "dense"}, "its sparsity is 'exact', not 'dense'"),
        ({"objective": "paper"}, "its objective is 'ours', not 'paper'"),
        ({"cold": "mapped"}, "its cold is 'cpu', not 'mapped'"),
        ({"reserve": 200_000}, "it takes more than the budget leaves for weights now"),
    ],
)
def test_a_stored_one_that_does_not_fit_is_solved_again(model: Path, change: dict[str, Any], said: str) -> None:
    update_section(model, placement.contents(placed(model).placement))
    found = placed(model, reuse=True, **change)
    assert found.status != "stored"
    assert found.notes == (f"the stored placement does not fit: {said}; solved again",)
    once_more = placed(model, reuse=True, **change)  # kept for the user, and still said
    assert (once_more.status, once_more.saved, once_more.notes) == ("stored", "cache", found.notes)
    assert once_more.used == found.used


def test_a_stored_one_of_another_profile(model: Path) -> None:
    update_section(model, placement.contents(placed(model).placement))
    update_section(model, profile.contents(frequencies(1), 100, "a text", "exact"))
    assert "the model has another profile now" in placed(model, reuse=True).notes[0]
    problem = made(model).problem
    strange = replace(placed(model).placement, hot=tuple(np.arange(64, dtype=np.int32) for _ in range(3)))
    asked = stored.Asked(400_000, 64, "test, 1 threads", "exact", strange.profile, "ours", "auto")
    assert stored.misfit(strange, asked, problem) == "its neurons are not the most active ones of this model"
    assert stored.choice_of(replace(strange, hot=strange.hot[:2]), problem) is None


def test_a_little_more_budget_is_no_reason(model: Path) -> None:
    placed(model, 400_000, reuse=True)
    assert placed(model, 404_000, reuse=True).status == "stored"
    assert placed(model, 420_000, reuse=True).status != "stored"
    placed(model, 10**7, reuse=True)
    assert placed(model, 10**8, reuse=True).status == "stored"  # it has everything already


def test_damaged_and_unwritable_caches(model: Path, home: Path) -> None:
    placed(model, reuse=True)
    (file,) = (home / "placements").iterdir()
    whole = file.read_bytes()
    for data in (b"", b"no archive", whole[: len(whole) // 2]):
        file.write_bytes(data)
        assert placed(model, reuse=True).status == "optimal"
    file.unlink()
    (home / "placements").rmdir()
    (home / "placements").write_text("in the way")
    assert placed(model, reuse=True).status == "optimal"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "fast"}, "objective: got 'fast', wanted one of ours, paper, greedy, layers"),
        ({"cold": "disk"}, "cold: got 'disk', wanted one of cpu, mapped, auto"),
        ({"solver": "glpk"}, "solver: got 'glpk', wanted cbc or highs"),
        ({"time_limit": 0}, "time limit: got 0, wanted seconds, above 0"),
        ({"time_limit": float("nan")}, "time limit: got nan"),
        ({"gap": 1}, "gap: got 1, wanted a share"),
        ({"n_ctx": 0}, "n_ctx"),
        ({"n_threads": 0}, "n_threads"),
        ({"sparsity": "some"}, "sparsity: got 'some'"),
        ({"sparsity": "predict"}, "no predictors"),
        ({"wanted": 2**31}, r"vram budget: got 2147483648 \(2147483648 bytes\), wanted at most 1073741824 bytes"),
    ],
)
def test_bad_arguments(model: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        placed(model, **options)


@pytest.mark.parametrize(
    ("text", "nbytes_"),
    [
        ("8GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("1.5 gib", 3 * 2**29),
        ("7500MB", 7500 * 10**6),
        (".5kib", 512),
        ("123", 123),
        ("123B", 123),
        (123, 123),
        ("70%", 11 * 2**26 * 10),
        ("100%", 16 * 2**30),
        ("auto", 235 * 2**26),
    ],
)
def test_budgets(text: str | int, nbytes_: int) -> None:
    free = 16 * 2**30
    got = budget.resolve(text, free)
    if text == "70%":
        assert got == int(free * 0.7) // 2**26 * 2**26
    else:
        assert got == nbytes_


@pytest.mark.parametrize(
    "text", ["", "8", "8 G", "GiB", "-1", "0", "1.5", "1e9", "8GiB!", "0%", "101%", "nan", "inf", "auto1", "٣GiB",
             "9" * 50, -5, 0, 1.5, True, None, "8 GiB 2", "1..5GB"]
)  # fmt: skip
def test_malformed_budgets(text: Any) -> None:
    if text == "8":  # bytes, however few
        assert budget.parse(text) == ("bytes", 8)
        return
    with pytest.raises(ParameterError, match="vram budget: got .*, wanted bytes, a size such as 8GiB") as error:
        budget.parse(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_budgets_of_what_nobody_knows() -> None:
    assert budget.resolve("1GiB", None) == 2**30
    for text in ("auto", "50%"):
        with pytest.raises(ParameterError, match="nobody says how much memory is free; give it in bytes"):
            budget.resolve(text, None)
    assert budget.resolve("50%", 1000) == 500
    with pytest.raises(ParameterError, match="wanted at most 1000 bytes, which are free on X"):
        budget.resolve(1001, 1000, "X")


def test_a_placement_of_attention_alone_is_stored(model: Path) -> None:
    one = replace(placed(model).placement, hot=(np.zeros(0, np.int32),) * 3, attention=(False, True, False), head=False)
    assert not one.empty and placement.contents(one).tensors == []
    update_section(model, placement.contents(one))
    with GGUFFile(model) as file, find_section(file) as section:  # type: ignore[union-attr]
        again = section.placement()
    assert again is not None and again.attention == one.attention and [len(ids) for ids in again.hot] == [0, 0, 0]


def test_tensors_of_types_that_no_kernel_computes(tiny_model: Make) -> None:
    with pytest.raises(HotcoldError, match="output.weight has type I8, which hotcold does not compute on a GPU"):
        with GGUFFile(tiny_model()) as file:
            config = ModelConfig.from_gguf(file)
            info = file.tensors["output.weight"]
            file.tensors["output.weight"] = replace(info, type=GGMLType.I8)
            costs.costs(file, config, None, MACHINE, capacity=1, n_ctx=1, threads=1, sparsity="auto")


def test_contents_are_little_endian(model: Path) -> None:
    found: Contents = placement.contents(placed(model).placement)
    for tensor in found.tensors:
        assert isinstance(tensor, SectionTensor) and tensor.type == GGMLType.I32
        assert tensor.data().nbytes == tensor.nbytes
