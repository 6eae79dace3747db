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
MARKERS = {"fp32": "o", "bf16": "s"}
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
    """GB/s over the gradients' size; the roof is a copy measured in the same run."""
    cases = [c for c in headlines(results, main_clock(results)) if "copy" in c.others]
    if not cases:
        return None
    figure = _figure(8.0, 4.6, f"lagged, a quarter amplified, cold. {machine_line(results)}")
    axes = figure.add_subplot()
    for dtype, marker in MARKERS.items():
        mine = sorted((c for c in cases if c.row.dtype == dtype), key=lambda c: c.row.elements)
        if not mine:
            continue
        size = [c.row.elements * (4 if dtype == "fp32" else 2) / 1e6 for c in mine]
        roof = [bandwidth(c.others["copy"]) for c in mine]
        style = "-" if dtype == "fp32" else "--"
        axes.plot(size, roof, "x" + style, color="0.55", markersize=4, label=f"a copy, {dtype}")
        for backend in dict.fromkeys(c.row.subject for c in mine):
            points = [(s, c) for s, c in zip(size, mine, strict=True) if c.row.subject == backend]
            axes.plot(
                [s for s, _ in points],
                [bandwidth(c.row) for _, c in points],
                marker,
                color=COLOURS[backend],
                fillstyle="full" if dtype == "fp32" else "none",
                label=f"{backend} backend, {dtype}",
            )
            for s, c in points:
                axes.annotate(
                    f"{TITLES[c.row.model]} {c.copy_share:.0%}",
                    (s, bandwidth(c.row)),
                    xytext=(4, -10 if dtype == "fp32" else 6),
                    textcoords="offset points",
                    fontsize=7,
                )
    _plain_log(axes)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.14)
    axes.set_xlabel("gradients, MB")
    axes.set_ylabel("bytes read and written, GB/s")
    axes.set_title("Bandwidth of a step, and its share of a copy's")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _speedup(results: Results) -> Figure | None:
    """How many times faster than each baseline; 1 is as fast. Not the fp64 reference."""
    clocks = ["wall"] if results.machine["device"] == "cpu" else list(CLOCKS)
    panels = [(clock, dtype) for clock in clocks for dtype in MARKERS]
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
