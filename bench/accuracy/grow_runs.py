"""One run with or without growing amplification: what it is, and what came of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gradamp_fast
from bench.accuracy.data import Data, load
from bench.accuracy.grow_nets import NETWORKS
from bench.accuracy.lines import part, read_records
from bench.accuracy.small_runs import grown

WARM_UP = 0.1  # share of the steps


def _warm_up(done: float) -> float:
    return min(done / WARM_UP, (1 - done) / (1 - WARM_UP))


# The learning rate by the share of the steps that are done, as a multiple of the given one.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "warm-up": _warm_up,
}
OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "SGD": lambda model, lr: torch.optim.SGD(model.parameters(), lr),
    "momentum": lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9),
    "AdamW": lambda model, lr: gradamp_fast.optim.AdamW(model.parameters(), lr),
}


@dataclass(frozen=True)
class Run:
    """Everything that an outcome depends on, but for the machine. `rate` is the highest."""

    network: str
    optimizer: str
    batch: int
    schedule: str
    steps: int
    rate: float
    grow: bool
    seed: int


@dataclass(frozen=True)
class Row(Run):
    """A finished run: a line of the CSV.

    Attributes:
        accuracy: on the test images after the last step, 0 to 1.
        factor: geometric mean over layers, weighted by elements, after the last step.
        settled: share of the layers that are.
    """

    accuracy: float
    factor: float
    settled: float
    seconds: float
    device: str
    torch: str
    commit: str
    date: str

    @property
    def run(self) -> Run:
        return part(Run, self)


def read(path: Path) -> list[Row]:
    """The rows of a file, none if there is no file; a last line without its end is not one."""
    return read_records(path, Row)


@cache
def _data(name: str) -> Data:
    return load(name)


def _batches(data: Data, size: int, generator: torch.Generator) -> Iterable[torch.Tensor]:
    """Indices of training images, epoch after epoch, without end."""
    count = len(data.train_labels)
    if size > count:
        raise ValueError(f"batch={size}: there are {count} training images")
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def _images(data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and test images, fp32 [N, 1, H, W], neither padded nor moved."""
    inner = slice(data.padding, -data.padding)
    train = data.train_images[:, inner, inner]
    train, test = (
        ((images[..., 0] - data.mean[0]) / data.std[0]).unsqueeze(1)
        for images in (train, data.test_images)
    )
    return train, test


def execute(run: Run, name: str, about: Mapping[str, Any]) -> Row:
    """Trains on the data of that name; `about` holds the row's cells on machine and code.

    Runs that differ in nothing but `grow` start from the same weights and see the same batches.
    """
    start = time.perf_counter()
    data = _data(name)
    train, test = _images(data)
    torch.manual_seed(run.seed)
    model = NETWORKS[run.network](data.classes)
    optimizer = OPTIMIZERS[run.optimizer](model, run.rate)
    amplifier = None
    if run.grow:
        amplifier = gradamp_fast.Amplifier(model, grow=True)
        amplifier.attach(optimizer)
    batches = iter(_batches(data, run.batch, torch.Generator().manual_seed(run.seed)))
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.rate * SCHEDULES[run.schedule]((step + 1) / (run.steps + 1))
        here = next(batches)
        loss = cross_entropy(model(train[here]), data.train_labels[here])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        correct = model(test).argmax(1) == data.test_labels
    factor, settled = grown(amplifier)
    return Row(
        **asdict(run),
        accuracy=float(correct.double().mean()),
        factor=factor,
        settled=settled,
        seconds=round(time.perf_counter() - start, 2),
        **about,
    )
