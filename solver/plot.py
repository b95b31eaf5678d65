"""The activation CDF as a picture, as PowerInfer's paper draws it (needs matplotlib, the extra `plot`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..formats.errors import StorageError, UnsupportedError
from .profile import MOST, cdf, statistics


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
        raise UnsupportedError("--plot needs matplotlib: pip install 'hotcold[plot]'") from None
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
    try:
        figure.savefig(path)
    except ValueError as error:  # matplotlib's own line lists the formats
        raise StorageError(f"{path}: {error}") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from None
