"""Heat-maps of what was measured in each layer over a training run. Needs matplotlib (`[viz]`)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from operator import attrgetter
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from ._checks import one_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .report import Report

Shown = Literal["fluctuation", "direction", "variance", "temporal_variance", "factor"]

UNMEASURED = "0.85"  # grey
DPI = 150
ROWS = 300  # more layers than that are shown by block
NAME = 60  # characters of a row's name; a longer one loses its middle
THIN = 5.0  # pixels: in rows below that a frame would hide the colour
LABELS = {
    "fluctuation": "fluctuation, ln(F/R): below 0 steady, above 0 oscillating",
    "direction": "direction: cosine between a step's gradient and the mean before it",
    "variance": "variance across the layer's elements",
    "temporal_variance": "variance over time of the layer's mean element",
    "factor": "what the layer's gradients are multiplied by",
}
LOGARITHMIC = ("variance", "temporal_variance", "factor")


def heatmap(
    history: Sequence[Report],
    path: str | PathLike[str],
    *,
    show: Shown | None = None,
    title: str | None = None,
    all_layers: bool = False,
) -> None:
    """Writes a map of layers (rows, first layer on top) against time (columns) to `path`.

    Args:
        history: reports in order: what `Amplifier.record()` returns, or a list of
            `Amplifier.report()`, one for each epoch or every so many steps.
        path: the file; its ending says the format (.png, .svg, .pdf).
        show: what the colour is: `"fluctuation"` and `"direction"` around a white 0,
            `"variance"`, `"temporal_variance"` and `"factor"` on a logarithmic scale. None: what
            the amplifier decided by, `"fluctuation"` if that was random.
        title: a line on top.
        all_layers: a row for every layer. Otherwise more than 300 layers are shown by block: the
            deepest level of the modules' paths that has at most 300, or runs of neighbours where
            that level has few.

    Grey was not measured. A frame marks a cell whose layer was amplified since the report
    before; it is the thicker, the larger the share of those steps (in rows too thin for a frame:
    a bar, the longer). With `grow=True` a frame on a map of factors marks a layer that has
    settled. A block's cell is the mean of its layers that were measured, of their
    logarithms on a logarithmic scale. Time is the epoch where the reports are of consecutive
    epochs, else the step.

    Raises ValueError if `history` is empty or without a layer, ImportError without matplotlib.
    """
    reports = list(history)
    if not any(report.layers for report in reports):
        raise ValueError("history: holds no layer; call amplifier.record() after every epoch")
    measure = reports[-1].measure
    shown = show or ("fluctuation" if measure == "random" else measure)
    one_of("show", shown, get_args(Shown))
    names, values, share = _tables(reports, shown)
    settles = shown == "factor" and reports[-1].grow
    label = LABELS[shown]
    if len(names) > ROWS and not all_layers:
        layers = len(names)
        names, rows = _blocks(names)
        values = _mean(values.log(), rows).exp() if shown in LOGARITHMIC else _mean(values, rows)
        share = _mean(share, rows)
        label += f"\n{layers:,} layers in {len(names)} rows, each the mean of its layers"
    with _plain_text():
        figure, scale, axes = _canvas(len(names), len(reports))
        _colours(scale, axes, values, shown)
        scale.set_xlabel(label, fontsize=9)
        _time(axes, reports)
        thin = figure.get_figheight() * DPI / len(names) < THIN
        mark = (
            "settled"
            if settles
            else f"amplified ({'longer' if thin else 'thicker'}: in more of the steps)"
        )
        _legend(figure, title, share, values, thin, mark)
        _lay_out(figure, axes, names)
        (_bars if thin else _frames)(axes, share)
        figure.savefig(path, dpi=DPI)


def _tables(reports: Sequence[Report], shown: str) -> tuple[list[str], Tensor, Tensor]:
    """Layer names, and [layers, reports] of values (NaN: none) and of amplified shares.

    Of growing factors in the place of the shares: 1 where a layer has settled.
    """
    settles = shown == "factor" and reports[-1].grow
    names = [list(map(attrgetter("name"), report.layers)) for report in reports]
    rows = {name: row for row, name in enumerate(dict.fromkeys(chain.from_iterable(names)))}
    values = torch.full((len(rows), len(reports)), torch.nan, dtype=torch.float64, device="cpu")
    share = torch.zeros_like(values)
    counted_before, amplified_before = 0, torch.zeros_like(values[:, 0])
    for column, report in enumerate(reports):
        counted = report.steps - report.skipped_steps
        steps, counted_before = counted - counted_before, counted
        here = _numbers(map(rows.__getitem__, names[column])).long()
        shown_now, measured, amplified = (
            _numbers(map(attrgetter(field), report.layers))
            for field in (shown, "steps", "amplified_steps")
        )
        values[here, column] = shown_now.where(measured > 0, torch.nan)
        if settles:
            share[here, column] = _numbers(layer.settled for layer in report.layers)
        elif steps > 0:
            share[here, column] = (amplified - amplified_before[here]) / steps
        amplified_before[here] = amplified
    return [name or "(root)" for name in rows], values, share.clamp(0.0, 1.0)


def _numbers(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64, device="cpu")


def _blocks(names: Sequence[str]) -> tuple[list[str], Tensor]:
    """Names of at most `ROWS` blocks of layers, and the block of each layer: [layers]."""
    paths = [tuple(name.split(".")) for name in names]
    depth = 0
    while len({path[: depth + 1] for path in paths}) <= ROWS:
        depth += 1
    parents: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    if len({path[:depth] for path in paths}) >= ROWS / 10:
        parents[()] = list(dict.fromkeys(path[:depth] for path in paths))
    else:  # the level says too little and the next one too much
        depth += 1
        for path in dict.fromkeys(path[:depth] for path in paths):
            parents.setdefault(path[: depth - 1], []).append(path)
    together = -(-sum(map(len, parents.values())) // (ROWS - len(parents) + 1))
    block_of: dict[tuple[str, ...], str] = {}
    for children in parents.values():
        for start in range(0, len(children), together):
            run = children[start : start + together]
            name = ".".join(run[0])
            block_of |= dict.fromkeys(run, name if len(run) == 1 else f"{name} … {run[-1][-1]}")
    blocks = [block_of[path[:depth]] for path in paths]
    sizes = Counter(blocks)  # in the order of the blocks' first layers
    row = {name: index for index, name in enumerate(sizes)}
    return (
        [f"{name} ({size})" if size > 1 else name for name, size in sizes.items()],
        _numbers([row[block] for block in blocks]).long(),
    )


def _mean(table: Tensor, rows: Tensor) -> Tensor:
    """Means of the finite elements of [layers, reports] in each block: [blocks, reports]."""
    known = table.isfinite()
    blocks = int(rows.max()) + 1
    sums = table.new_zeros((blocks, table.shape[1])).index_add_(0, rows, table.where(known, 0.0))
    return sums / torch.zeros_like(sums).index_add_(0, rows, known.double())


def _plain_text() -> AbstractContextManager[None]:
    """Texts are not handed to LaTeX, whatever the user's style says: a name is no markup."""
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ImportError(
            "gradamp_fast.plot needs matplotlib: pip install 'gradamp_fast[viz]'"
        ) from error
    return rc_context(
        {
            "text.usetex": False,
            "figure.autolayout": False,
            "figure.constrained_layout.use": False,
        }
    )


