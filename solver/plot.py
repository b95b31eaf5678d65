"""Pictures of a profile, of a placement and of quality over density (need matplotlib, the extra `plot`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..formats.errors import ParameterError, StorageError, UnsupportedError
from ..formats.section_file import check_place
from .profile import MOST, cdf, statistics

if TYPE_CHECKING:
    from .evaluate import Report
    from .placement import Placed

SERIES = {  # colour and marker of what solver.evaluate tells apart
    "dense": ("#4d4d4d", "s"),
    "threshold": ("#dd8452", "v"),
    "exact": ("#4c72b0", "o"),
    "predictors": ("#55a868", "D"),
    "relufied (exact)": ("#4c72b0", "o"),
    "relufied (threshold)": ("#8172b3", "^"),
    "relufied + predictors": ("#55a868", "D"),
}
STEEP = 2.0  # the ratio of perplexities from which on a plot of them is logarithmic
_TICKS = (1.1, 1.2, 1.3, 1.5, 2, 3, 5)  # between 1 and 10 on that
_NEEDED = "--plot needs matplotlib: pip install 'hotcold[plot]'"


def plot_cdf(freq: np.ndarray, title: str, path: Path) -> None:
    """Draw a line a layer, coloured by depth, and the whole model's; freq: float32 [n_layer, n_ff]. Writes `path`.

    The ending of the name chooses the format (.png, .svg, .pdf). Source of the form: PowerInfer (SOSP 2024), figure 5.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(_NEEDED) from None
    figure = Figure(figsize=(7, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    colours, scale = colormaps["viridis"], Normalize(0, max(1, len(freq) - 1))
    for layer, row in enumerate(freq):
        x, y = cdf(row)
        axes.plot(x * 100, y * 100, color=colours(scale(layer)), linewidth=0.9, alpha=0.8)
    x, y = cdf(freq.ravel())
    skew = statistics(freq.ravel()).skew * 100
    axes.plot(x * 100, y * 100, color="black", linewidth=2.2, label="all layers together")
    axes.plot([0, 100], [0, 100], color="grey", linewidth=1, linestyle=":", label="all neurons alike")
    axes.plot([0, skew, skew], [MOST * 100, MOST * 100, 0], color="crimson", linewidth=1, linestyle="--")
    place = (skew + 2, 8) if skew < 55 else (skew - 2, 8)
    axes.annotate(
        f"{skew:.0f} % of the neurons give\n{MOST * 100:.0f} % of the activations",
        place, color="crimson", fontsize=9, ha="left" if skew < 55 else "right",
    )  # fmt: skip
    axes.set(xlim=(0, 100), ylim=(0, 100.5), xlabel="neurons, most active first (%)", ylabel="share of activations (%)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", frameon=False, fontsize=9, bbox_to_anchor=(1, 0.2))
    figure.colorbar(ScalarMappable(scale, colours), ax=axes, label="layer", pad=0.02)
    _write(figure, path)


def plot_placement(placed: Placed, name: str, path: Path) -> None:
    """Draw how many neurons of each layer are hot and where attention is, and the predicted speeds. Writes `path`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(_NEEDED) from None
    one, numbers = placed.placement, np.arange(len(placed.layers))
    figure = Figure(figsize=(10, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    left.bar(numbers, [layer.hot for layer in placed.layers], width=0.85, color="#c44e52", label="hot neurons (GPU)")
    top = max(1, max(layer.hot for layer in placed.layers))
    for on_gpu, colour, label in ((True, "#c44e52", "attention on GPU"), (False, "#4c72b0", "attention on CPU")):
        at = [number for number in numbers if one.attention[number] == on_gpu]
        left.scatter(at, [-0.05 * top] * len(at), marker="s", s=14, color=colour, label=label)
    left.set(xlabel="layer", ylabel="neurons on the GPU", ylim=(-0.1 * top, 1.2 * top))
    left.legend(loc="upper center", ncols=3, frameon=False, fontsize=8)
    left.set_title(
        f"{name}: {placed.used / 2**30:.2f} GiB of weights and KV cache, {placed.share:.0%} of the activations on the "
        f"GPU, output on the {'GPU' if one.head else 'CPU'}", fontsize=9,
    )  # fmt: skip
    colours = ["#c44e52" if each == one.objective else "#8c8c8c" for each in placed.predicted]
    bars = right.barh(list(placed.predicted), list(placed.predicted.values()), color=colours)
    right.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    right.margins(x=0.3)
    right.invert_yaxis()
    right.set_title("predicted tokens a second", fontsize=9)
    _write(figure, path)


def check(path: Path) -> None:
    """Raise what would keep a picture from being written, before what it is to show is measured."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise UnsupportedError(_NEEDED) from None
    formats = FigureCanvasBase.get_supported_filetypes()
    if (ending := path.suffix.removeprefix(".").lower()) not in formats:
        raise ParameterError(f"--plot: got {ending or 'no ending'!r:.20}, wanted one of {', '.join(sorted(formats))}")
    check_place(path)


def plot_quality(report: Report, path: Path) -> None:
    """Draw perplexity, as a multiple of the reference's, over the density: a panel a text, a line a series of SERIES.

    Bars are standard errors. Writes `path`, in the format of its ending.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(_NEEDED) from None
    names = [text.name for text in report.texts]
    figure = Figure(figsize=(1 + 4 * len(names), 4.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    most = max(score.ratio for row in report.rows for score in row.scores.values())
    for axes, name in zip(panels, names, strict=True):
        axes.axhline(1, color="#4d4d4d", linewidth=0.8, linestyle=":")
        for series, (colour, marker) in SERIES.items():
            found = sorted(
                (row.scores[name].density * 100, row.scores[name].ratio, row.scores[name].ratio_error)
                for row in report.rows
                if row.series == series
            )
            if found:
                x, y, errors = zip(*found, strict=True)
                axes.errorbar(
                    x, y, errors, color=colour, marker=marker, markersize=6, linewidth=1.2, capsize=3, label=series
                )
        axes.set_title(name, fontsize=10)
        axes.set(xlim=(0, 103), xlabel="active neurons (%)")
        if most > STEEP:
            ticks = [10**power * tick for power in range(6) for tick in (1, *(_TICKS if not power else (2, 5)))]
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.set_yticks(shown := [tick for tick in ticks if tick <= most], [f"{tick:g}" for tick in shown])
        axes.grid(alpha=0.25)
    reference = report.rows[0]
    panels[0].set_ylabel(f"perplexity, times that of {reference.model.stem}")
    panels[0].legend(frameon=False, fontsize=9)
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path)
    except ValueError as error:  # matplotlib's own line lists the formats
        raise StorageError(f"{path}: {error}") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from None
