"""Heat-maps of what was measured in each layer over a training run. Needs matplotlib (`[viz]`)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from ._checks import one_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .report import Report

Shown = Literal["fluctuation", "direction", "variance", "temporal_variance"]

UNMEASURED = "0.85"  # grey
LABELS = {
    "fluctuation": "fluctuation, ln(F/R): below 0 steady, above 0 oscillating",
    "direction": "direction: cosine between a step's gradient and the mean before it",
    "variance": "variance across the layer's elements",
    "temporal_variance": "variance over time of the layer's mean element",
}


def heatmap(
    history: Sequence[Report],
    path: str | PathLike[str],
    *,
    show: Shown | None = None,
    title: str | None = None,
) -> None:
    """Writes a map of layers (rows, first layer on top) against time (columns) to `path`.

    Args:
        history: reports in order: what `Amplifier.record()` returns, or a list of
            `Amplifier.report()`, one for each epoch or every so many steps.
        path: the file; its ending says the format (.png, .svg, .pdf).
        show: what the colour is: `"fluctuation"` and `"direction"` around a white 0,
            `"variance"` and `"temporal_variance"` on a logarithmic scale. None: what the
            amplifier decided by, `"fluctuation"` if that was random.
        title: a line on top.

    Grey was not measured. A frame marks a cell whose layer was amplified since the report
    before; it is the thicker, the larger the share of those steps. Time is the epoch where the
    reports are of consecutive epochs, else the step.

    Raises ValueError if `history` is empty or without a layer, ImportError without matplotlib.
    """
    reports = list(history)
    if not any(report.layers for report in reports):
        raise ValueError("history: holds no layer; call amplifier.record() after every epoch")
    measure = reports[-1].measure
    shown = show or ("fluctuation" if measure == "random" else measure)
    one_of("show", shown, get_args(Shown))
    names, values, share = _tables(reports, shown)
    figure, scale, axes = _canvas(len(names), len(reports))
    _colours(scale, axes, values, shown)
    axes.set_yticks(range(len(names)), names)
    _time(axes, reports)
    _legend(figure, title, share, values)
    _frames(figure, axes, share)
    figure.savefig(path, dpi=150)


def _tables(reports: Sequence[Report], shown: str) -> tuple[list[str], Tensor, Tensor]:
    """Layer names, and [layers, reports] of values (NaN: none) and of amplified shares."""
    rows: dict[str, int] = {}
    for report in reports:
        for layer in report.layers:
            rows.setdefault(layer.name, len(rows))
    values = torch.full((len(rows), len(reports)), torch.nan, dtype=torch.float64)
    share = torch.zeros_like(values)
    counted_before, amplified_before = 0, [0] * len(rows)
    for column, report in enumerate(reports):
        counted = report.steps - report.skipped_steps
        steps, counted_before = counted - counted_before, counted
        for layer in report.layers:
            row = rows[layer.name]
            if layer.steps:
                values[row, column] = getattr(layer, shown)
            new, amplified_before[row] = (
                layer.amplified_steps - amplified_before[row],
                layer.amplified_steps,
            )
            share[row, column] = new / steps if steps > 0 else 0.0
    return [name or "(root)" for name in rows], values, share.clamp(0.0, 1.0)


def _canvas(rows: int, columns: int) -> tuple[Figure, Axes, Axes]:
    """A figure large enough for every row's name to be read, its colour scale and its map."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
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
    axes.spines[:].set_visible(False)
    return figure, scale, axes