def _canvas(rows: int, columns: int) -> tuple[Figure, Axes, Axes]:
    """A figure large enough for every row's name to be read, its colour scale and its map."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    row = min(max(14.0 / rows, 0.1), 0.24)  # inches
    if rows > ROWS:  # one or two pixels, in a picture of less than 2**16
        row = min(max(30.0 / rows, min(2 / DPI, 60.0 / rows), 1 / DPI), 400.0 / rows)
    column = min(max(12.0 / columns, 0.06), 0.32)
    height, width = max(rows * row, 1.0), max(columns * column, 4.0)
    figure = Figure(
        figsize=(width + 2.0, height + 2.0), dpi=DPI, layout=ConstrainedLayoutEngine(hspace=0)
    )
    FigureCanvasAgg(figure)
    scale, axes = figure.subplots(2, 1, height_ratios=(0.15, height))
    axes.tick_params("y", labelsize=min(9.0, max(0.75 * 72 * row, 5.4)), left=False)
    axes.tick_params("x", labelsize=9)
    axes.spines[:].set_visible(False)
    return figure, scale, axes


def _colours(scale: Axes, axes: Axes, values: Tensor, shown: str) -> None:
    """The cells and their scale; the most extreme 2 % share the last colours."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm, Normalize

    logarithmic = shown in LOGARITHMIC
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
    shades = colormaps[name](torch.linspace(*ends, 256, device="cpu").numpy())
    rows, columns = values.shape
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    image = axes.pcolormesh(
        range(columns),
        range(rows),
        values.numpy(),
        cmap=ListedColormap(shades).with_extremes(bad=UNMEASURED),
        norm=norm,
        shading="nearest",
        rasterized=True,
    )
    arrows = {(False, False): "neither", (True, False): "min", (False, True): "max"}
    beyond = arrows.get((bool((known < low).any()), bool((known > high).any())), "both")
    bar = axes.figure.colorbar(
        image, cax=scale, orientation="horizontal", extend=beyond, extendfrac=0.02
    )
    bar.ax.tick_params(labelsize=9)
    bar.outline.set_visible(False)


