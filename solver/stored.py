"""Placements solved before, in the model's section or kept for the user; none is used where it does not fit."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats.gguf import GGUFFile
from ..formats.section import Placement, Section
from ..formats.section_layout import tensor_hash
from ..runtime import models
from .problem import Choice, Problem, nbytes

SPARE = 0.02  # of a budget that a placement for a smaller one may leave unused


@dataclass(frozen=True)
class Asked:
    """What a placement is wanted for; fields as Placement has them, cold may be "auto"."""

    budget: int
    n_ctx: int
    hardware: str
    sparsity: str
    profile: str
    objective: str
    cold: str


def misfit(placement: Placement, asked: Asked, problem: Problem) -> str | None:
    """Why a placement is not what is asked for, or None."""
    sizes = [len(ids) for ids in placement.hot]
    whole = placement.head and all(placement.attention) and sizes == [len(layer.order) for layer in problem.layers]
    if asked.budget < placement.budget or (asked.budget > placement.budget * (1 + SPARE) and not whole):
        return f"its budget is {placement.budget} bytes, not {asked.budget}"
    for name in ("n_ctx", "hardware", "sparsity", "objective", "cold"):
        got, wanted = getattr(placement, name), getattr(asked, name)
        if got != wanted and (name, wanted) != ("cold", "auto"):
            return f"its {name} is {str(got)!r:.80}, not {str(wanted)!r:.80}"
    if placement.profile != asked.profile:
        return "the model has another profile now"
    choice = choice_of(placement, problem)
    if choice is None:
        return "its neurons are not the most active ones of this model"
    if nbytes(problem, choice) > problem.capacity:
        return "it takes more than the budget leaves for weights now"
    return None


def neurons(problem: Problem, choice: Choice) -> tuple[NDArray[np.int32], ...]:
    """The hot neurons of a choice by layer, sorted."""
    pairs = zip(problem.layers, choice.hot, strict=True)
    return tuple(np.sort(layer.order[: k * problem.group]) for layer, k in pairs)


def choice_of(placement: Placement, problem: Problem) -> Choice | None:
    """A placement in terms of a problem; None if its hot neurons are not the most active groups."""
    groups = []
    if len(placement.hot) != len(problem.layers) or len(placement.attention) != len(problem.layers):
        return None
    for ids, layer in zip(placement.hot, problem.layers, strict=True):
        k = -(-len(ids) // problem.group)
        if not np.array_equal(ids, np.sort(layer.order[: k * problem.group])):
            return None
        groups.append(k)
    return Choice(tuple(groups), placement.attention, placement.head)


def find(model: GGUFFile, section: Section | None, asked: Asked, problem: Problem) -> tuple[Placement | None, str, str]:
    """A stored placement that fits, or None; where it was; and why the section's does not fit, if it has one."""
    reason = ""
    in_section = section.placement() if section else None
    if in_section is not None:
        why = misfit(in_section, asked, problem)
        if why is None:
            return in_section, "section", ""
        reason = f"the stored placement does not fit: {why}; solved again"
    kept = _load(_file(model, asked.hardware, asked.objective))
    if kept is not None and misfit(kept, asked, problem) is None:
        return kept, "cache", reason
    return None, "", reason


def keep(model: GGUFFile, placement: Placement) -> None:
    """Keep a placement for the user, if the folder can be written."""
    path = _file(model, placement.hardware, placement.objective)
    fields = {key: value for key, value in asdict(placement).items() if key != "hot"}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                lengths = np.array([len(ids) for ids in placement.hot], np.int64)
                hot = np.concatenate([np.zeros(0, np.int32), *placement.hot])
                np.savez(file, lengths=lengths, hot=hot, fields=np.array(json.dumps(fields)))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _load(path: Path) -> Placement | None:
    """What was kept, or None if there is nothing that is whole."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            lengths, hot = kept["lengths"], kept["hot"].astype(np.int32)
            fields: dict[str, Any] = json.loads(str(kept["fields"]))
        ids = tuple(np.split(hot, np.cumsum(lengths)[:-1]))
        return Placement(hot=ids, **(fields | {"attention": tuple(map(bool, fields["attention"]))}))
    except Exception:  # a damaged file may be anything; it is only a copy of what can be solved again
        return None


def _file(model: GGUFFile, hardware: str, objective: str) -> Path:
    """One file for each model, machine and objective."""
    digest = hashlib.sha256(f"{tensor_hash(model)} {model.path.resolve()} {hardware} {objective}".encode())
    return models.home() / "placements" / f"{digest.hexdigest()[:24]}.npz"
