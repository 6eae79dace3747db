"""Growing amplification on CIFAR-10: plain and growing, at rates from far too low to too high.

python -m bench.accuracy growth --data cifar10-16           averaged to 16 by 16, for a CPU
python -m bench.accuracy growth --data cifar10              32 by 32, for a GPU
python -m bench.accuracy growth paper --data cifar10-16     a fixed factor on chosen layers instead
python -m bench.accuracy growth vanishing                   ten layers of tanh
python -m bench.accuracy growth peers                       optimizers that find a rate themselves
python -m bench.accuracy growth --data cifar10-16 --report  page and figure; runs nothing
python -m bench.accuracy growth --data cifar10-16 --docs    writes the tables of docs/accuracy.md

Every command goes on where an earlier one ended.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from bench.accuracy import (
    growth_report,
    growth_stages,
    paper_stages,
    peer_stages,
    thermometer,
    vanishing_stages,
)
from bench.accuracy.data import DataMissing
from bench.accuracy.growth_stages import EXPERIMENTS, Growth
from bench.accuracy.lines import read_records
from bench.accuracy.optimizers import OptimizerMissing
from bench.accuracy.stages import NotReady
from bench.accuracy.store import Store
from bench.accuracy.work import Here, Place, work

OUT = Path(__file__).parent.parent / "results" / "accuracy" / "growth"
PARTS = {
    "contrasts": growth_stages.everything,
    "paper": paper_stages.paper,
    "peers": peer_stages.peers,
    "vanishing": vanishing_stages.vanishing,
}
DOCUMENT = Path(__file__).parents[2] / "docs" / "accuracy.md"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("part", nargs="?", choices=PARTS, default="contrasts", help="default: %(default)s")
    add("--data", choices=EXPERIMENTS, default="cifar10-16", help="default: %(default)s")
    add("--root", default="data", metavar="DIR", help="where CIFAR lies")
    add("--device", default="cuda" if cuda else "cpu", help="default here: %(default)s")
    add("--out", type=Path, default=OUT, metavar="DIR", help="where the CSV and the page go")
    add("--report", action="store_true", help="run nothing; write and print the page")
    add("--docs", action="store_true", help="run nothing; fill the tables of docs/accuracy.md")
    add("--budget-s", type=float, default=math.inf, metavar="S", help="begin no run later")
    add("--workers", type=int, default=1, metavar="N", help="processes that share the work")
    add("--commit", metavar="HASH", help="of this code, where git cannot tell")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """The command line, without its first word."""
    given = arguments(argv)
    experiment = EXPERIMENTS[given.data]
    store = Store(given.out / f"{given.data}-{given.device.partition(':')[0]}.csv")
    measured = read_records(thermometer.OUT / f"{thermometer.DATA}.csv", thermometer.Row)
    if given.docs:
        growth_report.write(DOCUMENT, experiment, store.rows(), measured)
        return 0
    if not given.report:
        run(experiment, store, given)
    name = store.path.stem
    page = growth_report.page(experiment, store.rows(), given.out / f"{name}.png", measured)
    (given.out / f"{name}.md").write_text(page)
    print(page)
    return 0


def run(experiment: Growth, store: Store, given: argparse.Namespace) -> None:
    """What nobody has run yet, until the budget ends."""
    pool: Executor = Here()
    if given.workers > 1:
        pool = ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn"))
    place = Place(given.root, given.device, given.commit)
    try:
        with pool:
            work(
                "growth", partial(PARTS[given.part], experiment), store, place.run, pool,
                given.workers, given.budget_s, partial(print, flush=True),
            )  # fmt: skip
    except (DataMissing, NotReady, OptimizerMissing, ValueError) as error:
        sys.exit(f"python -m bench.accuracy growth: {error}")
