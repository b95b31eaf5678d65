"""Decoding speed of the sparse modes over the share of active neurons, as a table and a picture.

    python tests/sparse_curve.py FOLDER [--type Q4_0] [--densities 5,10,20,30] [--threads 1,2] [--plot curve.png]

Synthetic ReLU models, 4096 wide with 8 layers, are looked for in FOLDER and made where missing (1.3 GB each in Q4_0).
Each is measured against its own dense engine in turns (sparse_speed.py); beside the speeds is what they would be if a
token took as long as its bytes take the dense engine. The picture needs matplotlib (the extra `plot`).
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

from sparse_speed import LIMIT, Result, measure

from hotcold.solver.synthetic import TYPES, Shape, write_model
from hotcold.solver.synthetic_relu import ReluWeights

MODES = ["exact", "predict"]
Curve = dict[int, dict[int, dict[str, Result]]]  # threads -> percent active -> mode


def model(folder: Path, kind: str, percent: int) -> Path:
    """The model of a density, made if it is not there."""
    path = folder / f"relu-{kind.lower()}-{percent:02}.gguf"
    if not path.exists():
        shape = Shape(TYPES[kind], 4096, 11008, 8, 32, 32, 32000, 0, 0)
        write_model(path, shape, 0, None, ReluWeights(shape, percent / 100, 0.8, 1024, 0))
    if hasattr(os, "posix_fadvise"):  # a file just written lies in small pages; it comes back in large ones
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def table(curve: Curve) -> str:
    """A Markdown table."""
    lines = [
        "| threads | active | mode | ms a token | dense | MB read | dense | time, of dense | bytes, of dense | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for n_threads, by_density in curve.items():
        for percent, found in by_density.items():
            dense = found["dense"]
            for mode in MODES:
                r = found[mode]
                lines.append(
                    f"| {n_threads} | {percent}% | {mode} | {1e3 * r.seconds:.2f} | {1e3 * dense.seconds:.2f} | "
                    f"{r.nbytes / 1e6:.0f} | {dense.nbytes / 1e6:.0f} | {r.time_ratio:.3f} | {r.byte_ratio:.3f} | "
                    f"{r.over:.3f}{'' if r.over <= LIMIT else ' (over)'} |"
                )
    return "\n".join(lines)


def plot(curve: Curve, path: Path) -> None:
    """Tokens a second over density, one panel a number of threads, and the lines of speed by bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(curve), 4.2), layout="constrained")
    for place, (n_threads, by_density) in enumerate(curve.items()):
        axes = figure.add_subplot(1, len(curve), place + 1)
        percents = sorted(by_density)
        dense = statistics.median(by_density[percent]["dense"].seconds for percent in percents)
        axes.axhline(1 / dense, color="grey", linewidth=1, label="dense")
        for mode, colour in zip(MODES, ("tab:blue", "tab:orange"), strict=True):
            found = [by_density[percent][mode] for percent in percents]
            axes.plot(percents, [1 / (dense * r.time_ratio) for r in found], "o-", color=colour, label=mode)
            by_bytes = [1 / (dense * r.byte_ratio) for r in found]
            axes.plot(percents, by_bytes, "--", color=colour, linewidth=1, label=f"{mode}, by its bytes")
        axes.set(xlabel="active neurons, %", ylabel="tokens a second", xlim=(0, max(percents) + 2), ylim=(0, None))
        axes.set_title(f"{n_threads} thread{'s' if n_threads > 1 else ''}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--type", default="Q4_0")
    parser.add_argument("--densities", default="5,10,20,30", help="percent of the neurons")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    threads = [int(n) for n in options.threads.split(",")]
    curve: Curve = {n: {} for n in threads}
    for percent in map(int, options.densities.split(",")):
        path = model(options.folder, options.type, percent)
        for n in threads:
            curve[n][percent] = measure(path, MODES, n, options.tokens, options.repetitions)
    print(table(curve))
    if options.plot:
        plot(curve, options.plot)


if __name__ == "__main__":
    main()
