"""What the runs on growing say: a page, a figure and the measured part of docs/accuracy.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.accuracy import (
    growth_stages,
    paper_stages,
    peer_stages,
    stages,
    statistics,
    thermometer_report,
    vanishing_stages,
)
from bench.accuracy.growth_findings import corrected, findings
from bench.accuracy.growth_stages import TIMES, Growth, name_of
from bench.accuracy.lines import provenance
from bench.accuracy.report import percent
from bench.accuracy.runs import Row
from bench.accuracy.stages import Job, NotReady
from bench.accuracy.statistics import Interval
from bench.accuracy.store import Rows
from bench.docs import table

if TYPE_CHECKING:
    from bench.accuracy.thermometer import Row as Measured

COLOURS = {"plain": "#0072b2", "growing": "#d55e00", "one factor": "#009e73"}
NOTHING = "Not measured yet."
TITLES = {
    "findings": "Findings",
    "contrasts": "Plain and growing",
    "thermometer": "The thermometer",
    "peers": "Beside optimizers that find a rate by themselves",
    "paper": "A fixed factor of 2 on chosen layers",
    "vanishing": "Ten layers of tanh",
}
_PART = re.compile(r"(<!-- growth: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(growth: Growth, rows: Rows, figure: Path, measured: Sequence[Measured] = ()) -> str:
    """A page of its own, with its figure written to a file."""
    lines = ["# Growing amplification on CIFAR-10", ""]
    lines += ["Written by `python -m bench.accuracy growth --report`.", ""]
    if draw(growth, rows, figure):
        lines += [f"![Test accuracy by learning rate]({figure.name})", ""]
    for name, title in TITLES.items():
        lines += [f"## {title}", "", *made(name, growth, rows, measured)]
    return "\n".join(lines)


def made(name: str, growth: Growth, rows: Rows, measured: Sequence[Measured]) -> list[str]:
    """A part by its name, or why there is none."""
    if name == "findings":
        return findings(growth, rows, measured)
    if name == "thermometer":
        return thermometer_report.part(measured) if measured else [NOTHING, ""]
    parts = {"contrasts": part, "paper": paper, "vanishing": vanishing, "peers": peers}
    try:
        return parts[name](growth, rows)
    except NotReady as reason:
        return [f"Not yet: {reason}.", ""]


def part(growth: Growth, rows: Rows) -> list[str]:
    """Conditions, tuning, arms and contrasts, as far as there are any."""
    if not stages.complete(growth_stages.tune(growth, rows), rows):
        return [*tuning(growth, rows), "The contrasts come when this is done.", ""]
    jobs = growth_stages.contrasts(growth, rows)
    found = growth_stages.differences(growth, rows)
    best = growth_stages.best(growth, rows).lr
    return [*tuning(growth, rows), *arms(jobs, rows, best), *contrasts(found)]


def paper(growth: Growth, rows: Rows) -> list[str]:
    """The published idea, a schedule after the other."""
    lines = []
    for schedule in paper_stages.SCHEDULES:
        jobs = paper_stages.paper(growth, rows, [schedule])
        lines += [f"Schedule: {schedule}.", ""]
        lines += arms(jobs, rows, growth_stages.best(growth, rows).lr)
        if any(job.run.key in rows for job in jobs):
            lines += contrasts(paper_stages.differences(growth, rows, schedule))
    return lines


def peers(growth: Growth, rows: Rows) -> list[str]:
    """Optimizers that find a learning rate by themselves."""
    found = peer_stages.differences(growth, rows)
    jobs = peer_stages.arms(growth, rows)
    if not peer_stages.adamw_is_tuned(growth, rows):
        best = growth_stages.best(growth, rows).lr
        known = {pair: i for pair, i in found.items() if "AdamW" not in pair[0]}
        missing = "AdamW, plain and growing, was not run."
        return [*arms(jobs, rows, best), missing, "", *contrasts(known)]
    adamw = peer_stages.adamw(growth)
    best = growth_stages.best(adamw, rows).lr
    return [*tuning(adamw, rows), *arms(jobs, rows, best), *contrasts(found)]


def vanishing(growth: Growth, rows: Rows) -> list[str]:
    """Ten layers of tanh."""
    here = vanishing_stages.network(growth)
    jobs = vanishing_stages.arms(growth, rows)
    best = growth_stages.best(here, rows).lr
    found = vanishing_stages.differences(growth, rows)
    return [*tuning(here, rows), *arms(jobs, rows, best), *contrasts(found)]


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


def arms(jobs: Sequence[Job], rows: Rows, best: float) -> Iterator[str]:
    """What was run, and a line an arm."""
    there = [rows[job.run.key] for job in jobs if job.run.key in rows]
    if not there:
        yield f"0 of {len(jobs)} runs on fresh seeds."
        yield ""
        return
    yield (
        f"{len(there)} of {len(jobs)} runs on fresh seeds, {provenance(there)}; the best plain "
        f"rate is {best:g}. The median run took {median(row.seconds for row in there):.0f} s."
    )
    yield ""
    lines = []
    for arm in dict.fromkeys(job.arm for job in jobs):
        mine = [rows[j.run.key] for j in jobs if j.arm == arm and j.run.key in rows]
        test = [row.test for row in mine if row.test is not None]
        if mine:
            lines.append(
                (
                    arm, percent(statistics.mean(test), test), str(len(mine)),
                    str(sum(row.diverged for row in mine)), amplified(mine),
                )
            )  # fmt: skip
    yield from table(("arm", "test accuracy", "runs", "diverged", "amplified"), lines)


def amplified(rows: Sequence[Row]) -> str:
    """The factors that growing runs end with and the layers that settled; else the dose."""
    stored = [json.loads(row.layer_scores) for row in rows if row.layer_scores]
    if not stored:
        share = fmean(row.amplified for row in rows)
        return f"{share:.0%} of the elements" if share else ""
    factors = [of["factor"][-1] for of in stored if of["factor"][-1] is not None]
    settled = fmean(of["settled"][-1] for of in stored)
    if not factors:
        return ""
    return f"by {min(factors):.1f} to {max(factors):.1f}, {settled:.0%} settled"


def contrasts(found: Mapping[tuple[str, str], Interval | None]) -> Iterator[str]:
    """Differences in points with Welch's intervals, and Holm's p over all of them."""
    adjusted = corrected(found)
    yield from table(
        ("contrast", "points [95 %]", "n", "p", "p, Holm"),
        [
            (
                f"{a} - {b}", percent(interval, (), signed=True), str(interval.n),
                f"{interval.p:.2g}", f"{adjusted[a, b]:.2g}",
            )
            for (a, b), interval in found.items()
            if interval is not None
        ],
    )  # fmt: skip
    for a, b in (pair for pair in found if pair not in adjusted):
        yield f"{a} - {b}: too few runs for an interval."
        yield ""


def draw(growth: Growth, rows: Rows, path: Path) -> bool:
    """Test accuracy over the learning rate, with intervals; False if there is nothing to draw."""
    try:
        found = growth_stages.accuracies(growth_stages.contrasts(growth, rows), rows)
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


def write(document: Path, growth: Growth, rows: Rows, measured: Sequence[Measured]) -> None:
    """Fills the measured parts of a document."""

    def replaced(found: re.Match[str]) -> str:
        text = "\n".join(made(found[2], growth, rows, measured)).strip()
        return f"{found[1]}\n{text}\n\n{found[3]}"

    document.write_text(_PART.sub(replaced, document.read_text()))
