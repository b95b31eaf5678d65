"""Which neurons and which dense parts of a model a GPU holds, for a budget of its memory and the machine at hand.

The objective "ours" is a token's time (problem.py has the formulas), "paper" is PowerInfer's. Both are solved by
milp.py; "greedy" and "layers" need no solver and are there to be compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..formats.config import ModelConfig
from ..formats.errors import ParameterError
from ..formats.gguf import GGUFFile
from ..formats.section import Placement, Section, find_section
from ..formats.section_file import Contents, SectionTensor
from ..formats.types import GGMLType
from ..runtime import models, vram
from ..runtime.cpu.threads import default_threads
from ..runtime.sampler import check_int
from ..runtime.sparsity import Sparsity
from . import baselines, milp, stored
from .budget import resolve
from .costs import Costs, costs
from .hardware import Hardware, this_machine
from .problem import Problem, nbytes, nothing, seconds

OBJECTIVES = ("ours", "paper", "greedy", "layers")
COLD = ("cpu", "mapped", "auto")
USUAL_CONTEXT = 4096  # tokens of KV cache, unless more are asked for
Progress = Callable[[str], None]


@dataclass(frozen=True)
class LayerPlaced:
    """A layer on the GPU: neurons, bytes of their weights, bytes of attention with its KV cache (0: on the CPU)."""

    hot: int
    ffn_bytes: int
    attention_bytes: int


@dataclass(frozen=True)
class Placed:
    """A placement and what is expected of it.

    predicted: tokens a second by name: "dense cpu", "cpu", "layers", "greedy", and those of the objectives that were
    solved. share: expected part of the activations that are computed on the GPU. reserve: bytes of the budget for the
    CUDA context and work buffers; used: bytes of weights and KV cache. status: "optimal" (within the gap), "feasible"
    (whole groups do not come that near to the bound), "time-out" (the best solution found), "no solution" (found in
    time: a greedy one), "stored". gap: relative, None if unknown.
    seconds: solving. notes: lines that the user should see. saved: where a stored one was found, or "". expert: neurons
    of one expert, 0 without experts.
    """

    placement: Placement
    predicted: Mapping[str, float]
    share: float
    layers: tuple[LayerPlaced, ...]
    head_bytes: int
    reserve: int
    used: int
    status: str
    gap: float | None
    seconds: float
    hardware: Hardware
    notes: tuple[str, ...]
    saved: str = ""
    expert: int = 0


def place(
    model: str | Path,
    budget: str | int = "auto",
    *,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    sparsity: str = "auto",
    hardware: Hardware | str | Path | None = None,
    objective: str = "ours",
    cold: str = "cpu",
    solver: str = "cbc",
    time_limit: float = 30.0,
    gap: float = 1e-3,
    reserve: int | None = None,
    reuse: bool = False,
    compare: bool = False,
    progress: Progress | None = None,
) -> Placed:
    """Decide what of a model lies on the GPU.

    budget: of GPU memory for everything: 8GiB, 70% (of what is free), auto or bytes. n_ctx: tokens of KV cache [the
    model's, at most 4096]. sparsity: the mode that it will run in. hardware: a machine or its JSON file [this one,
    measured]. objective: ours, paper, greedy or layers. cold: who computes the other neurons: the cpu, the GPU out of
    mapped memory, or auto, the faster. solver: cbc or highs; time_limit: seconds for it; gap: relative, at which it
    stops. reserve: bytes of the budget for CUDA context and work buffers. reuse: take a stored placement that fits,
    else keep what is solved for the next time. compare: predict the paper's objective too. progress: called with lines.

    A budget that holds nothing useful gives an empty placement, and the reason among the notes. Raises ParameterError,
    UnsupportedError (no solver installed), FormatError, ModelNotFoundError.
    """
    _check(objective, cold, time_limit, gap)
    if compare or objective in ("ours", "paper"):
        milp.check(solver)
    wanted = Sparsity.parse(sparsity)
    threads = check_int("n_threads", n_threads, 1, 1024) if n_threads is not None else default_threads()
    say = progress or (lambda line: None)
    path = models.resolve(model)
    with GGUFFile(path) as file:
        config = ModelConfig.from_gguf(file)
        tokens = min(USUAL_CONTEXT, config.n_ctx_train) if n_ctx is None else check_int("n_ctx", n_ctx, 1, 2**30)
        section = find_section(file, config)
        expert = config.expert_neurons if config.n_expert else 0
        try:
            machine, missing = _machine(hardware, threads, say)
            total = resolve(budget, machine.gpu_free, machine.name)
            if reserve is None:
                reserve = _reserve(config, section, tokens, machine)
            found = costs(
                file, config, section, machine,
                capacity=total - reserve, n_ctx=tokens, threads=threads, sparsity=str(wanted), mapped=cold != "cpu",
            )  # fmt: skip
            asked = stored.Asked(
                budget=total, n_ctx=tokens, hardware=f"{machine.name}, {threads} threads", sparsity=found.mode,
                profile=found.digest, objective=objective, cold=cold,
            )  # fmt: skip
            notes = [note for note in (missing, found.note) if note]
            if reuse:
                kept, where, reason = stored.find(file, section, asked, found.problem)
                if reason:
                    notes.append(reason)
                if kept is not None:
                    placed = _report(kept, found, machine, reserve, "stored", None, 0.0, notes, {}, where)
                    return replace(placed, expert=expert)
            say("solving the placement")
            placed = _solve(found, machine, asked, reserve, solver, time_limit, gap, compare, notes)
            if reuse:
                stored.keep(file, placed.placement)
            return replace(placed, expert=expert)
        finally:
            if section is not None:
                section.close()


def contents(placement: Placement) -> Contents:
    """A placement as a part of a section."""
    metadata = {
        "attention": "".join("01"[on_gpu] for on_gpu in placement.attention),
        "head": int(placement.head),
        "n_ctx": placement.n_ctx,
        "budget": placement.budget,
        "group": placement.group,
        "cold": placement.cold,
        "objective": placement.objective,
        "hardware": placement.hardware,
        "sparsity": placement.sparsity,
        "profile": placement.profile,
    }
    tensors = [
        SectionTensor(f"blk.{layer}.ffn_hot_idx", ids.shape, GGMLType.I32, partial(_little, ids))
        for layer, ids in enumerate(placement.hot)
        if len(ids)
    ]
    return Contents({f"hotcold.placement.{key}": value for key, value in metadata.items()}, tensors)


def _little(ids: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(ids, "<i4").view(np.uint8)


def _check(objective: str, cold: str, time_limit: float, gap: float) -> None:
    for name, got, choices in (("objective", objective, OBJECTIVES), ("cold", cold, COLD)):
        if got not in choices:
            raise ParameterError(f"{name}: got {got!r:.40}, wanted one of {', '.join(choices)}")
    if not 0 < time_limit <= 1e6:
        raise ParameterError(f"time limit: got {time_limit}, wanted seconds, above 0")
    if not 0 <= gap < 1:
        raise ParameterError(f"gap: got {gap}, wanted a share from 0 to 1, such as 0.001")


def _machine(hardware: Hardware | str | Path | None, threads: int, say: Progress) -> tuple[Hardware, str]:
    """The machine, and why the GPU's figures are made up, or ""."""
    if isinstance(hardware, Hardware):
        return hardware, ""
    if hardware is not None:
        return Hardware.load(Path(hardware)), ""
    machine, missing = this_machine(threads, say)
    if missing:
        missing += "; planned for one that reads 500 GB/s, as no --hardware file describes another"
    return machine, missing or ""


