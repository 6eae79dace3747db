"""What came of it, in six sentences, each with the numbers that it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bench.accuracy import (
    growth_stages,
    paper_stages,
    peer_stages,
    statistics,
    thermometer_report,
)
from bench.accuracy.growth_stages import BEST, HIGH, LOW, Growth, name_of
from bench.accuracy.report import percent
from bench.accuracy.stages import NotReady
from bench.accuracy.statistics import Interval
from bench.accuracy.store import Rows

if TYPE_CHECKING:
    from bench.accuracy.thermometer import Row

TOLERATED = 0.003  # how much worse still counts as not worse
Differences = Mapping[tuple[str, str], Interval | None]


def findings(growth: Growth, rows: Rows, measured: Sequence[Row]) -> list[str]:
    """A list of Markdown; what has too few runs says so."""
    try:
        found = Found(growth, rows)
    except NotReady as reason:
        return [f"Not yet: {reason}.", ""]
    curves = thermometer_report.curves(measured)
    return [
        f"- **A rate 64 times too low:** growing {found.mean('growing', LOW)} %, plain "
        f"{found.mean('plain', LOW)} %: {found.said('growing', LOW, 'plain', LOW)} Against plain "
        f"at its tuned best, {found.mean('plain', BEST)} %: "
        f"{found.said('growing', LOW, 'plain', BEST)}",
        f"- **The tuned rate, and 8 times that:** {found.said('growing', BEST, 'plain', BEST)} "
        f"{found.alike()} 8 times too high: growing {found.mean('growing', HIGH)} %, plain "
        f"{found.mean('plain', HIGH)} %: {found.said('growing', HIGH, 'plain', HIGH)}",
        f"- **A factor for each layer rather than one for the model:** 64 times too low "
        f"{found.said('growing', LOW, 'one factor', LOW)} At the tuned rate "
        f"{found.said('growing', BEST, 'one factor', BEST)}",
        f"- **Beside optimizers that find a rate by themselves:** {peers(growth, rows)}",
        f"- **The thermometer:** {thermometer_report.verdict(curves)}",
        f"- **A fixed factor of 2 on chosen layers:** {fixed(growth, rows)}",
        "",
    ]


class Found:
    """The accuracies and the contrasts with their corrected p."""

    def __init__(self, growth: Growth, rows: Rows) -> None:
        self.jobs = growth_stages.contrasts(growth, rows)
        self.rows = rows
        self.accuracies = growth_stages.accuracies(self.jobs, rows)
        self.differences = growth_stages.differences(growth, rows)
        self.corrected = corrected(self.differences)

    def mean(self, arm: str, times: float) -> str:
        values = self.accuracies.get(name_of(arm, times), [])
        return percent(statistics.mean(values), values)

    def said(self, arm: str, times: float, other: str, other_times: float) -> str:
        """The difference, and what may be said of it."""
        pair = (name_of(arm, times), name_of(other, other_times))
        interval = self.differences[pair]
        if interval is None:
            return self.without_interval(pair)
        difference = percent(interval, (), signed=True)
        return f"{difference} points, {reading(interval, self.corrected[pair])}."

    def without_interval(self, pair: tuple[str, str]) -> str:
        a, b = (self.accuracies.get(arm, []) for arm in pair)
        return "the same in every run." if a and a == b else "too few runs for an interval."

    def alike(self) -> str:
        """In how many seeds nothing grew at the tuned rate."""
        by_arm = {
            arm: {j.run.recipe.seed: self.rows.get(j.run.key) for j in self.jobs if j.arm == arm}
            for arm in (name_of("growing", BEST), name_of("plain", BEST))
        }
        pairs = [
            (row, other)
            for row, other in zip(*(of.values() for of in by_arm.values()), strict=True)
            if row is not None and other is not None
        ]
        same = sum(row.weights == other.weights for row, other in pairs)
        return f"In {same} of {len(pairs)} seeds nothing grew, and the runs are the same."


def corrected(found: Differences) -> dict[tuple[str, str], float]:
    """Holm's p of those that have an interval."""
    known = {pair: interval.p or 0.0 for pair, interval in found.items() if interval is not None}
    return dict(zip(known, statistics.holm(list(known.values())), strict=True))


def reading(interval: Interval, p: float) -> str:
    if p <= 1 - statistics.CONFIDENCE:
        return "better" if interval.value > 0 else "worse"
    if interval.low > -TOLERATED:
        return f"not worse by {100 * TOLERATED:g} points"
    return "no difference shown"


def peers(growth: Growth, rows: Rows) -> str:
    """Growing from far too low a rate minus each of them."""
    found = peer_stages.differences(growth, rows)
    p = corrected(found)
    growing = name_of("growing", LOW)
    told = [
        f"{pair[1]} {percent(interval, (), signed=True)} points, {reading(interval, p[pair])}"
        for pair, interval in found.items()
        if interval is not None and pair[0] == growing
    ]
    start = f"growing from a rate {1 / LOW:g} times too low minus "
    return start + "; ".join(told) + "." if told else "not measured yet."


def fixed(growth: Growth, rows: Rows) -> str:
    """How many arms of the published idea beat plain training, and by how much at most."""
    sentences = []
    for schedule in paper_stages.SCHEDULES:
        found = paper_stages.differences(growth, rows, schedule)
        p = corrected(found)
        arms = {
            pair: interval
            for pair, interval in found.items()
            if interval is not None and pair[1].startswith("plain")
        }
        if arms:
            better = sum(p[pair] <= 0.05 and i.value > 0 for pair, i in arms.items())
            worse = sum(p[pair] <= 0.05 and i.value < 0 for pair, i in arms.items())
            values = [100 * interval.value for interval in arms.values()]
            seeds = min(interval.n for interval in arms.values())
            sentences.append(
                f"with the schedule {schedule!r} {better} of {len(arms)} arms are better than "
                f"plain at the same rate and {worse} are worse ({min(values):+.2f} to "
                f"{max(values):+.2f} points, {seeds} seeds)"
            )
    return "; ".join(sentences) + "." if sentences else "not measured yet."
