"""The experiment's figures: rates, contrasts, and how well scores repeat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.accuracy import report, stages
from bench.accuracy.repeatability import BAR, average
from bench.accuracy.stages import Experiment, NotReady
from bench.accuracy.statistics import Interval
from bench.accuracy.store import Rows

COLOURS = ("#0072b2", "#d55e00")


def draw(experiment: Experiment, rows: Rows, folder: Path, name: str) -> list[Path]:
    """Writes ``<name>-repeat.png``, ``-rates.png`` and ``-contrasts.png``, as far as measured."""
    written = []
    for kind, make in (("repeat", repeat), ("rates", rates), ("contrasts", contrasts)):
        try:
            figure = make(experiment, rows)
        except NotReady:
            continue
        if figure is not None:
            written.append(folder / f"{name}-{kind}.png")
            figure.savefig(written[-1], dpi=150)
    return written


def _figure(width: float, height: float, experiment: Experiment) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    recipe = experiment.screen.recipe
    caption = f"{experiment.screen.data}, {recipe.arch} of width {recipe.width:g}"
    figure.supxlabel(f"{caption}, {recipe.epochs} epochs", fontsize=7, color="0.35")
    return figure


def repeat(experiment: Experiment, rows: Rows) -> Figure | None:
    """Every run's, or pair of runs', correlation; a bar at what a default has to reach."""
    found = [f for f in stages.repeatabilities(experiment, rows) if f.windows]
    if not found:
        return None
    figure = _figure(7.0, 0.9 + 0.35 * len(found), experiment)
    axes = figure.add_subplot()
    for place, measure in enumerate(found):
        pairs: Sequence[tuple[str, list[float]]] = (
            ("between windows", measure.windows),
            ("between seeds", measure.seeds),
        )
        for (label, values), colour, shift in zip(pairs, COLOURS, (-0.15, 0.15), strict=True):
            where = [place + shift] * len(values)
            axes.plot(values, where, "o", color=colour, alpha=0.5, label=label if not place else "")
            if values:
                axes.plot(average(values), place + shift, "|", color="black", markersize=14)
    axes.axvline(BAR, color="0.3", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(found)), [f"{f.measure}, {f.averaging}, {f.scope}" for f in found])
    axes.invert_yaxis()
    axes.set_xlabel("rank correlation of the layers' scores")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def rates(experiment: Experiment, rows: Rows) -> Figure | None:
    """Validation accuracy of plain runs over the learning rate, at the usual weight decay."""
    jobs = stages.tune(experiment.screen, experiment.rates, experiment.tune_seeds, rows)
    points = [(job.run.recipe.lr, rows[job.run.key]) for job in jobs if job.run.key in rows]
    if not points:
        return None
    figure = _figure(6.0, 3.8, experiment)
    axes = figure.add_subplot()
    means = {
        lr: average([row.validation for rate, row in points if rate == lr])
        for lr in sorted({lr for lr, _ in points})
    }
    axes.plot(list(means), [100 * value for value in means.values()], "-", color=COLOURS[0])
    for diverged, marker in ((False, "o"), (True, "x")):
        mine = [(lr, 100 * row.validation) for lr, row in points if row.diverged == diverged]
        if mine:
            label = "diverged" if diverged else "a run"
            axes.plot(*zip(*mine, strict=True), marker, color=COLOURS[0], alpha=0.6, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(means), [f"{lr:g}" for lr in means])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def contrasts(experiment: Experiment, rows: Rows) -> Figure | None:
    """The three differences in test accuracy, with their intervals."""
    known: list[tuple[str, Interval]] = [
        (f"{a} - {b}", interval)
        for (a, b), interval in report.contrasts(experiment, rows).items()
        if interval is not None
    ]
    if not known:
        return None
    figure = _figure(6.5, 1.2 + 0.6 * len(known), experiment)
    axes = figure.add_subplot()
    for place, (_, interval) in enumerate(known):
        reach = 100 * interval.half_width
        axes.errorbar(100 * interval.value, place, xerr=reach, fmt="o", color=COLOURS[0], capsize=4)
    axes.axvline(0.0, color="0.3", linewidth=1)
    axes.set_yticks(range(len(known)), [f"{label}, n = {i.n}" for label, i in known])
    axes.margins(y=0.3)
    axes.invert_yaxis()
    axes.set_xlabel("difference in test accuracy, points (95 %)")
    axes.grid(alpha=0.3)
    return figure
