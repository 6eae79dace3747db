"""What the finished runs say, as a page of Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy

from bench.accuracy import stages, statistics
from bench.accuracy.repeatability import BAR, average
from bench.accuracy.runs import Row
from bench.accuracy.stages import Experiment, Job, NotReady
from bench.accuracy.statistics import Interval
from bench.accuracy.store import Rows
from bench.docs import table

AIM = 0.003  # half of an interval's width, on the three contrasts
FEW = 5  # runs: with fewer an interval says little
CONTRASTS = (
    ("chosen", "plain"),
    ("chosen", "plain, tuned"),
    ("chosen", "shuffled"),
)  # fixed before any of these runs was made


def page(experiment: Experiment, rows: Rows, drawn: Sequence[Path] = ()) -> str:
    """Everything, stage by stage; a stage that cannot be told yet says why."""
    screen, confirm = experiment.screen, experiment.confirm
    lines = [
        f"# {screen.data}: {screen.recipe.arch}, width {screen.recipe.width:g}",
        "",
        f"Written by `python -m bench.accuracy report`. Screened with {screen.recipe}, "
        f"{screen.train or 'all other'} images to train on and {screen.validation} held out. "
        f"Confirmed on {confirm.data} with {confirm.recipe.arch} of width "
        f"{confirm.recipe.width:g}. Intervals hold 95 %. Accuracies and differences are in "
        "percent and in points.",
        "",
    ]
    for title, part in PARTS:
        lines += [f"## {title}", ""]
        try:
            lines += list(part(experiment, rows))
        except NotReady as reason:
            lines += [f"Not yet: {reason}.", ""]
    lines += [f"![{path.stem}]({path.name})" for path in drawn]
    return "\n".join(lines).rstrip() + "\n"


def percent(interval: Interval | None, values: Sequence[float], signed: bool = False) -> str:
    """ "93.1 [92.8, 93.4]"; without an interval the mean alone."""
    sign = "+" if signed else ""
    if interval is None:
        return f"{100 * average(values):{sign}.2f}" if values else "-"
    numbers = (100 * interval.value, 100 * interval.low, 100 * interval.high)
    return "{:{s}.2f} [{:{s}.2f}, {:{s}.2f}]".format(*numbers, s=sign)


def repeatability(experiment: Experiment, rows: Rows) -> Iterator[str]:
    jobs = stages.stage0(experiment, rows)
    there = stages.rows_of(jobs, rows)
    yield f"{len(there)} of {len(jobs)} runs. Spearman's correlation of the layers' scores with "
    yield "themselves: between windows of one run, with an interval over the runs, and between "
    yield "seeds in the same epoch, with the lowest pair. A default's measure reaches "
    yield f"{BAR} in both. Kernels are the layers that have one: norms are left out of the ranking."
    yield ""
    yield from table(
        (
            "measure", "averaged", "layers", "epochs apart", "runs", "windows", "seeds",
            "reaches the bar",
        ),
        [
            (
                f.measure, f.averaging, f.scope, str(f.lag), str(len(f.windows)),
                _ranged(f.windows), _lowest(f.seeds), "yes" if f.repeats else "no",
            )
            for f in stages.repeatabilities(experiment, rows)
            if f.windows
        ],
    )  # fmt: skip


def _ranged(values: Sequence[float]) -> str:
    interval = statistics.mean(values)
    if interval is None:
        return f"{average(values):.2f}"
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _lowest(values: Sequence[float]) -> str:
    return f"{average(values):.2f} ({min(values):.2f})" if values else "-"


def tuning(experiment: Experiment, rows: Rows) -> Iterator[str]:
    yield from _progress(jobs := stages.stage1(experiment, rows), rows)
    yield from _arms(jobs, rows)
    best = stages.tuned(experiment, rows)
    yield f"Best: lr {best.lr:g}, weight decay {best.weight_decay:g}."
    yield ""


def screening(experiment: Experiment, rows: Rows) -> Iterator[str]:
    yield from _progress(jobs := stages.stage2(experiment, rows), rows)
    yield from _arms(jobs, rows)
    best = stages.chosen(experiment, rows)
    yield f"Chosen: {stages.describe(best.options)}, at {best.times:g} times the best plain rate."
    yield ""


def confirmation(experiment: Experiment, rows: Rows) -> Iterator[str]:
    yield from _progress(jobs := stages.stage3(experiment, rows), rows)
    retuned = stages.retune(experiment, rows)
    yield from _arms(retuned, rows)
    yield from _arms(jobs[len(retuned) :], rows)
    if stages.chosen(experiment, rows).times == 1:
        yield "The chosen rate is the tuned one: the two plain arms are the same runs."
        yield ""
    found = contrasts(experiment, rows)
    known = {pair: interval for pair, interval in found.items() if interval is not None}
    adjusted = statistics.holm([interval.p or 0.0 for interval in known.values()])
    yield from table(
        ("contrast, test accuracy", "points", "n", "p", "p, Holm", "reading"),
        [
            (
                f"{a} - {b}", percent(interval, (), signed=True), str(interval.n),
                f"{interval.p:.3g}", f"{p:.3g}", reading(interval, p),
            )
            for ((a, b), interval), p in zip(known.items(), adjusted, strict=True)
        ],
    )  # fmt: skip
    for a, b in found.keys() - known.keys():
        yield f"{a} - {b}: too few runs for an interval."
        yield ""


def contrasts(experiment: Experiment, rows: Rows) -> dict[tuple[str, str], Interval | None]:
    """Differences in test accuracy, over the runs that did not diverge."""
    found: dict[str, list[float]] = {}
    for job in stages.arms(experiment, rows):
        row = rows.get(job.run.key)
        if row is not None and not row.diverged and row.test is not None:
            found.setdefault(job.arm, []).append(row.test)
    return {(a, b): statistics.welch(found.get(a, ()), found.get(b, ())) for a, b in CONTRASTS}


def reading(interval: Interval, p: float) -> str:
    """What may be said of a contrast, given Holm's p."""
    if p <= 1 - statistics.CONFIDENCE:
        verdict = "better" if interval.value > 0 else "worse"
    else:
        verdict = "no difference shown"
    if interval.half_width > AIM:
        verdict += f"; the interval is wider than the ±{100 * AIM:g} points aimed at"
    if interval.n < FEW:
        verdict += f"; {interval.n} runs are few"
    return verdict


