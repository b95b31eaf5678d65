"""The placement as a mixed-integer program for python-mip, in a form whose relaxation is nearly integral.

A token's way through the layers is a path: it enters a layer on one side, crosses to where attention is (at a cost if
that is the other side), and leaves by one of three doors: no neuron hot, some, all. The usual form has a[l, g], how
much of group g is hot, y[l], whether a layer is split, x[d] for dense parts, and a row a[l, g] <= y[l] for each group.
Here the crossings are x[d], the doors y[l], and behind the door "some" there are weights u[k] >= 0 of the numbers k of
hot groups, which add up to it: a[l, g] is the sum of u[k] over k > g, and a[l, g] <= y[l] follows. That takes 10 rows a
layer instead of hundreds, and the relaxation is tighter. As a layer's time is convex in k, at most two neighbouring
u[k] are not 0: k is rounded down, and what that leaves of the budget is filled again.

Equal layers can be swapped, which costs a solver hours. It is told how many layers have attention on the GPU, how many
have no hot neurons, and how often the way leaves the CPU, as integers of their own: branching on those decides what
swaps leave open. The last is at least 1: all on the CPU is known from the start, and costs no less than the best.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats.errors import HotcoldError, ParameterError, UnsupportedError
from .problem import Choice, Problem

SOLVERS = ("cbc", "highs")
_INTEGRAL = 500  # numbers of hot groups, up to which every one is a variable of its own that is 0 or 1
_WHOLE_SECONDS = 10.0
_SCALE = 1000.0


@dataclass(frozen=True)
class Tables:
    """An objective, to be made least, and what it is subject to.

    cost, nbytes: by layer, [2, G + 1]: by where attention is (1 for the GPU) and hot groups; infinite: not allowed.
    head, head_bytes: of the output on the CPU and on the GPU. crossing: cost of every change of sides between layers.
    """

    cost: tuple[NDArray[np.float64], ...]
    nbytes: tuple[NDArray[np.int64], ...]
    head: tuple[float, float]
    head_bytes: int
    crossing: float
    capacity: int

    def value(self, choice: Choice) -> float:
        """The objective."""
        total, unit = self.head[choice.head], False
        for cost, k, on_gpu in zip(self.cost, choice.hot, choice.attention, strict=True):
            total += float(cost[int(on_gpu), k]) + self.crossing * (unit != on_gpu)
            unit = k > 0
        return total + self.crossing * (unit != choice.head)

    def taken(self, choice: Choice) -> int:
        """Bytes on the GPU."""
        pairs = zip(self.nbytes, choice.hot, choice.attention, strict=True)
        return sum(int(size[int(on_gpu), k]) for size, k, on_gpu in pairs) + self.head_bytes * choice.head


def least_groups(problem: Problem) -> list[int]:
    """PowerInfer's C_l: how many groups of a layer must be hot for a hand-over to pay (at most all of them).

    Source: PowerInfer (SOSP 2024), section 6.3.2, with every neuron's time taken by how often it is active.
    """
    least = []
    for layer in problem.layers:
        saved = (layer.cold[0] - layer.cold) - layer.hot
        enough = np.flatnonzero(saved >= problem.sync)
        least.append(max(1, int(enough[0])) if enough.size else len(saved) - 1)
    return least


def ours(problem: Problem, mapped: bool = False) -> Tables:
    """A token's time. Hand-overs are part of it, so no layer gets hot neurons that do not pay for theirs."""
    cost = [
        np.stack([layer.seconds(on_gpu, problem.sync, mapped) + taken for on_gpu, taken in
                  ((False, layer.attention.cpu), (True, layer.attention.gpu))])
        for layer in problem.layers
    ]  # fmt: skip
    head = (problem.head.cpu, problem.head.gpu + problem.sync)
    return _tables(problem, cost, head, problem.sync)


def paper(problem: Problem) -> Tables:
    """PowerInfer's: the most active neurons on the GPU, none or at least C_l of a layer; attention by its bytes."""
    cost = []
    for layer, least in zip(problem.layers, least_groups(problem), strict=True):
        impact = -layer.active
        impact[1:least] = np.inf
        cost.append(np.stack([impact, impact - layer.impact]))
    return _tables(problem, cost, (0.0, -problem.head_impact), 0.0)


def _tables(problem: Problem, cost: list[NDArray[np.float64]], head: tuple[float, float], crossing: float) -> Tables:
    sizes = [np.stack([layer.nbytes, layer.nbytes + layer.attention.nbytes]) for layer in problem.layers]
    return Tables(tuple(cost), tuple(sizes), head, problem.head.nbytes, crossing, problem.capacity)


