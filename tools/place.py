"""`hotcold place`: which neurons and layers a GPU holds within a budget, printed by layer and kept in the section."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console, offline, options
from .console import human_bytes, note, printable

if TYPE_CHECKING:
    from ..solver.placement import Placed

Budget = Annotated[
    str,
    typer.Option("--vram-budget", "-b", metavar="B", help="GPU memory for all: 8GiB, 70% (of the free), auto, bytes."),
]
HardwareFile = Annotated[
    Path | None, typer.Option("--hardware", metavar="FILE.json", help="Plan for the machine that this file describes.")
]
SaveHardware = Annotated[
    Path | None, typer.Option("--save-hardware", metavar="FILE.json", help="Write what was measured of the machine.")
]
Objective = Annotated[
    str, typer.Option("--objective", metavar="NAME", help="ours (a token's time), paper, greedy or layers.")
]
Cold = Annotated[
    str, typer.Option("--cold", metavar="WHO", help="Computes the other neurons: cpu, mapped (the GPU), auto.")
]
Solver = Annotated[str, typer.Option("--solver", metavar="NAME", help="cbc, or highs if it is installed.")]
TimeLimit = Annotated[float, typer.Option("--time-limit", metavar="S", help="Seconds for the solver.")]
Gap = Annotated[float, typer.Option("--gap", metavar="G", help="Relative distance from the optimum to stop at.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw what of each layer is where.")]

LABELS = {
    "dense cpu": "CPU alone, dense",
    "cpu": "CPU alone",
    "layers": "whole layers on the GPU",
    "greedy": "greedy",
    "paper": "PowerInfer's objective",
    "ours": "ours",
}


def place(
    model: options.Model,
    budget: Budget = "auto",
    ctx: options.Context = None,
    sparsity: options.Sparsity = "auto",
    hardware: HardwareFile = None,
    save_hardware: SaveHardware = None,
    objective: Objective = "ours",
    cold: Cold = "cpu",
    solver: Solver = "cbc",
    time_limit: TimeLimit = 30.0,
    gap: Gap = 1e-3,
    plot: Plot = None,
    sidecar: offline.Sidecar = False,
    dry_run: offline.DryRun = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Decide what of a model a GPU holds, within a budget of its memory."""
    from ..solver import placement

    path = console.find_model(model)
    status = console.StatusLine()
    try:
        placed = placement.place(
            path,
            budget,
            n_ctx=ctx or None,
            n_threads=threads,
            sparsity=sparsity,
            hardware=hardware,
            objective=objective,
            cold=cold,
            solver=solver,
            time_limit=time_limit,
            gap=gap,
            compare=True,
            progress=status,
        )
    finally:
        status.clear()
    for line in placed.notes:
        note(printable(line))
    if as_json:
        print(json.dumps(describe(placed), ensure_ascii=False, allow_nan=False))
    else:
        _print(placed)
    if save_hardware is not None:
        placed.hardware.save(save_hardware)
        note(f"the machine's figures are in {save_hardware}")
    if plot is not None:
        from ..solver.plot import plot_placement

        plot_placement(placed, path.stem, plot)
        note(f"drawn to {plot}")
    if not dry_run:
        _save(path, placed, sidecar)


def describe(placed: Placed) -> dict[str, Any]:
    """Everything that is shown, as JSON-able data; sizes in bytes, speeds in tokens a second."""
    one = placed.placement
    return {
        "budget": one.budget,
        "reserve": placed.reserve,
        "used": placed.used,
        "n_ctx": one.n_ctx,
        "sparsity": one.sparsity,
        "objective": one.objective,
        "cold": one.cold,
        "hardware": one.hardware,
        "head": one.head,
        "head_bytes": placed.head_bytes,
        "active_share": placed.share,
        "status": placed.status,
        "gap": placed.gap,
        "seconds": placed.seconds,
        "tokens_per_second": dict(placed.predicted),
        "notes": list(placed.notes),
        "layers": [
            {"hot": layer.hot, "ffn_bytes": layer.ffn_bytes, "attention_bytes": layer.attention_bytes}
            for layer in placed.layers
        ],
    }


def _print(placed: Placed) -> None:
    one = placed.placement
    print(f"{printable(one.hardware)}; sparsity {one.sparsity}, context {one.n_ctx}")
    what = "hot experts" if placed.expert else "hot neurons"
    print(f"{'layer':>5}  {what:>11}  {'on the GPU':>10}  attention")
    for number, layer in enumerate(placed.layers):
        where = f"GPU, {human_bytes(layer.attention_bytes)}" if layer.attention_bytes else "CPU"
        hot = layer.hot // placed.expert if placed.expert else layer.hot
        print(f"{number:>5}  {hot:>11}  {human_bytes(layer.ffn_bytes):>10}  {where}")
    print(f"output on the {f'GPU, {human_bytes(placed.head_bytes)}' if one.head else 'CPU'}")
    print(
        f"budget {human_bytes(one.budget)}: {human_bytes(placed.used)} weights and KV cache, "
        f"{human_bytes(placed.reserve)} CUDA context and work buffers, "
        f"{human_bytes(max(0, one.budget - placed.used - placed.reserve))} left"
    )
    others = "the CPU" if one.cold == "cpu" else "the GPU, out of mapped memory"
    print(f"{placed.share:.1%} of the activations are expected on the GPU; {others} computes the others")
    print("predicted tokens a second")
    for name, label in LABELS.items():
        if name in placed.predicted:
            chosen = "  <- this placement" if name == one.objective else ""
            print(f"  {label:<24} {placed.predicted[name]:>8.1f}{chosen}")
    gap = "unknown" if placed.gap is None else f"{placed.gap:.3%}"
    print(f"{one.objective}: {placed.status}, gap {gap}, {placed.seconds:.1f} s")


def _save(path: Path, placed: Placed, sidecar: bool) -> None:
    from ..formats.gguf import GGUFFile
    from ..formats.section import find_section
    from ..formats.section_file import Contents, update_section
    from ..solver import placement

    if not placed.placement.empty:
        offline.save(path, placement.contents(placed.placement), sidecar)
        return
    with GGUFFile(path) as model:
        section = find_section(model)
        stored = section is not None and section.placement() is not None
        if section is not None:
            section.close()
    if stored:
        update_section(path, Contents({}, []), sidecar=sidecar, drop=["placement"])
        note("the placement that was stored is taken out")
