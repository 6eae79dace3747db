"""Which runs the experiment on growing at a scale with room to gain wants, and its contrasts.

As in `stages`, a stage is a function from what is finished to jobs in order. `tune` chooses the
plain learning rate on validation images; `contrasts` alone looks at the test images, by seeds that
chose nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.accuracy import stages, statistics
from bench.accuracy.presets import CIFAR_16, CIFAR_GROWTH
from bench.accuracy.stages import Family, Job, NotReady, Options, Plain
from bench.accuracy.statistics import Interval
from bench.accuracy.store import Rows

LOW, BEST, HIGH = 1 / 64, 1.0, 8.0  # learning rates, in units of the best plain one
TIMES = {LOW: "best/64", BEST: "best", HIGH: "8 x best"}
GROWING: Options = {"grow": True}
ONE_FACTOR: Options = {"grow": True, "one_factor": True}
# Fixed before any of these runs was made: the first of each pair minus the second.
CONTRASTS = (
    (("growing", LOW), ("plain", LOW)),
    (("growing", LOW), ("plain", BEST)),
    (("growing", BEST), ("plain", BEST)),
    (("growing", HIGH), ("plain", HIGH)),
    (("growing", LOW), ("one factor", LOW)),
    (("growing", BEST), ("one factor", BEST)),
)
# Pairs first, so that a seed that is cut short still has whole contrasts.
ARMS: tuple[tuple[str, float, Options | None], ...] = (
    ("plain", LOW, None),
    ("growing", LOW, GROWING),
    ("plain", BEST, None),
    ("growing", BEST, GROWING),
    ("plain", HIGH, None),
    ("growing", HIGH, GROWING),
    ("one factor", LOW, ONE_FACTOR),
    ("one factor", BEST, ONE_FACTOR),
)


@dataclass(frozen=True)
class Growth:
    """The experiment: what its runs have in common, its grid and its seeds."""

    family: Family
    rates: Sequence[float] = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
    tune_seeds: Sequence[int] = range(2)
    seeds: Sequence[int] = range(100, 108)  # fresh: nothing was chosen by them


EXPERIMENTS = {
    "cifar10-16": Growth(Family("cifar10-16", CIFAR_16)),
    "cifar10": Growth(Family("cifar10", CIFAR_GROWTH)),
}


def tune(growth: Growth, rows: Rows) -> list[Job]:
    return stages.tune(growth.family, growth.rates, growth.tune_seeds, rows)


def best(growth: Growth, rows: Rows) -> Plain:
    """The tuned plain recipe."""
    jobs = tune(growth, rows)
    if not stages.complete(jobs, rows):
        raise NotReady("the plain learning rate is not tuned yet")
    return stages.best_of(jobs, rows)


def contrasts(growth: Growth, rows: Rows) -> list[Job]:
    """Every arm, seed by seed."""
    plain = best(growth, rows)
    return [
        Job(name_of(arm, times), growth.family.run(seed, plain.at(times), amplify, test=True))
        for seed in growth.seeds
        for arm, times, amplify in ARMS
    ]


def everything(growth: Growth, rows: Rows) -> list[Job]:
    """All runs that can be told so far."""
    jobs = tune(growth, rows)
    return [*jobs, *contrasts(growth, rows)] if stages.complete(jobs, rows) else jobs


def name_of(arm: str, times: float | None) -> str:
    if times is None:
        return arm
    return f"{arm}, {TIMES.get(times, f'{times:g} x best')}"


Accuracies = Mapping[str, list[float]]
Arm = tuple[str, float | None]  # its name, and its rate in units of the best, if it has one


def accuracies(jobs: Iterable[Job], rows: Rows) -> Accuracies:
    """Test accuracy by arm. A run that diverged counts as it came out."""
    found: dict[str, list[float]] = {}
    for job in jobs:
        row = rows.get(job.run.key)
        if row is not None and row.test is not None:
            found.setdefault(job.arm, []).append(row.test)
    return found


def differences(growth: Growth, rows: Rows) -> dict[tuple[str, str], Interval | None]:
    """Of all contrasts, in the order in which they were fixed."""
    return contrasted(CONTRASTS, accuracies(contrasts(growth, rows), rows))


def contrasted(
    pairs: Iterable[tuple[Arm, Arm]], found: Accuracies
) -> dict[tuple[str, str], Interval | None]:
    """The mean of the first of each pair minus that of the second."""
    names = [(name_of(*a), name_of(*b)) for a, b in pairs]
    return {(a, b): statistics.welch(found.get(a, ()), found.get(b, ())) for a, b in names}