def _spread(values: Tensor, low: float, high: float, otherwise: tuple[float, float]) -> Tensor:
    """Two quantiles that differ: fp64 [2]."""
    if len(values) == 0:
        return _numbers(otherwise)
    ends = values.quantile(_numbers([low, high]))
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


def _legend(
    figure: Figure, title: str | None, share: Tensor, values: Tensor, thin: bool, mark: str
) -> None:
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if (share > 0).any():
        handles.append(
            Patch(
                facecolor="black" if thin else "white",
                edgecolor="black",
                linewidth=1.5,
                label=mark,
            )
        )
    if not values.isfinite().all():
        handles.append(Patch(color=UNMEASURED, label="not measured"))
    if handles or title:
        legend = figure.legend(
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
        legend.get_title().set(parse_math=False)


def _lay_out(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """Makes room for the rows' names, then writes as many of them as there is room for.

    The longest ones stand for all while the layout is found: it measures every name many times.
    """
    names = ["".join(c if c.isprintable() else "?" for c in name) for name in names]
    names = [n if len(n) <= NAME else f"{n[: NAME // 2 - 1]}…{n[-NAME // 2 :]}" for n in names]
    longest = sorted(names, key=len)[-20:]
    axes.set_yticks(range(len(longest)), longest, parse_math=False)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine(None)  # the cells have their size, and all is drawn once
    row = axes.get_window_extent().height / len(names)
    apart = max(math.ceil(0.09 * figure.dpi / row), -(-len(names) // ROWS))
    axes.set_yticks(range(0, len(names), apart), names[::apart], parse_math=False)


def _frames(axes: Axes, share: Tensor) -> None:
    """A frame inside every amplified cell; its thickness goes with the share."""
    rows, columns = share.shape
    extent = axes.get_window_extent()
    width, height = extent.width / columns, extent.height / rows  # pixels
    point = axes.figure.dpi / 72
    row, column = share.nonzero(as_tuple=True)
    thickest = min(width / 7, height / 7, 1.5 * point)
    thickness = thickest * share[row, column].clamp(min=0.2)
    x, y = 0.5 - (thickness / 2 + 0.5) / width, 0.5 - (thickness / 2 + 0.5) / height
    _rectangles(
        axes, (column - x, row - y, column + x, row + y),
        facecolors="none", edgecolors="black", linewidths=(thickness / point).numpy(),
        joinstyle="miter",
    )  # fmt: skip


def _bars(axes: Axes, share: Tensor) -> None:
    """A bar at the left of every amplified cell, up to a third as long."""
    row, column = share.nonzero(as_tuple=True)
    left = column - 0.5
    edges = (left, row - 0.5, left + share[row, column].clamp(min=0.2) / 3, row + 0.5)
    _rectangles(axes, edges, facecolors="black", linewidths=0, antialiased=False)


def _rectangles(axes: Axes, edges: tuple[Tensor, Tensor, Tensor, Tensor], **style: Any) -> None:
    """One collection, from the left, top, right and bottom edges: [cells] each."""
    from matplotlib.collections import PolyCollection

    left, top, right, bottom = edges
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    vertices = torch.stack([torch.stack(corner, dim=1) for corner in corners], dim=1)
    cells: Any = vertices.numpy()  # a list would be taken one by one, which takes longer
    axes.add_collection(PolyCollection(cells, **style), autolim=False)
