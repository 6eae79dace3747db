"""A heat-map of the layers' fluctuation over a training run. Needs matplotlib (`[viz]` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .report import Report

UNMEASURED = "0.82"  # grey
STEADY_TO_OSCILLATING = "RdBu_r"  # blue to red: told apart by the colour-blind, too
MARK = 0.6  # diameter of a fully amplified cell's dot, in units of the cell's shorter side


def heatmap(
    history: Sequence[Report], path: str | PathLike[str], *, title: str | None = None
) -> None:
    """Writes fluctuation per layer (rows, first layer on top) and epoch (columns) to `path`.

    `history` holds one `Amplifier.report()` for each epoch of training, in order. Colour is the
    layer's fluctuation, ln(F/R): 0 (white) is what uncorrelated gradients give, below it they
    agree from step to step, above it they oscillate; grey was not measured. A dot marks a layer
    that was amplified, its area is the share of the steps since the report before. The file's
    format follows the ending of `path`.

    Raises ValueError if `history` is empty or without a layer, ImportError without matplotlib.
    """
    if not history or not any(report.layers for report in history):
        raise ValueError("history: holds no layer; append amplifier.report() after every epoch")
    names, fluctuation, share = _tables(history)
    figure, scale, axes = _canvas(len(names), len(history))
    _colours(scale, axes, fluctuation)
    axes.set_yticks(range(len(names)), [name or "(root)" for name in names])
    axes.set_xlabel("epoch")
    _marks(figure, axes, share, title)
    figure.savefig(path, dpi=150)


def _tables(history: Sequence[Report]) -> tuple[list[str], Tensor, Tensor]:
    """Layer names, and [layers, reports] of fluctuation (NaN: none) and of amplified shares."""
    rows: dict[str, int] = {}
    for report in history:
        for layer in report.layers:
            rows.setdefault(layer.name, len(rows))
    fluctuation = torch.full((len(rows), len(history)), torch.nan, dtype=torch.float64)
    share = torch.zeros_like(fluctuation)
    counted_before, amplified_before = 0, [0] * len(rows)
    for column, report in enumerate(history):
        counted = report.steps - report.skipped_steps
        steps = counted - counted_before
        counted_before = counted
        for layer in report.layers:
            row = rows[layer.name]
            fluctuation[row, column] = layer.fluctuation
            new = layer.amplified_steps - amplified_before[row]
            amplified_before[row] = layer.amplified_steps
            share[row, column] = new / steps if steps > 0 else 0.0
    return list(rows), fluctuation, share.clamp(0.0, 1.0)


def _canvas(rows: int, columns: int) -> tuple[Figure, Axes, Axes]:
    """A figure large enough for every row's name to be read, its colour scale and its map."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            "gradamp_fast.plot needs matplotlib: pip install 'gradamp_fast[viz]'"
        ) from error
    row = min(max(14.0 / rows, 0.1), 0.24)  # inches
    column = min(max(12.0 / columns, 0.06), 0.32)
    height, width = max(rows * row, 1.0), max(columns * column, 4.0)
    figure = Figure(figsize=(width + 2.0, height + 2.0), layout=ConstrainedLayoutEngine(hspace=0))
    FigureCanvasAgg(figure)
    scale, axes = figure.subplots(2, 1, height_ratios=(0.15, height))
    axes.tick_params("y", labelsize=min(9.0, 0.75 * 72 * row), length=0)
    axes.tick_params("x", labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[:].set_visible(False)
    return figure, scale, axes


def _colours(scale: Axes, axes: Axes, fluctuation: Tensor) -> None:
    """The cells and their scale, symmetric about 0; the 2 % most extreme share the last colour."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    size = fluctuation[fluctuation.isfinite()].abs()
    limit = max(size.quantile(0.98).item(), 1e-3) if len(size) else 1.0
    # the darkest tenth at either end would swallow the dots
    shades = colormaps[STEADY_TO_OSCILLATING](torch.linspace(0.1, 0.9, 256).numpy())
    colours = ListedColormap(shades).with_extremes(bad=UNMEASURED)
    image = axes.imshow(
        fluctuation.where(fluctuation.isfinite(), torch.nan).numpy(),
        cmap=colours,
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        interpolation="nearest",
    )
    beyond = "both" if (size > limit).any() else "neither"
    bar = axes.figure.colorbar(
        image, cax=scale, orientation="horizontal", extend=beyond, extendfrac=0.02
    )
    bar.set_label("fluctuation: below 0 steady, above 0 oscillating", fontsize=9)
    bar.ax.tick_params(labelsize=9)
    bar.outline.set_visible(False)


def _marks(figure: Figure, axes: Axes, share: Tensor, title: str | None) -> None:
    """A dot in every amplified cell, and the legend."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            color="black",
            markeredgecolor="white",
            label="amplified (area: share of the epoch's steps)",
        ),
        Patch(color=UNMEASURED, label="not measured"),
    ]
    figure.legend(
        handles=handles,
        title=title,
        loc="outside upper left",
        alignment="left",
        ncols=2,
        frameon=False,
        fontsize=9,
        title_fontsize=12,
        handletextpad=0.4,
        borderpad=0,
    )
    figure.draw_without_rendering()
    rows, columns = share.shape
    extent = axes.get_window_extent()
    diameter = MARK * min(extent.width / columns, extent.height / rows) / figure.dpi * 72  # points
    row, column = share.nonzero(as_tuple=True)
    area = diameter**2 * share[row, column]
    axes.scatter(
        column.numpy(),
        row.numpy(),
        area.numpy(),
        "black",
        edgecolors="white",
        linewidths=diameter / 12,
    )
