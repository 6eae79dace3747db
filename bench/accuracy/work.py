"""Runs a stage's jobs, in this process or in several, for as long as there is time."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from bench.accuracy.data import Data, load
from bench.accuracy.runs import Row, execute
from bench.accuracy.stages import Job
from bench.accuracy.store import Rows, Store
from bench.results import describe_machine


@dataclass(frozen=True)
class Place:
    """Where runs are made: the folder of the data, torch's device, the code's commit if told."""

    root: str
    device: str
    commit: str | None = None

    def run(self, stage: str, job: Job) -> Row:
        """One run, in whichever process."""
        torch.backends.cudnn.benchmark = True
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        cells = {**_about(self), "stage": stage, "arm": job.arm, "date": now}
        return execute(job.run, _data(job.run.data, self), cells)


@functools.cache
def _about(place: Place) -> Mapping[str, str]:
    machine = describe_machine(torch.device(place.device))
    on_cpu, name = place.device.startswith("cpu"), machine["name"]
    return {
        "device": f"{name}, {machine['threads']} threads" if on_cpu else name,
        "torch": machine["torch"],
        "commit": place.commit or machine["commit"],
    }


@functools.cache
def _data(name: str, place: Place) -> Data:
    return load(name, place.root, device=place.device)


class Here(Executor):
    """Does what it is given at once, in this process."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*args, **named))
        return future


def work(
    stage: str,
    wanted: Callable[[Rows], list[Job]],
    store: Store,
    run: Callable[[str, Job], Row],
    pool: Executor,
    workers: int = 1,
    budget: float = math.inf,
    say: Callable[[str], object] = print,
) -> int:
    """Runs what the stage wants and nobody has run, in order; returns how many runs are left.

    `wanted` gives the stage's runs, from those that are finished.
    No run begins after `budget` seconds. Raises `NotReady` if an earlier stage is not finished.
    This process alone writes to `store`.
    """
    end = time.monotonic() + budget
    running: dict[Future[Row], Job] = {}
    while True:
        rows = store.rows()
        jobs = wanted(rows)
        left = {job.run.key: job for job in jobs if job.run.key not in rows}
        begun = {job.run.key for job in running.values()}
        waiting = [job for key, job in left.items() if key not in begun]
        for job in waiting[: workers - len(running)]:
            if time.monotonic() < end:
                running[pool.submit(run, stage, job)] = job
        if not running:
            say(f"{stage}: {len(left)} of {len(jobs)} runs are left")
            return len(left)
        for done in wait(running, return_when=FIRST_COMPLETED).done:
            job, row = running.pop(done), done.result()
            store.add(row)
            say(
                f"{stage}: {job.arm}, seed {row.seed}: validation {row.validation:.2%}, "
                f"{row.seconds:.1f} s{', diverged' if row.diverged else ''}"
            )
