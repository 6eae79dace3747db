"""Runs that one core makes in seconds: each a line of a CSV file, in several processes."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from bench.accuracy.lines import append_record, read_records
from bench.results import describe_machine
from gradamp_fast import Amplifier

Outcome = TypeVar("Outcome", bound="Finished")


class Finished(Protocol):
    """A dataclass of plain values, the columns of the file."""

    @property
    def seconds(self) -> float: ...

    @property
    def run(self) -> Any: ...


def work(
    wanted: Iterable[Any],
    path: Path,
    kind: type[Outcome],
    execute: Callable[..., Outcome],
    told: Callable[[Outcome], str],
    workers: int = 1,
    commit: str | None = None,
) -> None:
    """Runs what nobody has run yet, in order, and stores each as it ends.

    ``execute(run, about=cells)``; the cells say on which machine and code.
    """
    runs = list(wanted)
    there = {row.run for row in read_records(path, kind)}
    left = [run for run in runs if run not in there]
    print(f"{len(runs) - len(left)} of {len(runs)} runs are there", flush=True)
    machine = describe_machine(torch.device("cpu"))
    about = {
        "device": machine["name"],
        "torch": machine["torch"],
        "commit": commit or machine["commit"],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    for number, row in enumerate(_made(left, partial(execute, about=about), workers), 1):
        append_record(path, row)
        print(f"{number}/{len(left)} {told(row)}, {row.seconds:.1f} s", flush=True)


def grown(amplifier: Amplifier | None) -> tuple[float, float]:
    """Geometric mean of the layers' factors, weighted by elements; share of layers that settled."""
    if amplifier is None:
        return 1.0, 0.0
    layers = amplifier.report().layers
    elements = sum(layer.numel for layer in layers)
    factor = math.exp(sum(a.numel * math.log(a.factor) for a in layers) / elements)
    return factor, sum(layer.settled for layer in layers) / len(layers)


def _made(runs: list[Any], execute: Callable[[Any], Outcome], workers: int) -> Iterator[Outcome]:
    if workers == 1:
        _one_thread()
        yield from map(execute, runs)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _one_thread) as pool:
        yield from pool.imap_unordered(execute, runs)


def _one_thread() -> None:
    """Networks as small as these are slower on several."""
    torch.set_num_threads(1)