def extras(experiment: Experiment, rows: Rows) -> Iterator[str]:
    yield from _progress(jobs := stages.more(experiment, rows), rows)
    yield from _arms(jobs, rows)


def provenance(experiment: Experiment, rows: Rows) -> Iterator[str]:
    """Machines and commits of the rows that this page shows."""
    shown: dict[tuple[str, int], Row] = {}
    for stage in stages.STAGES.values():
        try:
            shown |= {(r.key, r.seed): r for r in stages.rows_of(stage(experiment, rows), rows)}
        except NotReady:
            continue
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in shown.values():
        groups.setdefault((row.device, row.torch, row.commit), []).append(row)
    yield from table(
        ("device", "torch", "commit", "runs", "seconds a run"),
        [
            (*about, str(len(group)), f"{numpy.median([row.seconds for row in group]):.1f}")
            for about, group in groups.items()
        ],
    )


def _progress(jobs: Sequence[Job], rows: Rows) -> Iterator[str]:
    keys = {job.run.key for job in jobs}
    yield f"{len(keys & rows.keys())} of {len(keys)} runs."
    yield ""


def _arms(jobs: Iterable[Job], rows: Rows) -> Iterator[str]:
    """Means over the runs that did not diverge."""
    groups: dict[str, dict[tuple[str, int], Row]] = {}
    for job in jobs:
        if job.run.key in rows:
            groups.setdefault(job.arm, {})[job.run.key] = rows[job.run.key]
    headings = ("arm", "runs", "diverged", "validation", "test", "elements amplified")
    lines = []
    for arm, group in groups.items():
        kept = [row for row in group.values() if not row.diverged]
        validation = [row.validation for row in kept]
        test = [row.test for row in kept if row.test is not None]
        lines.append(
            (
                arm, str(len(group)), str(len(group) - len(kept)),
                percent(statistics.mean(validation), validation),
                percent(statistics.mean(test), test),
                f"{average([row.amplified for row in group.values()]):.0%}",
            )
        )  # fmt: skip
    yield from table(headings, lines)


Part = Callable[[Experiment, Rows], Iterator[str]]
PARTS: tuple[tuple[str, Part], ...] = (
    ("Stage 0: does a score repeat?", repeatability),
    ("Stage 1: the plain recipe, tuned", tuning),
    ("Stage 2: which layers, when, how strongly", screening),
    ("Stage 3: confirmation", confirmation),
    ("More", extras),
    ("Where it was run", provenance),
)
