"""Which runs a comparison with optimizers that find a learning rate by themselves wants.

Each runs at its defaults, its learning rate of 1 falling linearly as everywhere else.
"""

from __future__ import annotations

from dataclasses import replace

from bench.accuracy import growth_stages
from bench.accuracy.growth_stages import BEST, LOW, Arm, Growth
from bench.accuracy.optimizers import PEERS
from bench.accuracy.stages import Job, Plain
from bench.accuracy.statistics import Interval
from bench.accuracy.store import Rows

# Fixed before any of these runs was made. A peer has no other rate than its own.
CONTRASTS: tuple[tuple[Arm, Arm], ...] = (
    *((("growing", LOW), (name, None)) for name in PEERS),
    *(((name, None), ("plain", BEST)) for name in PEERS),
)


def peers(growth: Growth, rows: Rows) -> list[Job]:
    """Every peer, seed by seed, on the test images; nothing has to be tuned before."""
    del rows
    jobs = []
    for seed in growth.seeds:
        for name in PEERS:
            recipe = replace(growth.family.recipe, optimizer=name)
            family = replace(growth.family, recipe=recipe)
            jobs.append(Job(name, family.run(seed, Plain(1.0, 0.0), test=True)))
    return jobs


def differences(growth: Growth, rows: Rows) -> dict[tuple[str, str], Interval | None]:
    """Of all contrasts, in the order in which they were fixed."""
    jobs = [*growth_stages.contrasts(growth, rows), *peers(growth, rows)]
    return growth_stages.contrasted(CONTRASTS, growth_stages.accuracies(jobs, rows))
