"""The two figures: achieved bandwidth against a copy's, and speed-up over each baseline."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bench.report import (
    BASELINES,
    Comparison,
    bandwidth,
    headlines,
    machine_line,
    main_clock,
)
from bench.results import Results
from bench.shapes import TITLES

COLOURS = {"cuda": "#0072b2", "triton": "#d55e00", "cpu": "#0072b2"}  # told apart by everyone
BASELINE_COLOURS = ("#999999", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#f0e442")
DTYPES = ("fp32", "bf16")
CLOCKS = {
    "wall": "from an idle device until done",
    "graph": "replayed as a CUDA graph",
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes ``<device>-bandwidth.png`` and ``<device>-speedup.png``, as far as measured."""
    device = results.machine["device"]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in (("bandwidth", _bandwidth(results)), ("speedup", _speedup(results))):
        if figure is not None:
            path = folder / f"{device}-{name}.png"
            figure.savefig(path, dpi=150)
            written.append(path)
    return written


def _figure(width: float, height: float, caption: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.supxlabel(caption, fontsize=7, color="0.35", wrap=True)
    return figure


def _bandwidth(results: Results) -> Figure | None:
    """GB/s by model, smallest first; the roof over each bar is a copy measured in the same run."""
    cases = [c for c in headlines(results, main_clock(results)) if "copy" in c.others]
    if not cases:
        return None
    rows = list(dict.fromkeys(c.row.model for c in sorted(cases, key=lambda c: c.row.elements)))
    kinds = list(dict.fromkeys((c.row.subject, c.row.dtype) for c in cases))
    height = 0.8 / len(kinds)
    caption = f"lagged, a quarter amplified, cold. {machine_line(results)}"
    figure = _figure(8.0, 1.4 + 0.28 * len(kinds) * len(rows), caption)
    axes = figure.add_subplot()
    for number, (backend, dtype) in enumerate(kinds):
        mine = [c for c in cases if (c.row.subject, c.row.dtype) == (backend, dtype)]
        places = [rows.index(c.row.model) + number * height for c in mine]
        roofs = [bandwidth(c.others["copy"]) for c in mine]
        drawn = axes.barh(
            places,
            [bandwidth(c.row) for c in mine],
            height,
            color=COLOURS[backend],
            alpha=1.0 if dtype == "fp32" else 0.5,
            label=f"{backend} backend, {dtype}",
        )
        shares = [f"{c.copy_share:.0%} of a copy" for c in mine]
        axes.bar_label(drawn, shares, label_type="center", fontsize=7, color="white")
        half = height / 2
        ends = ([y - half for y in places], [y + half for y in places])
        axes.vlines(roofs, *ends, color="0.1", label="_" if number else "a copy")
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(rows))], [TITLES[r] for r in rows])
    axes.invert_yaxis()
    axes.set_xlabel("bytes read and written, GB/s")
    figure.legend(loc="outside upper center", ncols=len(kinds) + 1, fontsize=8)
    return figure


def _speedup(results: Results) -> Figure | None:
    """How many times faster than each baseline; 1 is as fast. Not the fp64 reference."""
    clocks = ["wall"] if results.machine["device"] == "cpu" else list(CLOCKS)
    panels = [(clock, dtype) for clock in clocks for dtype in DTYPES]
    cases = {panel: _best(results, *panel) for panel in panels}
    cases = {panel: found for panel, found in cases.items() if found}
    if not cases:
        return None
    tallest = max(len(found) for found in cases.values())
    caption = f"lagged, a quarter amplified, cold. {machine_line(results)}"
    figure = _figure(4.8 * len(cases), 1.2 + 0.85 * tallest, caption)
    there = {name for found in cases.values() for case in found for name in case.others}
    shown = [name for name in BASELINES if name in there and name != "torch"]
    grid = figure.subplots(1, len(cases), sharex=True, squeeze=False)
    for axes, ((clock, dtype), found) in zip(grid[0], cases.items(), strict=True):
        _bars(axes, found, shown)
        title = dtype if len(clocks) == 1 else f"{dtype}, {CLOCKS[clock]}"
        axes.set_title(f"{found[0].row.subject} backend, {title}", fontsize=10)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure


def _best(results: Results, clock: str, dtype: str) -> list[Comparison]:
    """Each model's first backend."""
    found: dict[str, Comparison] = {}
    for case in headlines(results, clock):
        if case.row.dtype == dtype:
            found.setdefault(case.row.model, case)
    return list(found.values())


def _plain_log(axes: Axes) -> None:
    """A logarithmic x with numbers as people write them."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _bars(axes: Axes, cases: list[Comparison], baselines: list[str]) -> None:
    height = 0.8 / len(baselines)
    for number, name in enumerate(baselines):
        there = [(i, c.times_faster(name)) for i, c in enumerate(cases)]
        bars = [(i + number * height, ratio) for i, ratio in there if ratio is not None]
        drawn = axes.barh(
            [y for y, _ in bars],
            [ratio - 1.0 for _, ratio in bars],
            height,
            left=1.0,
            color=BASELINE_COLOURS[number],
            label=name,
        )
        axes.bar_label(drawn, [f"{ratio:.1f}" for _, ratio in bars], fontsize=7, padding=2)
    axes.axvline(1.0, color="0.2", linewidth=0.8)
    _plain_log(axes)
    axes.margins(x=0.15)
    centre = 0.4 - height / 2
    axes.set_yticks([i + centre for i in range(len(cases))], [TITLES[c.row.model] for c in cases])
    axes.invert_yaxis()
    axes.set_xlabel("times faster", fontsize=9)
