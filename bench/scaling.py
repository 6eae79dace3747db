"""How the cost of a step grows: with the elements, and with the number of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bench import baselines
from bench.baselines import Fused, Subject, amplifier_options
from bench.micro import DTYPES, Case, Effort, measure
from bench.results import Failure, Row
from bench.shapes import Shapes, elements
from bench.workload import Workload, copies_for
from gradamp_fast import backends

FULL = Effort(fewest=7, most=101, seconds=0.15)
QUICK = Effort(fewest=3, most=15, seconds=0.03)
COUNTS = (1, 4, 16, 64, 161, 250, 1000, 4000)
TOTAL = 4000 * 4096  # elements, however many tensors they are in
SEVERAL = 8


@dataclass(frozen=True)
class Point:
    """One list of equal tensors on a curve."""

    section: str
    shapes: Shapes
    fraction: float

    @property
    def case(self) -> Case:
        tensors = len(self.shapes)
        size = next(iter(self.shapes.values()))[0]
        return Case(f"{tensors} x {size:,}", "fp32", self.fraction, "lagged")


def equal_tensors(count: int, total: int) -> Shapes:
    """``count`` layers of one tensor each, ``total`` elements in all."""
    return {f"layer{i}.weight": (total // count,) for i in range(count)}


def points(device: torch.device, quick: bool) -> list[Point]:
    """All three curves.

    "elements": 8 tensors, of which 2 are amplified. "tensors": 16 M elements in ever more tensors,
    all amplified. "small": ever more tensors of one element, all amplified.
    """
    largest = 6 if quick else 9 if device.type == "cuda" else 8
    sizes = [m * 10**p for p in range(3, largest) for m in (1, 3)] + [10**largest]
    counts = (1, 161) if quick else COUNTS
    curves = [Point("elements", equal_tensors(SEVERAL, n), 0.25) for n in sizes]
    if not quick:
        curves += [Point("tensors", equal_tensors(n, TOTAL), 1.0) for n in counts]
    return curves + [Point("small", equal_tensors(n, n), 1.0) for n in counts]


def subjects(point: Point, workload: Workload) -> Iterator[Callable[[], Subject]]:
    """The compiled backends, and the baselines that do not take seconds."""
    options = amplifier_options("lagged", workload)
    for name in backends.NAMES:
        if name != "torch" and backends.unavailable(name, workload.device) is None:
            yield lambda name=name: Fused(workload, name, options)  # type: ignore[misc]
    yield lambda: baselines.Loop(workload)
    yield lambda: baselines.Foreach(workload)
    if point.section != "small":  # in words of four bytes there would be too few to move
        yield lambda: baselines.Copy(workload)


def run_point(
    point: Point, device: torch.device, effort: Effort
) -> tuple[list[Row], list[Failure]]:
    """Verifies and times one point of a curve."""
    dtype = DTYPES["fp32"]
    copies = copies_for(elements(point.shapes) * dtype.itemsize, device)
    workload = Workload(point.shapes, dtype, device, point.fraction, copies, keep=False)
    return measure(point.section, point.case, workload, subjects(point, workload), effort)


@dataclass(frozen=True)
class Line:
    """microseconds = intercept + slope * x."""

    intercept: float
    slope: float


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """The line of least squares of the relative errors, through (x, microseconds)."""
    weights = [1.0 / y**2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    pairs = list(zip(weights, points, strict=True))
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in pairs)
    together = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in pairs)
    slope = together / spread
    return Line(mean_y - slope * mean_x, slope)