@dataclass(frozen=True)
class Solved:
    """choice: the best that was found. status: "optimal" (within the gap), "feasible" (whole groups do not come that
    near to the bound), "time-out" or "no solution" in time.

    bound: what no choice is below, None if unknown; gap: relative distance of the choice from it.
    """

    choice: Choice
    status: str
    bound: float | None
    gap: float | None


def solve(
    tables: Tables, known: list[Choice], solver: str = "cbc", time_limit: float = 30.0, gap: float = 1e-3
) -> Solved:
    """The best choice within the capacity. known: feasible ones, of which the best is used if it is not surpassed.

    gap: relative, at which the search ends; time_limit: seconds. Raises ParameterError, UnsupportedError.
    """
    check(solver)
    mip = import_module("mip")
    sizes = np.concatenate([table.ravel() for table in tables.nbytes] + [np.array([tables.head_bytes])])
    if tables.capacity < sizes[sizes > 0].min(initial=np.iinfo(np.int64).max):  # a program without choices
        best = min(known, key=tables.value)
        return Solved(best, "optimal", tables.value(best), 0.0)
    name_of_solver = mip.CBC if solver == "cbc" else mip.HIGHS
    program = _Program(mip, tables, name_of_solver, False)
    first = _attempt(mip, program, tables, known, time_limit, gap)
    if program.integral or first.status != "optimal" or first.gap is None or first.gap <= gap:
        return first
    # Rounding cost more than asked for: once more with whole groups, which takes longer.
    program = _Program(mip, tables, name_of_solver, True)
    second = _attempt(mip, program, tables, [*known, first.choice], min(time_limit, _WHOLE_SECONDS), gap)
    bound = max(one.bound for one in (first, second) if one.bound is not None)
    reached = tables.value(second.choice)
    left = (reached - bound) / max(abs(reached), 1e-30)
    return Solved(second.choice, "optimal" if left <= gap or second.status == "optimal" else "feasible", bound, left)


def _attempt(mip: Any, program: _Program, tables: Tables, known: list[Choice], time_limit: float, gap: float) -> Solved:
    program.model.max_mip_gap = gap / 4  # rounding takes the rest
    program.model.preprocess = 0  # it would put sums in place of the integers that count, on which to branch
    status = _optimize(program.model, time_limit)
    # a relaxation that ran out of time has neither a value nor a bound
    value, bound = program.model.objective_value, program.model.objective_bound
    outcomes = {mip.OptimizationStatus.OPTIMAL: "optimal", mip.OptimizationStatus.FEASIBLE: "time-out"}
    name = outcomes.get(status, "no solution")
    found = list(known)
    if name != "no solution" and value is not None:
        found.append(refill(tables, fit(tables, program.read())))
    best = min(found, key=tables.value)
    best = refill(tables, exchange(tables, best))
    reached = tables.value(best)
    if bound is None or not np.isfinite(bound) or abs(bound) > 1e30:
        return Solved(best, name, None, None)
    low = min(float(bound) / program.scale, reached)
    return Solved(best, name, low, (reached - low) / max(abs(reached), 1e-30))


def check(solver: str) -> None:
    """Raise ParameterError or UnsupportedError unless a solver of that name is installed."""
    if solver not in SOLVERS:
        raise ParameterError(f"solver: got {solver!r:.40}, wanted {' or '.join(SOLVERS)}")
    if find_spec("mip") is None:
        raise UnsupportedError("placing neurons needs python-mip: pip install 'hotcold[cuda]'")
    if solver == "highs" and not (find_spec("highspy") or find_spec("highsbox")):
        raise UnsupportedError("the solver highs is not installed: pip install 'highspy<1.16', or use cbc")
    if solver == "highs" and not import_module("mip.highs").has_highs:
        raise UnsupportedError("python-mip cannot call this version of highs: pip install 'highspy<1.16', or use cbc")


def _optimize(model: Any, time_limit: float) -> Any:
    """Solve in a thread of its own, so that Ctrl-C is heard meanwhile."""
    result: list[Any] = []

    def work() -> None:
        try:
            result.append(model.optimize(max_seconds=time_limit))
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=work, name="hotcold-solver", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if isinstance(result[0], BaseException):
        what = " ".join(str(result[0]).split())
        raise HotcoldError(f"the solver failed: {what}; try the other one") from result[0]
    return result[0]