def _reserve(config: ModelConfig, section: Section | None, n_ctx: int, machine: Hardware) -> int:
    from ..runtime.engine import MAX_OUTPUTS, MICRO_BATCH

    predictors = section.predictors() if section else None
    ranks = predictors.ranks if predictors else ()
    work = vram.work_bytes(config, n_ctx, MICRO_BATCH, MAX_OUTPUTS, ranks, machine.processors)
    return vram.CONTEXT_BYTES + work


def _solve(
    found: Costs,
    machine: Hardware,
    asked: stored.Asked,
    reserve: int,
    solver: str,
    time_limit: float,
    gap: float,
    compare: bool,
    notes: list[str],
) -> Placed:
    problem = found.problem
    known = {"cpu": nothing(problem), "layers": baselines.naive(problem), "greedy": baselines.greedy(problem)}
    started = time.perf_counter()
    sides = (False, True) if asked.cold == "auto" else (asked.cold == "mapped",)
    results: dict[str, tuple[milp.Solved, bool]] = {}
    for objective in ("paper", "ours"):  # ours begins with what the other found
        if objective != asked.objective and not compare:
            continue
        options = []
        for mapped in sides:
            tables = milp.ours(problem, mapped) if objective == "ours" else milp.paper(problem)
            allowed = [choice for choice in known.values() if np.isfinite(tables.value(choice))]
            options.append((milp.solve(tables, allowed, solver, time_limit, gap), mapped))
        known[objective] = options[0][0].choice
        results[objective] = min(options, key=lambda option: seconds(problem, option[0].choice, option[1]))
    taken = time.perf_counter() - started
    predicted = {name: 1 / seconds(problem, known[name]) for name in ("cpu", "layers", "greedy")}
    for name in sorted(results):  # ours, paper
        predicted[name] = 1 / seconds(problem, results[name][0].choice, results[name][1])
    if asked.objective in results:
        solved, mapped = results[asked.objective]
    else:
        mapped = sides[0]
        solved = milp.Solved(known[asked.objective], "greedy", None, None)
    if solved.status in ("time-out", "no solution"):
        best = "the best solution found" if solved.status == "time-out" else "it found none, so a greedy one"
        notes.append(f"the solver ran out of time after {time_limit:g} s: {best} is used")
    choice = solved.choice
    placement = Placement(
        hot=stored.neurons(problem, choice),
        attention=choice.attention,
        head=choice.head,
        n_ctx=asked.n_ctx,
        budget=asked.budget,
        group=problem.group,
        cold="mapped" if mapped else "cpu",
        objective=asked.objective,
        hardware=asked.hardware,
        sparsity=asked.sparsity,
        profile=asked.profile,
    )
    if placement.empty:
        notes.append(_why_empty(problem, asked.budget, reserve))
    return _report(placement, found, machine, reserve, solved.status, solved.gap, taken, notes, predicted, "")


