"""Runs a stage's jobs for as long as there is time."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timezone

import torch

from bench.accuracy.runs import Run, execute, held_out
from bench.accuracy.stages import STAGES, Experiment
from bench.accuracy.store import Store
from bench.data import Data
from bench.train import train

WARM_UP, PROBED = 5, 10  # steps
SLACK = 1.1  # an estimate covers what varies
WAIT = 1.0  # seconds between looks, while other workers have all that is left


class Probed(Exception):
    """Enough steps were seen."""


class Estimates:
    """Seconds that a run takes: as long a step as the slowest run like it, or as a few tried."""

    def __init__(self) -> None:
        self._tried: dict[str, float] = {}
        self._seen: dict[str, float] = {}

    def seconds(self, run: Run, data: Data, say: Callable[[str], object]) -> float:
        kind = _kind(run)
        if kind not in self._seen and kind not in self._tried:
            self._tried[kind] = probe(run, data)
            images = run.recipe.batch / self._tried[kind]
            say(f"{kind}: {1e3 * self._tried[kind]:.1f} ms a step, {images:,.0f} images a second")
        return self._seen.get(kind, self._tried.get(kind, 0.0)) * _steps(run, data) * SLACK

    def learn(self, run: Run, data: Data, seconds: float) -> None:
        kind = _kind(run)
        self._seen[kind] = max(self._seen.get(kind, 0.0), seconds / _steps(run, data))


def _kind(run: Run) -> str:
    recipe = run.recipe
    amplified = "plain" if run.amplify is None else "amplified"
    return f"{run.data} {recipe.arch} {recipe.width:g} {recipe.batch} {amplified}"


def _steps(run: Run, data: Data) -> int:
    return held_out(data, run.validation, run.train).steps(run.recipe.batch) * run.recipe.epochs


def probe(run: Run, data: Data) -> float:
    """Seconds a step, over the first few after the first ones; nothing is kept of them."""
    count, start = 0, 0.0

    def on_step() -> None:
        nonlocal count, start
        count += 1
        if count in (WARM_UP, WARM_UP + PROBED):
            if data.device.type == "cuda":
                torch.cuda.synchronize(data.device)
            if count > WARM_UP:
                raise Probed
            start = time.perf_counter()

    part = held_out(data, run.validation, run.train)
    with contextlib.suppress(Probed):
        train(part, replace(run.recipe, epochs=WARM_UP + PROBED), run.amplify, on_step)
    return (time.perf_counter() - start) / PROBED


def work(
    stage: str,
    experiment: Experiment,
    store: Store,
    load: Callable[[str], Data],
    about: Mapping[str, str],
    budget: float = math.inf,
    say: Callable[[str], object] = print,
) -> int:
    """Runs what the stage wants and nobody has run, in order; returns how many runs are left.

    Ends when all is done, or when the next run would not end within `budget` seconds. `load`
    gives a data set by its name, `about` the rows' cells on machine and code. Raises `NotReady`
    if an earlier stage is not finished.
    """
    end = time.monotonic() + budget
    estimates = Estimates()
    while True:
        rows = store.rows()
        jobs = STAGES[stage](experiment, rows)
        left = [job for job in jobs if job.run.key not in rows]
        if not left:
            say(f"{stage}: all {len(jobs)} runs are there")
            return 0
        job = next((job for job in left if store.claim(job.run)), None)
        if job is None:
            if time.monotonic() + WAIT > end:
                return len(left)
            time.sleep(WAIT)
            continue
        try:
            if job.run.key in store.rows():  # finished by another worker since
                continue
            data = load(job.run.data)
            if math.isfinite(end):
                needed, there = estimates.seconds(job.run, data, say), end - time.monotonic()
                if needed > there:
                    say(
                        f"{stage}: {len(left)} of {len(jobs)} runs are left; the next takes about "
                        f"{needed:.0f} s, of the budget there are {max(there, 0.0):.0f} s"
                    )
                    return len(left)
            now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
            cells = {**about, "stage": stage, "arm": job.arm, "date": now}
            row = execute(job.run, data, cells)
            store.add(row)
            estimates.learn(job.run, data, row.seconds)
            say(
                f"{stage}: {job.arm}, seed {row.seed}: validation {row.validation:.2%}, "
                f"{row.seconds:.1f} s{', diverged' if row.diverged else ''}"
            )
        finally:
            store.release(job.run)
