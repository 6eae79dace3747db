"""Which runs a network wants whose gradients vanish: ten layers of tanh, without norm or skips."""

from __future__ import annotations

from dataclasses import replace

from bench.accuracy import growth_stages, stages
from bench.accuracy.growth_stages import BEST, GROWING, LOW, Growth, name_of
from bench.accuracy.stages import Job, Options
from bench.accuracy.statistics import Interval
from bench.accuracy.store import Rows

# The layers with the smallest gradients, half of all, by 2.
SMALL: Options = {
    "measure": "variance", "select": "below", "threshold": "quantile", "quantile": 0.5,
    "factor": 2.0, "decay": 0.99, "min_steps": 100, "refresh": 100,
}  # fmt: skip
ARMS: tuple[tuple[str, float, Options | None], ...] = (
    ("plain", BEST, None),
    ("growing", BEST, GROWING),
    ("variance below", BEST, SMALL),
    ("plain", LOW, None),
    ("growing", LOW, GROWING),
)
# Fixed before any of these runs was made.
CONTRASTS = (
    (("growing", BEST), ("plain", BEST)),
    (("growing", LOW), ("plain", BEST)),
    (("growing", LOW), ("plain", LOW)),
    (("variance below", BEST), ("plain", BEST)),
)


def network(growth: Growth) -> Growth:
    """The same experiment with that network."""
    recipe = replace(growth.family.recipe, arch="tanh", width=1.0)
    return replace(growth, family=replace(growth.family, recipe=recipe))


def vanishing(growth: Growth, rows: Rows) -> list[Job]:
    """The plain learning rate, tuned anew; then every arm, seed by seed, on the test images."""
    here = network(growth)
    jobs = growth_stages.tune(here, rows)
    if not stages.complete(jobs, rows):
        return jobs
    return [*jobs, *arms(growth, rows)]


def arms(growth: Growth, rows: Rows) -> list[Job]:
    here = network(growth)
    plain = growth_stages.best(here, rows)
    return [
        Job(name_of(arm, times), here.family.run(seed, plain.at(times), amplify, test=True))
        for seed in here.seeds
        for arm, times, amplify in ARMS
    ]


def differences(growth: Growth, rows: Rows) -> dict[tuple[str, str], Interval | None]:
    """Of all contrasts, in the order in which they were fixed."""
    found = growth_stages.accuracies(arms(growth, rows), rows)
    return growth_stages.contrasted(CONTRASTS, found)
