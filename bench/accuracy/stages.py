"""Which runs each stage wants, given what is known so far.

A stage is a function from an experiment and its finished runs to jobs in the order in which they
are to be run; later ones appear when the earlier ones are finished. Every choice that the
experiment makes is made here, on validation images; only `stage3` makes runs that look at the test
images, and it makes no choice by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from bench.accuracy.repeatability import Repeatability, judge
from bench.accuracy.runs import Row, Run
from bench.accuracy.store import Rows
from bench.accuracy.train import Recipe
from gradamp_fast import Schedule

EXTENSIONS = 3  # how often a grid of learning rates may grow to either side
Options = Mapping[str, Any]


class NotReady(Exception):
    """An earlier stage has to be finished first; the message says which."""


class Job(NamedTuple):
    arm: str
    run: Run


class Plain(NamedTuple):
    """A tuned plain recipe."""

    lr: float
    weight_decay: float

    def at(self, times: float) -> Plain:
        return self._replace(lr=times * self.lr)


class Chosen(NamedTuple):
    """What the screening chose: a rate, in units of the best plain one, and options."""

    times: float
    options: Options


@dataclass(frozen=True)
class Family:
    """What all runs of one part of the experiment have in common."""

    data: str
    recipe: Recipe  # its learning rate is only stage 0's
    train: int | None = None
    validation: int = 5000

    def run(
        self, seed: int, plain: Plain | None = None, amplify: Options | None = None, **more: bool
    ) -> Run:
        given = {} if plain is None else plain._asdict()
        recipe = replace(self.recipe, seed=seed, **given)
        return Run(self.data, self.train, self.validation, recipe, amplify, **more)


@dataclass(frozen=True)
class Experiment:
    """`screen` chooses, in small; `confirm` is what is then confirmed, and may be another."""

    screen: Family
    confirm: Family
    rates: Sequence[float] = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
    repeat_seeds: Sequence[int] = range(4)
    tune_seeds: Sequence[int] = range(2)
    screen_seeds: Sequence[int] = range(3)
    confirm_seeds: Sequence[int] = range(100, 108)  # fresh: nothing was chosen by them
    averagings: Mapping[str, Options] = field(
        default_factory=lambda: {
            "decay 0.99": {"decay": 0.99, "min_steps": 100, "refresh": 100},
            "by epoch": {"decay": None, "min_steps": 10, "refresh": "epoch"},
        }
    )


def rows_of(jobs: Iterable[Job], rows: Rows) -> list[Row]:
    """Of the jobs that are finished."""
    return [rows[job.run.key] for job in jobs if job.run.key in rows]


def complete(jobs: Iterable[Job], rows: Rows) -> bool:
    return all(job.run.key in rows for job in jobs)


# ---- stage 0: does a score repeat? --------------------------------------------------


def stage0(experiment: Experiment, rows: Rows) -> list[Job]:
    """Plain runs that are measured: every window of the schedule lies behind the end."""
    family = experiment.screen
    never = Schedule([(family.recipe.epochs, family.recipe.epochs + 1)])
    return [
        Job(name, family.run(seed, amplify={**options, "schedule": never}, scores=True))
        for seed in experiment.repeat_seeds
        for name, options in experiment.averagings.items()
    ]


def repeatabilities(experiment: Experiment, rows: Rows) -> list[Repeatability]:
    """Of every measure under every averaging, from the runs that are there."""
    jobs = stage0(experiment, rows)
    found = []
    for name, options in experiment.averagings.items():
        mine = rows_of((job for job in jobs if job.arm == name), rows)
        found += judge(mine, name, options["decay"])
    return found


def measures(experiment: Experiment, rows: Rows) -> list[Options]:
    """The two measures that repeat best, of those that reach the bar, as options.

    One that reaches it among layers with a kernel alone is screened on those.
    """
    if not complete(stage0(experiment, rows), rows):
        raise NotReady("stage 0 is not finished: it says which measures repeat")
    best: dict[str, Repeatability] = {}
    for found in repeatabilities(experiment, rows):
        other = best.get(found.measure)
        if found.repeats and (other is None or _rank(found) > _rank(other)):
            best[found.measure] = found
    if not best:
        raise NotReady("stage 0 found no measure that repeats: there is nothing to screen")
    two = sorted(best.values(), key=lambda found: -found.lowest)[:2]
    kernels = {"exclude_bias_and_norm": True}
    return [
        {
            "measure": f.measure,
            **experiment.averagings[f.averaging],
            **(kernels if f.scope == "kernels" else {}),
        }
        for f in two
    ]


def _rank(found: Repeatability) -> tuple[bool, float]:
    """All layers before kernels alone."""
    return found.scope == "all", found.lowest


# ---- stage 1: the best that goes without it -----------------------------------------


def stage1(experiment: Experiment, rows: Rows) -> list[Job]:
    """Learning rates, weight decays at the best, and everything amplified against its equal."""
    family, seeds = experiment.screen, experiment.tune_seeds
    jobs = tune(family, experiment.rates, seeds, rows)
    if not complete(jobs, rows):
        return jobs
    lr, decay = best_of(jobs, rows)
    decays = [Plain(lr, times * decay) for times in (0.5, 1.0, 2.0)]
    jobs += [_plain(family, plain, seed) for seed in seeds for plain in (decays[0], decays[2])]
    everything = {
        "measure": "variance", "threshold": 1e9, "min_steps": 1, "refresh": 1, "timing": "exact",
    }  # fmt: skip
    for seed in seeds:
        amplified = family.run(seed, Plain(lr, decay), everything)
        jobs.append(Job(f"all by 2, lr {lr:g}, wd {decay:g}", amplified))
        jobs.append(_plain(family, Plain(2 * lr, decay / 2), seed))
    return jobs


def tune(family: Family, rates: Sequence[float], seeds: Sequence[int], rows: Rows) -> list[Job]:
    """Plain runs over a grid, which grows for as long as the best is at its edge."""

    def grid() -> list[Job]:
        decay = family.recipe.weight_decay
        return [_plain(family, Plain(lr, decay), seed) for seed in seeds for lr in sorted(rates)]

    for _ in range(EXTENSIONS):
        if not complete(jobs := grid(), rows):
            return jobs
        best = best_of(jobs, rows).lr
        if best == max(rates):
            rates = [*rates, 2 * best]
        elif best == min(rates):
            rates = [*rates, best / 2]
        else:
            return jobs
    return grid()


def best_of(jobs: Iterable[Job], rows: Rows) -> Plain:
    """By mean validation accuracy over the seeds; a run that diverged counts as it came out."""
    found: dict[Plain, list[float]] = {}
    for job in jobs:
        plain = Plain(job.run.recipe.lr, job.run.recipe.weight_decay)
        if job.run.amplify is None:
            found.setdefault(plain, []).append(rows[job.run.key].validation)
    return max(found, key=lambda plain: sum(found[plain]) / len(found[plain]))


def tuned(experiment: Experiment, rows: Rows) -> Plain:
    jobs = stage1(experiment, rows)
    if not complete(jobs, rows):
        raise NotReady("stage 1 is not finished: it tunes the plain recipe")
    return best_of(jobs, rows)


def _plain(family: Family, plain: Plain, seed: int) -> Job:
    label = f"plain, lr {plain.lr:g}, wd {plain.weight_decay:g}"
    return Job(label, family.run(seed, plain))


# ---- stage 2: which layers, when, how strongly --------------------------------------

TIMES = (1.0, 4.0)  # learning rates, in units of the best plain one


def stage2(experiment: Experiment, rows: Rows) -> list[Job]:
    """Measures and sides at an equal dose; then windows and factors for the best of them."""
    jobs = sides(experiment, rows)
    if complete(jobs, rows):
        jobs += variants(experiment, rows)
    return jobs


def sides(experiment: Experiment, rows: Rows) -> list[Job]:
    plain = tuned(experiment, rows)
    half: Options = {"threshold": "quantile", "quantile": 0.5, "factor": 2.0}
    candidates = [
        {**measure, **half, "select": side}
        for measure in measures(experiment, rows)
        for side in ("below", "above")
    ]
    jobs = []
    for seed in experiment.screen_seeds:
        for times in TIMES:
            jobs.append(_plain(experiment.screen, plain.at(times), seed))
            jobs += [_amplified(experiment, times, plain, c, seed) for c in candidates]
    return jobs


def variants(experiment: Experiment, rows: Rows) -> list[Job]:
    plain, winner = tuned(experiment, rows), _winner(sides(experiment, rows), experiment, rows)
    epochs = experiment.screen.recipe.epochs
    middle = max(epochs // 2, 1)
    changed: list[Options] = [
        {"schedule": Schedule([(0, middle)])},
        {"schedule": Schedule([(middle, epochs)])},
        {"factor": 1.5},
        {"factor": 4.0},
    ]
    return [
        _amplified(experiment, winner.times, plain, {**winner.options, **change}, seed)
        for seed in experiment.screen_seeds
        for change in changed
    ]


def chosen(experiment: Experiment, rows: Rows) -> Chosen:
    """What the screening found best, by mean validation accuracy."""
    jobs = stage2(experiment, rows)
    if not complete(jobs, rows):
        raise NotReady("stage 2 is not finished: it chooses what is confirmed")
    return _winner(jobs, experiment, rows)


def _winner(jobs: Iterable[Job], experiment: Experiment, rows: Rows) -> Chosen:
    best = tuned(experiment, rows).lr
    found: dict[str, list[Job]] = {}
    for job in jobs:
        if job.run.amplify is not None:
            found.setdefault(job.run.key[0], []).append(job)

    def accuracy(group: list[Job]) -> float:
        return sum(rows[job.run.key].validation for job in group) / len(group)

    run = max(found.values(), key=accuracy)[0].run
    assert run.amplify is not None
    return Chosen(run.recipe.lr / best, run.amplify)


def _amplified(
    experiment: Experiment, times: float, plain: Plain, options: Options, seed: int
) -> Job:
    run = experiment.screen.run(seed, plain.at(times), options)
    return Job(f"{describe(options)}, lr x{times:g}", run)


def describe(options: Options) -> str:
    """Short words for a table."""
    words = [options["measure"], options["select"], f"by {options['factor']:g}"]
    if options["refresh"] == "epoch":
        words.append("by epoch")
    if options.get("exclude_bias_and_norm"):
        words.append("kernels")
    if options["threshold"] != "quantile":
        words.append(f"threshold {options['threshold']}")
    if "placement" in options:
        words.append(options["placement"])
    if "schedule" in options:
        words += [f"epochs {start:g}-{stop:g}" for start, stop, _ in options["schedule"].windows]
    return " ".join(words)


# ---- stage 3: confirmation on fresh seeds -------------------------------------------


def stage3(experiment: Experiment, rows: Rows) -> list[Job]:
    """The plain recipe tuned anew in the confirming family, then all arms, seed by seed."""
    jobs = retune(experiment, rows)
    if complete(jobs, rows):
        jobs += arms(experiment, rows)
    return jobs


def retune(experiment: Experiment, rows: Rows) -> list[Job]:
    lr, decay = tuned(experiment, rows)
    family = experiment.confirm
    family = replace(family, recipe=replace(family.recipe, weight_decay=decay))
    return tune(family, (lr / 2, lr, 2 * lr), experiment.tune_seeds, rows)


def arms(experiment: Experiment, rows: Rows) -> list[Job]:
    """ "plain" is plain at the chosen learning rate; it may be the tuned one."""
    times, options = chosen(experiment, rows)
    if not complete(tuning := retune(experiment, rows), rows):
        raise NotReady("stage 3 has not tuned the plain recipe of the confirming family yet")
    best = best_of(tuning, rows)
    here = best.at(times)
    family = experiment.confirm
    other = {"below": "above", "above": "below"}[options["select"]]
    jobs = []
    for seed in experiment.confirm_seeds:
        wanted: dict[str, tuple[Plain, Options | None]] = {
            "chosen": (here, options),
            "plain": (here, None),
            "plain, tuned": (best, None),
            "inverse": (here, {**options, "select": other}),
            "shuffled": (here, {**options, "shuffle": seed}),
            "random": (here, {**options, "measure": "random", "seed": seed}),
        }
        jobs += [
            Job(arm, family.run(seed, plain, amplify, test=True))
            for arm, (plain, amplify) in wanted.items()
        ]
    return jobs


# ---- more ---------------------------------------------------------------------------

MEASURED = 10


def more(experiment: Experiment, rows: Rows) -> list[Job]:
    """Other thresholds and placement for what was chosen; validation images, screening family."""
    plain = tuned(experiment, rows)
    times, options = chosen(experiment, rows)
    kept = {name: value for name, value in options.items() if name != "quantile"}
    return [
        _amplified(experiment, times, plain, changed, seed)
        for seed in experiment.screen_seeds
        for changed in (
            {**kept, "threshold": "mean"}, {**kept, "threshold": "std"}, _backward(options),
        )
    ]  # fmt: skip


def _backward(options: Options) -> Options:
    """The same during backpropagation, which measures one step in `MEASURED`, over as long."""
    changed: dict[str, Any] = {
        "placement": "backward",
        "measure_every": MEASURED,
        "min_steps": max(options["min_steps"] // MEASURED, 2),
    }
    if options["refresh"] != "epoch":
        changed["refresh"] = max(options["refresh"] // MEASURED, 1)
        changed["decay"] = options["decay"] ** MEASURED
    return {**options, **changed}


STAGES: dict[str, Callable[[Experiment, Rows], list[Job]]] = {
    stage.__name__: stage for stage in (stage0, stage1, stage2, stage3, more)
}