def _why_empty(problem: Problem, budget: int, reserve: int) -> str:
    """Why nothing is on the GPU."""
    sizes = [problem.head.nbytes]
    for layer in problem.layers:
        sizes += [layer.attention.nbytes, int(layer.nbytes[1])]
    rest = budget - reserve
    if rest < min(sizes):
        return (
            f"nothing is put on the GPU: the budget of {budget} bytes leaves {max(0, rest)} beside the CUDA context "
            f"and work buffers ({reserve}), and the smallest part takes {min(sizes)}"
        )
    return f"nothing is put on the GPU: no part that fits {rest} bytes makes a token faster"


def _report(
    placement: Placement,
    found: Costs,
    machine: Hardware,
    reserve: int,
    status: str,
    gap: float | None,
    taken: float,
    notes: list[str],
    predicted: dict[str, float],
    saved: str,
) -> Placed:
    problem = found.problem
    choice = stored.choice_of(placement, problem)
    assert choice is not None
    layers = tuple(
        LayerPlaced(len(ids), int(layer.nbytes[k]), layer.attention.nbytes if on_gpu else 0)
        for layer, ids, k, on_gpu in zip(problem.layers, placement.hot, choice.hot, choice.attention, strict=True)
    )
    used = nbytes(problem, choice)
    assert used <= problem.capacity
    hot = sum(float(layer.active[k]) for layer, k in zip(problem.layers, choice.hot, strict=True))
    every = sum(float(layer.active[-1]) for layer in problem.layers)
    predicted = {"dense cpu": 1 / found.dense_cpu} | predicted
    predicted.setdefault("cpu", 1 / seconds(problem, nothing(problem)))
    predicted.setdefault(placement.objective, 1 / seconds(problem, choice, placement.cold == "mapped"))
    return Placed(
        placement,
        predicted,
        hot / every if every else 0.0,
        layers,
        problem.head.nbytes if placement.head else 0,
        reserve,
        used,
        status,
        gap,
        taken,
        machine,
        tuple(notes),
        saved,
    )
