"""What the runs on growing say: a page, a figure and the measured part of docs/accuracy.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.accuracy import growth_stages, statistics
from bench.accuracy.growth_stages import ARMS, TIMES, Growth, name_of
from bench.accuracy.report import percent
from bench.accuracy.runs import Row
from bench.accuracy.stages import NotReady
from bench.accuracy.store import Rows
from bench.docs import table

COLOURS = {"plain": "#0072b2", "growing": "#d55e00", "one factor": "#009e73"}
NOTHING = "Not measured yet: `python -m bench.accuracy growth`."
_PART = re.compile(r"(<!-- growth -->\n).*?(<!-- end -->)", re.DOTALL)


def page(growth: Growth, rows: Rows, figure: Path) -> str:
    """A page of its own, with its figure written to a file."""
    lines = ["# Growing amplification on CIFAR-10", ""]
    lines += ["Written by `python -m bench.accuracy growth --report`.", "", *part(growth, rows)]
    if draw(growth, rows, figure):
        lines += [f"![Test accuracy by learning rate]({figure.name})", ""]
    return "\n".join(lines)


def part(growth: Growth, rows: Rows) -> list[str]:
    """Conditions, tuning, arms and contrasts, as far as there are any."""
    lines = list(tuning(growth, rows))
    try:
        lines += [*arms(growth, rows), *contrasts(growth, rows)]
    except NotReady as reason:
        lines += [f"Not yet: {reason}.", ""]
    return lines


def tuning(growth: Growth, rows: Rows) -> Iterator[str]:
    jobs = growth_stages.tune(growth, rows)
    found: dict[float, list[float]] = {}
    for job in jobs:
        if job.run.key in rows:
            found.setdefault(job.run.recipe.lr, []).append(rows[job.run.key].validation)
    yield "Plain, tuned on the validation images:"
    yield ""
    yield from table(
        ("learning rate", *(f"{rate:g}" for rate in sorted(found))),
        [
            ("validation accuracy", *(f"{100 * fmean(found[rate]):.1f}" for rate in sorted(found))),
            ("runs", *(str(len(found[rate])) for rate in sorted(found))),
        ],
    )


def arms(growth: Growth, rows: Rows) -> Iterator[str]:
    jobs = growth_stages.contrasts(growth, rows)
    there = [rows[job.run.key] for job in jobs if job.run.key in rows]
    seconds = sorted(row.seconds for row in there)
    yield (
        f"{len(there)} of {len(jobs)} runs on fresh seeds, {provenance(there)}; the best rate is "
        f"{growth_stages.best(growth, rows).lr:g}. A run took {seconds[len(seconds) // 2]:.0f} s."
        if there
        else f"0 of {len(jobs)} runs on fresh seeds."
    )
    yield ""
    lines = []
    for arm, times, _ in ARMS:
        name = name_of(arm, times)
        mine = [rows[j.run.key] for j in jobs if j.arm == name and j.run.key in rows]
        test = [row.test for row in mine if row.test is not None]
        if mine:
            lines.append(
                (
                    name, percent(statistics.mean(test), test), str(len(mine)),
                    str(sum(row.diverged for row in mine)), *grown(mine),
                )
            )  # fmt: skip
    yield from table(
        ("arm", "test accuracy", "runs", "diverged", "mean factor", "settled", "direction"), lines
    )


def grown(rows: Sequence[Row]) -> tuple[str, str, str]:
    """Factor, share settled and direction after the last epoch; nothing of plain runs."""
    stored = [json.loads(row.layer_scores) for row in rows if row.layer_scores]
    if not stored:
        return ("", "", "")
    ends = {name: [of[name][-1] for of in stored] for name in ("factor", "settled", "direction")}
    known = {name: [value for value in of if value is not None] for name, of in ends.items()}
    if not all(known.values()):
        return ("-", "-", "-")
    low, high = min(known["factor"]), max(known["factor"])
    return (
        f"{low:.1f} to {high:.1f}",
        f"{fmean(known['settled']):.0%}",
        f"{fmean(known['direction']):+.2f}",
    )


def provenance(rows: Sequence[Row]) -> str:
    def every(name: str) -> str:
        return ", ".join(sorted({getattr(row, name) for row in rows}))

    return f"{every('device')}, torch {every('torch')}, {every('commit')}"


def contrasts(growth: Growth, rows: Rows) -> Iterator[str]:
    """Differences in points with Welch's intervals, and Holm's p over all of them."""
    found = growth_stages.differences(growth, rows)
    known = {pair: interval for pair, interval in found.items() if interval is not None}
    adjusted = statistics.holm([interval.p or 0.0 for interval in known.values()])
    yield from table(
        ("contrast", "points [95 %]", "n", "p", "p, Holm"),
        [
            (
                f"{a} - {b}", percent(interval, (), signed=True), str(interval.n),
                f"{interval.p:.2g}", f"{p:.2g}",
            )
            for ((a, b), interval), p in zip(known.items(), adjusted, strict=True)
        ],
    )  # fmt: skip
    for a, b in (pair for pair in found if pair not in known):
        yield f"{a} - {b}: too few runs for an interval."
        yield ""


def draw(growth: Growth, rows: Rows, path: Path) -> bool:
    """Test accuracy over the learning rate, with intervals; False if there is nothing to draw."""
    try:
        found = growth_stages.accuracies(growth, rows)
    except NotReady:
        return False
    if all(len(values) < 2 for values in found.values()):
        return False
    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (arm, colour) in enumerate(COLOURS.items()):
        points = [
            (times * 2 ** (0.1 * (place - 1)), interval)  # side by side
            for times in TIMES
            if (interval := statistics.mean(found.get(name_of(arm, times), ()))) is not None
        ]
        if points:
            axes.errorbar(
                [rate for rate, _ in points],
                [100 * interval.value for _, interval in points],
                yerr=[100 * interval.half_width for _, interval in points],
                fmt="o-",
                color=colour,
                capsize=3,
                label=arm,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(TIMES), [f"{name}" for name in TIMES.values()])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("test accuracy, %, 95 % interval")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    return True


def write(document: Path, growth: Growth, rows: Rows) -> None:
    """Fills the measured part of a document."""
    text = "\n".join(part(growth, rows)).strip() if rows else NOTHING
    document.write_text(
        _PART.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", document.read_text())
    )
