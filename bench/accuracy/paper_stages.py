"""Which runs the published idea wants at that scale: a fixed factor of 2 on chosen layers.

Every arm but two amplifies half of the elements; "all" amplifies all of them, "backward" half of
the layers in backpropagation itself. "random" is the control: as many elements, drawn anew at every
decision. Rates are multiples of the best plain one, which `growth_stages.tune` has chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from bench.accuracy import growth_stages
from bench.accuracy.growth_stages import Growth, name_of
from bench.accuracy.presets import RECIPES
from bench.accuracy.stages import Job, Options
from bench.accuracy.statistics import Interval
from bench.accuracy.store import Rows

# Without a warm-up and with rates in steps, as in the paper; then linear with a warm-up.
SCHEDULES: Mapping[str, Mapping[str, Any]] = {"steps": RECIPES["paper"], "warm-up": {"warmup": 0.1}}
TIMES = (1.0, 4.0)
HALF: Options = {
    "factor": 2.0, "dose": 0.5, "exclude_bias_and_norm": True, "decay": 0.99, "min_steps": 100,
    "refresh": 100, "threshold": "quantile", "quantile": 0.5,
}  # fmt: skip
CHOSEN = {
    f"{measure} {select}": {**HALF, "measure": measure, "select": select}
    for measure in ("fluctuation", "direction")
    for select in ("below", "above")
}
ALL: Options = {
    "measure": "variance", "threshold": 1e9, "min_steps": 1, "refresh": 1, "timing": "exact",
}  # fmt: skip


def arms(seed: int) -> dict[str, Options | None]:
    """What is run beside each other, the same at each rate and under each schedule."""
    random = {"measure": "random", "seed": seed}
    backward = {
        "placement": "backward", "measure_every": 10, "min_steps": 10, "refresh": 10,
        "threshold": "quantile", "quantile": 0.5, "factor": 2.0,
    }  # fmt: skip
    return {
        "plain": None, **CHOSEN, "random": {**HALF, **random}, "all": ALL,
        "backward": {**backward, **random},
    }  # fmt: skip


# Fixed before any of these runs was made.
CONTRASTS = (
    *((arm, "plain") for arm in (*CHOSEN, "random", "all", "backward")),
    *((arm, "random") for arm in CHOSEN),
)


def paper(growth: Growth, rows: Rows, schedules: Iterable[str] = SCHEDULES) -> list[Job]:
    """Every arm, a schedule after the other and in each seed by seed; test images."""
    plain, family = growth_stages.best(growth, rows), growth.family
    jobs = []
    for schedule in schedules:
        here = replace(family, recipe=replace(family.recipe, **SCHEDULES[schedule]))
        for seed in growth.seeds:
            for times in TIMES:
                jobs += [
                    Job(name_of(arm, times), here.run(seed, plain.at(times), amplify, test=True))
                    for arm, amplify in arms(seed).items()
                ]
    return jobs


def differences(
    growth: Growth, rows: Rows, schedule: str
) -> dict[tuple[str, str], Interval | None]:
    """Of all contrasts under a schedule, in the order in which they were fixed."""
    found = growth_stages.accuracies(paper(growth, rows, [schedule]), rows)
    pairs = [((a, times), (b, times)) for times in TIMES for a, b in CONTRASTS]
    return growth_stages.contrasted(pairs, found)
