"""Prints how long placements of large models take to solve, how near they come to the bound, and what they are worth.

    python tests/placement_speed.py [--quick] [--solver highs]

Times are of this machine: wall seconds, and CPU seconds of this process, which others' work does not stretch as much.
"""

from __future__ import annotations

import argparse
import time

from placements import real_problem

from hotcold.solver import baselines, milp
from hotcold.solver.problem import nbytes, nothing, seconds

MODELS = {"32 x 172": (32, 172, 4096), "48 x 448": (48, 448, 8192), "80 x 448": (80, 448, 8192)}


def table(solver: str, quick: bool) -> None:
    print(f"{'layers x groups':16s} {'neurons':7s} {'budget':>6s} {'wall s':>7s} {'CPU s':>6s} {'gap':>8s}  status")
    for name, shape in MODELS.items():
        for sparse in (True, False):
            for budget in (0.1, 0.5) if quick else (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97):
                problem = real_problem(*shape, budget, sparse)
                known = [nothing(problem), baselines.greedy(problem), baselines.naive(problem)]
                wall, cpu = time.perf_counter(), time.process_time()
                solved = milp.solve(milp.ours(problem), known, solver, 60.0)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                assert nbytes(problem, solved.choice) <= problem.capacity
                gap = "?" if solved.gap is None else f"{solved.gap:.3%}"
                kind = "sparse" if sparse else "dense"
                times = f"{wall:7.2f} {cpu:6.2f}"
                print(f"{name:16s} {kind:7s} {budget:6.0%} {times} {gap:>8s}  {solved.status}", flush=True)


def worth(solver: str) -> None:
    print(f"\n{'32 x 172, sparse':20s} tokens a second by placement")
    print(f"{'hand-over':>10s} {'budget':>6s} {'CPU':>7s} {'layers':>7s} {'greedy':>7s} {'paper':>7s} {'ours':>7s}")
    for sync in (10e-6, 25e-6, 100e-6, 400e-6):
        for budget in (0.1, 0.2, 0.4, 0.6, 0.8):
            problem = real_problem(*MODELS["32 x 172"], budget, True, sync)
            known = [nothing(problem), baselines.naive(problem), baselines.greedy(problem)]
            by_paper = milp.solve(milp.paper(problem), known[:1], solver).choice
            found = [*known, by_paper, milp.solve(milp.ours(problem), known, solver).choice]
            speeds = " ".join(f"{1 / seconds(problem, choice):7.1f}" for choice in found)
            print(f"{sync * 1e6:7.0f} us {budget:6.0%} {speeds}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two budgets")
    parser.add_argument("--solver", default="cbc", choices=milp.SOLVERS)
    chosen = parser.parse_args()
    table(chosen.solver, chosen.quick)
    worth(chosen.solver)