def _colours(scale: Axes, axes: Axes, values: Tensor, shown: str) -> None:
    """The cells and their scale; the most extreme 2 % share the last colours."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm, Normalize

    logarithmic = shown in ("variance", "temporal_variance")
    values = values.where((values > 0) if logarithmic else values.isfinite(), torch.nan)
    known = values[values.isfinite()]
    if logarithmic:
        low, high = _spread(known.log(), 0.01, 0.99, (0.0, 1.0)).exp().tolist()
        norm: Normalize = LogNorm(low, high)
        name, ends = "viridis", (0.3, 1.0)
    else:
        high = _spread(known.abs(), 0.0, 0.98, (0.0, 1.0))[1].item()
        low, norm = -high, Normalize(-high, high)
        name = "RdBu_r" if shown == "fluctuation" else "RdBu"  # red: oscillating, in both
        ends = (0.1, 0.9)
    # without the darkest ends, in which a frame would be lost
    shades = colormaps[name](torch.linspace(*ends, 256).numpy())
    image = axes.imshow(
        values.numpy(),
        cmap=ListedColormap(shades).with_extremes(bad=UNMEASURED),
        norm=norm,
        aspect="auto",
        interpolation="nearest",
    )
    arrows = {(False, False): "neither", (True, False): "min", (False, True): "max"}
    beyond = arrows.get((bool((known < low).any()), bool((known > high).any())), "both")
    bar = axes.figure.colorbar(
        image, cax=scale, orientation="horizontal", extend=beyond, extendfrac=0.02
    )
    bar.set_label(LABELS[shown], fontsize=9)
    bar.ax.tick_params(labelsize=9)
    bar.outline.set_visible(False)


def _spread(values: Tensor, low: float, high: float, otherwise: tuple[float, float]) -> Tensor:
    """Two quantiles that differ: fp64 [2]."""
    if len(values) == 0:
        return torch.tensor(otherwise, dtype=torch.float64)
    ends = values.quantile(torch.tensor([low, high], dtype=torch.float64))
    return torch.stack((ends[0], torch.maximum(ends[1], ends[0] + 1e-3)))


def _time(axes: Axes, reports: Sequence[Report]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    epochs = [report.epoch for report in reports]
    first = epochs[0]
    by_epoch = first is not None and epochs == list(range(first, first + len(epochs)))
    times = epochs if by_epoch else [report.steps for report in reports]

    def label(column: float, position: int | None) -> str:
        return str(times[round(column)]) if 0 <= round(column) < len(times) else ""

    axes.xaxis.set_major_formatter(FuncFormatter(label))
    axes.set_xlabel("epoch" if by_epoch else "step")


def _legend(figure: Figure, title: str | None, share: Tensor, values: Tensor) -> None:
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if (share > 0).any():
        handles.append(
            Patch(
                facecolor="white",
                edgecolor="black",
                linewidth=1.5,
                label="amplified (thicker: in more of the steps)",
            )
        )
    if not values.isfinite().all():
        handles.append(Patch(color=UNMEASURED, label="not measured"))
    if handles or title:
        figure.legend(
            handles=handles,
            title=title,
            loc="outside upper left",
            alignment="left",
            ncols=2,
            frameon=False,
            fontsize=9,
            title_fontsize=12,
            handlelength=1.2,
            handleheight=1.0,
            borderpad=0,
        )


def _frames(figure: Figure, axes: Axes, share: Tensor) -> None:
    """A frame inside every amplified cell; its thickness goes with the share."""
    from matplotlib.collections import PolyCollection

    figure.draw_without_rendering()  # lays out: the cells have their size from here on
    rows, columns = share.shape
    extent = axes.get_window_extent()
    width, height = extent.width / columns, extent.height / rows  # pixels
    point = figure.dpi / 72
    row, column = share.nonzero(as_tuple=True)
    thickest = min(width / 7, height / 7, 1.5 * point)
    thickness = thickest * share[row, column].clamp(min=0.2)
    x, y = 0.5 - (thickness / 2 + 0.5) / width, 0.5 - (thickness / 2 + 0.5) / height
    corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    frames = torch.stack(
        [torch.stack((column + a * x, row + b * y), dim=1) for a, b in corners], dim=1
    )
    axes.add_collection(
        PolyCollection(
            list(frames.numpy()),
            facecolors="none",
            edgecolors="black",
            linewidths=(thickness / point).numpy(),
            joinstyle="miter",
        ),
        autolim=False,
    )
