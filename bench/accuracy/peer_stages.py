"""Which runs a comparison with optimizers that find a learning rate by themselves wants.

Each runs at its defaults, its learning rate of 1 falling linearly as everywhere else. Beside them
AdamW at its defaults: tuned, and from a rate that is far too low, plain and growing.
"""

from __future__ import annotations

from dataclasses import replace

from bench.accuracy import growth_stages, stages
from bench.accuracy.growth_stages import BEST, GROWING, LOW, Arm, Growth
from bench.accuracy.optimizers import PEERS
from bench.accuracy.stages import Job, Options, Plain
from bench.accuracy.statistics import Interval
from bench.accuracy.store import Rows

# Fixed before any of these runs was made. A peer has no other rate than its own.
ADAMW_LOW = 1e-5
ADAMW_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
ADAMW_DECAY = 0.01
ADAMW: tuple[tuple[str, bool, Options | None], ...] = (
    ("AdamW growing from 1e-5", False, GROWING),
    ("AdamW, best", True, None),
    ("AdamW at 1e-5", False, None),
)
CONTRASTS: tuple[tuple[Arm, Arm], ...] = (
    *((("growing", LOW), (name, None)) for name in PEERS),
    *(((name, None), ("plain", BEST)) for name in PEERS),
    (("AdamW growing from 1e-5", None), ("AdamW at 1e-5", None)),
    (("AdamW growing from 1e-5", None), ("AdamW, best", None)),
    (("AdamW growing from 1e-5", None), ("prodigy", None)),
)


def peers(growth: Growth, rows: Rows) -> list[Job]:
    """AdamW tuned; then every arm, seed by seed, on the test images."""
    jobs = growth_stages.tune(adamw(growth), rows)
    if not stages.complete(jobs, rows):
        return jobs
    return [*jobs, *arms(growth, rows)]


def adamw(growth: Growth) -> Growth:
    """The same experiment under AdamW, tuned with one seed."""
    recipe = replace(growth.family.recipe, optimizer="adamw", weight_decay=ADAMW_DECAY)
    family = replace(growth.family, recipe=recipe)
    return replace(growth, family=family, rates=ADAMW_RATES, tune_seeds=range(1))


def adamw_is_tuned(growth: Growth, rows: Rows) -> bool:
    return stages.complete(growth_stages.tune(adamw(growth), rows), rows)


def arms(growth: Growth, rows: Rows) -> list[Job]:
    """AdamW's once it is tuned."""
    jobs = []
    for seed in growth.seeds:
        for arm, tuned, amplify in ADAMW if adamw_is_tuned(growth, rows) else ():
            best = growth_stages.best(adamw(growth), rows)
            rate = best if tuned else best._replace(lr=ADAMW_LOW)
            jobs.append(Job(arm, adamw(growth).family.run(seed, rate, amplify, test=True)))
        for name in PEERS:
            recipe = replace(growth.family.recipe, optimizer=name)
            family = replace(growth.family, recipe=recipe)
            jobs.append(Job(name, family.run(seed, Plain(1.0, 0.0), test=True)))
    return jobs


def differences(growth: Growth, rows: Rows) -> dict[tuple[str, str], Interval | None]:
    """Of all contrasts, in the order in which they were fixed."""
    jobs = [*growth_stages.contrasts(growth, rows), *arms(growth, rows)]
    return growth_stages.contrasted(CONTRASTS, growth_stages.accuracies(jobs, rows))