class _Program:
    """The program, and how to read its solution. whole: numbers of hot groups are 0 or 1 each, not weights."""

    def __init__(self, mip: Any, tables: Tables, solver: str, whole: bool) -> None:
        self.mip, self.tables = mip, tables
        self.model = mip.Model(sense=mip.MINIMIZE, solver_name=solver)
        self.model.verbose = 0
        finite = [np.abs(cost[np.isfinite(cost)]).max() for cost in tables.cost]
        self.scale = _SCALE / max(sum(finite), *map(abs, tables.head), 1e-30)
        self.objective: list[tuple[Any, float]] = []
        self.budget: list[tuple[Any, float]] = []
        columns = [
            [_useful(cost[p], size[p]) for p in (0, 1)] for cost, size in zip(tables.cost, tables.nbytes, strict=True)
        ]
        self.integral = whole or sum(len(each) for pair in columns for each in pair) <= _INTEGRAL
        self.doors: list[dict[tuple[int, int], Any]] = []  # by layer: (attention, 0 none, 1 some, 2 all hot)
        self.weights: list[dict[int, list[tuple[int, Any]]]] = []
        with_attention, without_hot, outward = [], [], []
        arriving: list[list[Any]] = [[], []]  # by side: the doors that lead there; the first way starts on the CPU
        for number in range(len(tables.cost)):
            enter = self._crossings(number == 0, arriving)
            with_attention += [enter[0][1], enter[1][1]]
            arriving = self._layer(number, enter, columns[number])
            without_hot += arriving[0]
            outward += [enter[0][1], *(var for (side, door), var in self.doors[-1].items() if side == 0 and door)]
        last = self._crossings(False, arriving, last=True)
        self.heads = [last[0][1], last[1][1]]
        outward.append(last[0][1])
        for counted, least in ((with_attention, 0), (without_hot, 0), (outward, 1)):
            count = self.model.add_var(var_type="I", lb=least, ub=len(counted))
            self._row([(arc, 1.0) for arc in counted] + [(count, -1.0)], 0.0, "=")
        self._row(self.budget, -_SCALE, "<")
        self.model.objective = mip.minimize(self._expression(self.objective, 0.0))

    def read(self) -> Choice:
        """The solution, with numbers of hot groups rounded down."""
        hot, attention = [], []
        for doors, weights, cost in zip(self.doors, self.weights, self.tables.cost, strict=True):
            side, door = max(doors, key=lambda key: doors[key].x)
            k = (0, 0, cost.shape[1] - 1)[door]
            if door == 1:
                total = sum(var.x for _, var in weights[side]) or 1.0
                mean = sum(k * var.x for k, var in weights[side]) / total + 1e-6
                k = max((k for k, _ in weights[side] if k <= mean), default=weights[side][0][0])
            hot.append(k)
            attention.append(side == 1)
        return Choice(tuple(hot), tuple(attention), sum(arc.x for arc in self.heads) > 0.5)

    def _crossings(self, first: bool, arriving: list[list[Any]], last: bool = False) -> list[list[Any]]:
        """Arcs [from side][to side]: what arrives at a side leaves it. The last ones lead to the output."""
        arcs: list[list[Any]] = [[], []]
        for side in (0, 1):
            for to in (0, 1):
                cost = self.tables.crossing * (side != to) + (self.tables.head[to] if last else 0.0)
                # in front of a layer its doors make them whole
                arcs[side].append(self._var("B" if last else "C", cost, self.tables.head_bytes * to if last else 0))
            terms = [(arc, 1.0) for arc in arcs[side]] + [(door, -1.0) for door in arriving[side]]
            self._row(terms, -1.0 if first and side == 0 else 0.0, "=")
        return arcs

    def _layer(self, number: int, enter: list[list[Any]], columns: list[NDArray[np.int64]]) -> list[list[Any]]:
        cost, nbytes = self.tables.cost[number], self.tables.nbytes[number]
        leaving: list[list[Any]] = [[], []]
        doors: dict[tuple[int, int], Any] = {}
        weights: dict[int, list[tuple[int, Any]]] = {}
        for side in (0, 1):
            for door, k in ((0, 0), (2, -1)):
                if np.isfinite(cost[side, k]):
                    doors[side, door] = self._var("B", cost[side, k], int(nbytes[side, k]))
                    leaving[min(door, 1)].append(doors[side, door])
            if len(columns[side]):
                some = doors[side, 1] = self._var("B")
                leaving[1].append(some)
                kind = "B" if self.integral else "C"
                weights[side] = [(int(k), self._var(kind, cost[side, k], int(nbytes[side, k]))) for k in columns[side]]
                self._row([(var, 1.0) for _, var in weights[side]] + [(some, -1.0)], 0.0, "=")
            mine = [(var, 1.0) for (where, _), var in doors.items() if where == side]
            self._row(mine + [(enter[0][side], -1.0), (enter[1][side], -1.0)], 0.0, "=")
        self.doors.append(doors)
        self.weights.append(weights)
        return leaving

    def _var(self, kind: str, cost: float = 0.0, nbytes: int = 0) -> Any:
        fits = nbytes <= self.tables.capacity
        var = self.model.add_var(var_type=kind, lb=0.0, ub=float(fits))
        if cost:
            self.objective.append((var, cost * self.scale))
        if nbytes and fits:
            self.budget.append((var, nbytes * _SCALE / self.tables.capacity))
        return var

    def _row(self, terms: list[tuple[Any, float]], constant: float, sense: str) -> None:
        self.model.add_constr(self._expression(terms, constant, sense))

    def _expression(self, terms: list[tuple[Any, float]], constant: float, sense: str = "") -> Any:
        return self.mip.LinExpr([var for var, _ in terms], [factor for _, factor in terms], constant, sense)


