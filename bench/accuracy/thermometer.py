"""The mean direction against the learning rate: does it cross zero where the rate is best?

python -m bench.accuracy thermometer            plain runs that are measured; resumable
python -m bench.accuracy thermometer --report   table and figure of what is there; runs nothing

CIFAR-10 averaged to 16 by 16, 5,000 training images held out to judge by, none of the test images.
A run is so short that its network does not finish learning: what is best is best for so many steps.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bench.accuracy import models, small_runs, thermometer_report
from bench.accuracy.data import DataMissing, load
from bench.accuracy.lines import part, read_records
from gradamp_fast import Amplifier, Schedule

OUT = Path(__file__).parent.parent / "results" / "accuracy" / "thermometer"
DATA = "cifar10-16"
HELD_OUT = 5000
STEPS = 400
# Read every ten steps from the step at which growth first decides until half of the run is over.
READINGS = range(50, STEPS // 2 + 1, 10)
SEEDS = range(3)
BATCHES = (32, 128, 512)
LOWEST = {"SGD": 0.0025, "momentum": 0.00025, "AdamW": 1e-5}
RATES = {name: [lowest * 2**k for k in range(12)] for name, lowest in LOWEST.items()}
OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "SGD": lambda model, lr: torch.optim.SGD(model.parameters(), lr),
    "momentum": lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9),
    "AdamW": lambda model, lr: torch.optim.AdamW(model.parameters(), lr),
}


def mlp(classes: int) -> nn.Sequential:
    """Without norm."""
    hidden = [nn.Linear(3 * 16 * 16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, classes))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "cnn_bn": lambda classes: models.build("cnn", classes, 0.5),
    "mlp": mlp,
}


@dataclass(frozen=True)
class Run:
    """Everything that an outcome depends on, but for the machine. `rate` falls linearly to 0."""

    network: str
    optimizer: str
    batch: int
    steps: int
    rate: float
    seed: int


@dataclass(frozen=True)
class Row(Run):
    """A finished run: a line of the CSV.

    Attributes:
        direction: mean of the readings; NaN if the run diverged.
        accuracy, loss: on the images held out, after the last step.
    """

    direction: float
    accuracy: float
    loss: float
    seconds: float
    device: str
    torch: str
    commit: str
    date: str

    @property
    def run(self) -> Run:
        return part(Run, self)


def wanted() -> Iterator[Run]:
    """Seed by seed, so that what is there is balanced."""
    for seed, network, batch in itertools.product(SEEDS, NETWORKS, BATCHES):
        for optimizer, rates in RATES.items():
            for rate in rates:
                yield Run(network, optimizer, batch, STEPS, rate, seed)


Images = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@cache
def images(root: str) -> Images:
    """Training images and labels, then those held out: fp32, neither padded nor moved."""
    data = load(DATA, root).hold_out(HELD_OUT)
    inner = slice(data.padding, -data.padding)

    def normalised(images: torch.Tensor) -> torch.Tensor:
        return ((images - data.mean) / data.std).permute(0, 3, 1, 2).contiguous()

    train, held = normalised(data.train_images[:, inner, inner]), normalised(data.test_images)
    return train, data.train_labels, held, data.test_labels


def execute(run: Run, root: str, about: Mapping[str, Any]) -> Row:
    """Trains plainly and reads the direction; `about` holds the cells on machine and code."""
    start = time.perf_counter()
    train, labels, held, held_labels = images(root)
    torch.manual_seed(run.seed)
    model = NETWORKS[run.network](10)
    optimizer = OPTIMIZERS[run.optimizer](model, run.rate)
    never = Schedule([(run.steps, run.steps + 1)], unit="step")
    amplifier = Amplifier(model, measure="direction", decay=0.9, min_steps=2, schedule=never)
    generator = torch.Generator().manual_seed(run.seed)
    readings = []
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.rate * (run.steps - step) / run.steps
        here = torch.randint(len(labels), (run.batch,), generator=generator)
        loss = cross_entropy(model(train[here]), labels[here])
        optimizer.zero_grad()
        loss.backward()
        amplifier.step()
        optimizer.step()
        if step + 1 in READINGS:
            readings.append(amplifier.report().direction)
    model.eval()
    with torch.no_grad():
        logits = model(held)
    return Row(
        **asdict(run),
        direction=fmean(readings),
        accuracy=float((logits.argmax(1) == held_labels).double().mean()),
        loss=float(cross_entropy(logits, held_labels)),
        seconds=round(time.perf_counter() - start, 2),
        **about,
    )


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy thermometer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--report", action="store_true", help="run nothing; write and print the table")
    add("--root", default="data", metavar="DIR", help="where CIFAR lies")
    add("--out", type=Path, default=OUT, metavar="DIR", help="where the CSV and the page go")
    add("--workers", type=int, default=1, metavar="N", help="processes that share the work")
    add("--commit", metavar="HASH", help="of this code, where git cannot tell")
    return parser.parse_args(argv)


def told(row: Row) -> str:
    return (
        f"{row.network}, {row.optimizer} {row.rate:g}, batch {row.batch}, seed {row.seed}: "
        f"direction {row.direction:+.3f}, {row.accuracy:.1%}"
    )


def main(argv: Sequence[str]) -> int:
    """The command line, without its first word."""
    given = arguments(argv)
    path = given.out / f"{DATA}.csv"
    try:
        if not given.report:
            do = partial(execute, root=given.root)
            small_runs.work(wanted(), path, Row, do, told, given.workers, given.commit)
        rows = read_records(path, Row)
    except (DataMissing, ValueError) as error:
        sys.exit(f"python -m bench.accuracy thermometer: {error}")
    page = thermometer_report.page(rows, given.out / f"{DATA}.png")
    (given.out / f"{DATA}.md").write_text(page)
    print(page)
    return 0
