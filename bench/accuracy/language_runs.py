"""A character transformer on the sources of Python's standard library: one run, and its outcome."""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradamp_fast
from bench.accuracy.grow_runs import SCHEDULES
from bench.accuracy.lines import part
from bench.accuracy.small_runs import grown
from bench.whole_step import SmallGPT

CONTEXT = 64  # characters
BATCH = 16  # sequences
STEPS = 600
DECAY = 0.01
HELD_OUT = 256  # sequences of each part that is not trained on


@dataclass(frozen=True)
class Run:
    """Everything that an outcome depends on, but for the machine. `rate` is the highest.

    `part`: "validation", by which the plain rate is tuned, or "test", for the contrasts.
    """

    rate: float
    grow: bool
    seed: int
    part: str


@dataclass(frozen=True)
class Row(Run):
    """A finished run: a line of the CSV.

    Attributes:
        loss: mean cross-entropy of a character after the last step, in nats.
        factor: geometric mean over layers, weighted by elements, after the last step.
        settled: share of the layers that are.
        characters: of the text that was trained on.
    """

    loss: float
    factor: float
    settled: float
    characters: int
    seconds: float
    device: str
    torch: str
    commit: str
    date: str

    @property
    def run(self) -> Run:
        return part(Run, self)


@dataclass(frozen=True)
class Text:
    """Characters as numbers, int64 [characters] each."""

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: int


@cache
def text() -> Text:
    """Every tenth file is for validation and every tenth for the test; ASCII, the rest is one."""
    folder = Path(sysconfig.get_path("stdlib"))
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    kinds = {0: "validation", 1: "test"}
    for number, path in enumerate(sorted(folder.glob("*.py"))):
        parts[kinds.get(number % 10, "train")].append(path.read_text("utf-8", "replace"))
    whole = {name: "".join(of) for name, of in parts.items()}
    known = sorted({c for c in whole["train"] if c.isascii()})
    numbers = {c: index + 1 for index, c in enumerate(known)}
    tensors = {
        name: torch.tensor([numbers.get(c, 0) for c in of], dtype=torch.int64)
        for name, of in whole.items()
    }
    return Text(**tensors, vocabulary=len(known) + 1)


def network(vocabulary: int) -> nn.Module:
    """Five blocks of width 128: a million parameters."""
    return SmallGPT(vocabulary, context=CONTEXT, width=128, blocks=5, heads=4)


def held_out(source: Tensor) -> Tensor:
    """The same sequences for every run, evenly over the part: int64 [sequences, context + 1]."""
    starts = torch.linspace(0, len(source) - CONTEXT - 1, HELD_OUT).long()
    return source[starts[:, None] + torch.arange(CONTEXT + 1)]


def loss_of(model: nn.Module, sequences: Tensor) -> Tensor:
    logits = model(sequences[:, :-1])
    return cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())


def rate_at(run: Run, step: int) -> float:
    """Rises to the run's rate, then falls linearly to 0."""
    return run.rate * SCHEDULES["warm-up"]((step + 1) / (STEPS + 1))


def execute(run: Run, about: Mapping[str, Any], steps: int = STEPS) -> Row:
    """Trains by AdamW; `about` holds the row's cells on machine and code.

    Runs that differ in nothing but `grow` start from the same weights and see the same batches.
    """
    start = time.perf_counter()
    source = text()
    torch.manual_seed(run.seed)
    model = network(source.vocabulary)
    optimizer = gradamp_fast.optim.AdamW(model.parameters(), run.rate, weight_decay=DECAY)
    amplifier = None
    if run.grow:
        amplifier = gradamp_fast.Amplifier(model, grow=True)
        amplifier.attach(optimizer)
    generator = torch.Generator().manual_seed(run.seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(run, step)
        first = torch.randint(len(source.train) - CONTEXT - 1, (BATCH, 1), generator=generator)
        loss = loss_of(model, source.train[first + torch.arange(CONTEXT + 1)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        loss = loss_of(model, held_out(getattr(source, run.part)))
    factor, settled = grown(amplifier)
    return Row(
        **asdict(run),
        loss=float(loss),
        factor=factor,
        settled=settled,
        characters=len(source.train),
        seconds=round(time.perf_counter() - start, 2),
        **about,
    )