def _useful(cost: NDArray[np.float64], nbytes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of hot groups, but none and all, of which each costs less than all that take as many bytes or fewer."""
    some = np.arange(1, len(cost) - 1)
    some = some[np.lexsort((cost[some], nbytes[some]))]
    least = np.minimum.accumulate(np.append(np.inf, cost[some]))
    return np.sort(some[cost[some] < least[:-1]])


def fit(tables: Tables, choice: Choice) -> Choice:
    """Take away what costs least for its bytes until the choice fits; a solver's tolerance may exceed the budget."""
    while (excess := tables.taken(choice) - tables.capacity) > 0:
        now = tables.value(choice)
        options = []
        for number in range(len(choice.hot)):
            less = [_with(choice, number, attention=False)] if choice.attention[number] else []
            cost = tables.cost[number][int(choice.attention[number])]
            below = np.flatnonzero(np.isfinite(cost[: choice.hot[number]]))
            less += [_with(choice, number, hot=int(below[-1]))] if below.size else []
            options += less
        if choice.head:
            options.append(replace(choice, head=False))
        here = tables.taken(choice)
        choice = min(options, key=lambda one: (tables.value(one) - now) / max(1, min(excess, here - tables.taken(one))))
    return choice


def refill(tables: Tables, choice: Choice) -> Choice:
    """Give what is left of the budget, and what it improves, to one layer after the other while that helps."""
    for _ in range(4 * len(choice.hot) + 4):
        left, now = tables.capacity - tables.taken(choice), tables.value(choice)
        best, best_value = choice, now
        for number, k in enumerate(choice.hot):
            side = int(choice.attention[number])
            cost, nbytes = tables.cost[number][side], tables.nbytes[number][side]
            fits = np.flatnonzero(nbytes - nbytes[k] <= left)
            # the crossing after the layer depends only on whether anything is hot in it
            for some in (fits[fits == 0], fits[fits > 0]):
                if some.size:
                    option = _with(choice, number, hot=int(some[np.argmin(cost[some])]))
                    if (value := tables.value(option)) < best_value:
                        best, best_value = option, value
        if best_value >= now - 1e-12 * abs(now):
            return choice
        choice = best
    return choice


def exchange(tables: Tables, choice: Choice) -> Choice:
    """Take groups from one layer and give another what that leaves, as long as the two together gain.

    Only numbers above 0, where the crossings stay. Rounding costs most in models of few layers and large groups.
    """
    hot = list(choice.hot)
    costs, sizes, cheapest = [], [], []
    for number, side in enumerate(choice.attention):
        cost, nbytes = tables.cost[number][int(side)][1:], tables.nbytes[number][int(side)][1:]
        order = np.argsort(nbytes, kind="stable")
        least = np.minimum.accumulate(cost[order])
        which = order[np.maximum.accumulate(np.where(cost[order] <= least, np.arange(len(order)), 0))]
        costs.append(cost)
        sizes.append(nbytes)
        cheapest.append((nbytes[order], least, which))
    movable = [number for number, k in enumerate(hot) if k]
    for _ in range(8 * len(hot)):
        left = tables.capacity - tables.taken(replace(choice, hot=tuple(hot)))
        gain, move = 0.0, None
        for one in movable:
            own = hot[one] - 1
            delta, room = costs[one] - costs[one][own], sizes[one][own] - sizes[one] + left
            for other in movable:
                if other != one:
                    steps, least, which = cheapest[other]
                    at = np.searchsorted(steps, sizes[other][hot[other] - 1] + room, side="right") - 1
                    total = np.where(at >= 0, delta + least[at] - costs[other][hot[other] - 1], np.inf)
                    best = int(np.argmin(total))
                    if total[best] < gain - 1e-12:
                        gain, move = float(total[best]), (one, best + 1, other, int(which[at[best]]) + 1)
        if move is None:
            break
        hot[move[0]], hot[move[2]] = move[1], move[3]
    return replace(choice, hot=tuple(hot))


def _with(choice: Choice, number: int, hot: int | None = None, attention: bool | None = None) -> Choice:
    groups, sides = list(choice.hot), list(choice.attention)
    groups[number] = groups[number] if hot is None else hot
    sides[number] = sides[number] if attention is None else attention
    return Choice(tuple(groups), tuple(sides), choice.head)
