"""Where the mean direction crosses zero, and where the learning rate is best."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.accuracy.lines import every, provenance
from bench.docs import table

if TYPE_CHECKING:
    from bench.accuracy.thermometer import Row

COLOURS = ("#0072b2", "#d55e00", "#009e73")
CLAIM = 2.0  # the crossing lies within this factor of the best rate


@dataclass(frozen=True)
class Setting:
    network: str
    optimizer: str
    batch: int


@dataclass(frozen=True)
class Point:
    """Means over the seeds at one learning rate."""

    rate: float
    direction: float
    accuracy: float


@dataclass(frozen=True)
class Curve:
    """A setting's points by learning rate, upwards."""

    setting: Setting
    points: tuple[Point, ...]

    @property
    def best(self) -> float:
        """The most accurate rate: the top of the parabola through it and its two neighbours."""
        top = max(range(len(self.points)), key=lambda i: self.points[i].accuracy)
        if not 0 < top < len(self.points) - 1:
            return self.points[top].rate
        low, middle, high = self.points[top - 1 : top + 2]
        bend = low.accuracy - 2 * middle.accuracy + high.accuracy
        shift = (low.accuracy - high.accuracy) / (2 * bend) if bend else 0.0
        return middle.rate * (high.rate / middle.rate) ** shift

    @property
    def crossing(self) -> float | None:
        """Where the direction first turns from above 0 to 0 or below, going up."""
        for low, high in pairwise(self.points):
            if low.direction > 0 >= high.direction:
                share = low.direction / (low.direction - high.direction)
                return low.rate * (high.rate / low.rate) ** share
        return None

    @property
    def ratio(self) -> float | None:
        """The crossing in units of the best rate."""
        return None if self.crossing is None else self.crossing / self.best

    def at(self, rate: float, name: str) -> float:
        """`direction` or `accuracy` between the points, linear in the rate's logarithm."""
        for low, high in pairwise(self.points):
            if low.rate <= rate <= high.rate:
                share = math.log(rate / low.rate) / math.log(high.rate / low.rate)
                return (1 - share) * getattr(low, name) + share * getattr(high, name)
        return float("nan")


def curves(rows: Iterable[Row]) -> list[Curve]:
    """Of every setting; a seed that a rate lacks counts nowhere in the setting."""
    found: dict[Setting, dict[float, dict[int, Row]]] = defaultdict(dict)
    for row in rows:
        setting = Setting(row.network, row.optimizer, row.batch)
        found[setting].setdefault(row.rate, {})[row.seed] = row
    made = []
    for setting, rates in found.items():
        seeds = set.intersection(*(set(of) for of in rates.values()))
        if seeds:
            points = [
                Point(
                    rate,
                    fmean(of[seed].direction for seed in seeds),
                    fmean(of[seed].accuracy for seed in seeds),
                )
                for rate, of in sorted(rates.items())
            ]
            made.append(Curve(setting, tuple(points)))
    return made


def page(rows: Sequence[Row], figure: Path) -> str:
    """The whole, with its figure written to a file."""
    made = curves(rows)
    if not made:
        return "# The thermometer\n\nNothing was run yet.\n"
    draw(made, figure)
    return "\n".join(
        [
            "# The thermometer",
            "",
            "Written by `python -m bench.accuracy thermometer --report`.",
            "",
            *part(rows),
            f"![The direction against the learning rate]({figure.name})",
            "",
        ]
    )


def part(rows: Sequence[Row]) -> list[str]:
    """What was found: a sentence, and a line a setting."""
    made = curves(rows)
    return [conditions(rows), "", verdict(made), "", *table(HEADINGS, [line(c) for c in made])]


def conditions(rows: Sequence[Row]) -> str:
    return (
        f"{len(rows)} runs of {every(rows, 'steps')} steps, seeds {every(rows, 'seed')}; "
        f"{provenance(rows)}."
    )


def verdict(made: Sequence[Curve]) -> str:
    """How many settings hold the claim, and the spread of the ratio."""
    if not made:
        return "not measured yet."
    ratios = [curve.ratio for curve in made if curve.ratio is not None]
    if not ratios:
        return "The direction crosses zero nowhere."
    held = sum(1 / CLAIM <= ratio <= CLAIM for ratio in ratios)
    logs = [math.log(ratio) for ratio in ratios]
    return (
        f"The direction crosses zero in {len(ratios)} of {len(made)} settings, and within a factor "
        f"of {CLAIM:g} of the best rate in {held}. Crossing / best rate: geometric mean "
        f"{math.exp(fmean(logs)):.2f}, a standard deviation is a factor of "
        f"{math.exp(pstdev(logs)):.2f}, "
        f"{min(ratios):.2f} to {max(ratios):.2f}."
    )  # fmt: skip


HEADINGS = (
    "network, optimizer, batch", "best rate", "accuracy", "direction there", "crosses 0 at",
    "crossing / best", "accuracy lost at the crossing",
)  # fmt: skip


def line(curve: Curve) -> list[str]:
    setting, best, crossing, ratio = curve.setting, curve.best, curve.crossing, curve.ratio
    cells = [
        f"{setting.network}, {setting.optimizer}, {setting.batch}",
        f"{best:.2g}",
        f"{100 * max(point.accuracy for point in curve.points):.1f}",
        f"{curve.at(best, 'direction'):+.3f}",
    ]
    if crossing is None or ratio is None:
        return [*cells, "nowhere", "", ""]
    lost = max(point.accuracy for point in curve.points) - curve.at(crossing, "accuracy")
    return [*cells, f"{crossing:.2g}", f"{ratio:.2f}", f"{100 * lost:.1f}"]


def draw(made: Sequence[Curve], path: Path) -> None:
    """The direction over rate / best rate: networks below each other, optimizers side by side."""
    networks = list(dict.fromkeys(curve.setting.network for curve in made))
    optimizers = list(dict.fromkeys(curve.setting.optimizer for curve in made))
    batches = sorted({curve.setting.batch for curve in made})
    figure = Figure(figsize=(2.6 * len(optimizers) + 0.6, 2.2 * len(networks) + 0.6))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(networks), len(optimizers), sharex=True, sharey=True, squeeze=False)
    for row, network in enumerate(networks):
        for column, optimizer in enumerate(optimizers):
            axes: Axes = grid[row][column]
            axes.axvspan(1 / CLAIM, CLAIM, color="0.9")
            axes.axhline(0.0, color="0.3", linewidth=1)
            axes.set_title(f"{network}, {optimizer}", fontsize=9)
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
            for curve in made:
                if (curve.setting.network, curve.setting.optimizer) == (network, optimizer):
                    axes.plot(
                        [point.rate / curve.best for point in curve.points],
                        [point.direction for point in curve.points],
                        ".-",
                        color=COLOURS[batches.index(curve.setting.batch) % len(COLOURS)],
                        label=f"batch {curve.setting.batch}",
                    )
    grid[0][0].legend(fontsize=7)
    figure.supxlabel("learning rate / best learning rate", fontsize=9)
    figure.supylabel("mean direction", fontsize=9)
    figure.savefig(path, dpi=150)
