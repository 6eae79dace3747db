"""Stage 0: does a measure rank the layers the same way when it is taken again?

A score that does not repeat between windows of one run is noise, and one that does not repeat
between seeds says nothing about the architecture. Windows that are compared share next to no steps.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy

from bench.accuracy.runs import MEASURES, Row
from bench.accuracy.statistics import spearman

BAR = 0.6  # a default's measure has to reach it, between windows and between seeds
SHARED = 0.14  # of its weight, that a moving average may share with the window it is compared with
SCOPES = ("all", "kernels")  # layers ranked: all, or those with a kernel, norms left out


@dataclass(frozen=True)
class Repeatability:
    """Rank correlations of one measure with itself.

    Attributes:
        averaging: "decay 0.99" or "by epoch".
        scope: of `SCOPES`. Norms differ from other layers, which "all" counts for the measure.
        lag: epochs between the windows compared.
        windows: between windows of a run; one value per run.
        seeds: between runs in the same epoch; one value per pair of runs.
    """

    measure: str
    averaging: str
    scope: str
    lag: int
    windows: list[float]
    seeds: list[float]

    @property
    def lowest(self) -> float:
        """The smaller of the two means; NaN if either is not known."""
        values = [average(self.windows), average(self.seeds)]
        return math.nan if any(map(math.isnan, values)) else min(values)

    @property
    def repeats(self) -> bool:
        return self.lowest >= BAR


def average(values: Sequence[float]) -> float:
    return float(numpy.mean(values)) if values else math.nan


def lag(decay: float | None, steps: int, epochs: int) -> int:
    """Epochs of `steps` steps after which a moving average holds other steps."""
    if not decay:
        return 1
    needed = math.ceil(math.log(SHARED) / math.log(decay) / steps)
    return min(needed, max(epochs // 2, 1))


def judge(rows: Iterable[Row], averaging: str, decay: float | None) -> list[Repeatability]:
    """What the rows of one kind of averaging say about every measure."""
    scores = [json.loads(row.layer_scores) for row in rows if not row.diverged]
    found = []
    for measure, scope in itertools.product(MEASURES, SCOPES):
        tables = []  # [epochs, layers]
        for run in scores:
            table = numpy.array(run[measure], dtype=float)
            tables.append(table if scope == "all" else table[:, run["kernel"]])
        apart = max(
            (lag(decay, r["steps"], len(t)) for t, r in zip(tables, scores, strict=True)), default=0
        )
        windows = _known(_between_windows(table, apart) for table in tables)
        seeds = _known(_between_runs(a, b) for a, b in itertools.combinations(tables, 2))
        found.append(Repeatability(measure, averaging, scope, apart, windows, seeds))
    return found


def _known(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _between_windows(table: numpy.ndarray, apart: int) -> float:
    return average(_known(spearman(a, b) for a, b in zip(table, table[apart:], strict=False)))


def _between_runs(a: numpy.ndarray, b: numpy.ndarray) -> float:
    return average(_known(spearman(x, y) for x, y in zip(a, b, strict=False)))
