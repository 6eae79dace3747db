"""Growing amplification on CIFAR-10: plain and growing, at rates from far too low to too high.

python -m bench.accuracy growth --data cifar10-16           averaged to 16 by 16, for a CPU
python -m bench.accuracy growth --data cifar10              32 by 32, for a GPU

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

from bench.accuracy import growth_stages
from bench.accuracy.data import DataMissing
from bench.accuracy.growth_stages import EXPERIMENTS
from bench.accuracy.store import Store
from bench.accuracy.work import Here, Place, work

OUT = Path(__file__).parent.parent / "results" / "accuracy" / "growth"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--data", choices=EXPERIMENTS, default="cifar10-16", help="default: %(default)s")
    add("--root", default="data", metavar="DIR", help="where CIFAR lies")
    add("--device", default="cuda" if cuda else "cpu", help="default here: %(default)s")
    add("--out", type=Path, default=OUT, metavar="DIR", help="where the CSV and the page go")
    add("--budget-s", type=float, default=math.inf, metavar="S", help="begin no run later")
    add("--workers", type=int, default=1, metavar="N", help="processes that share the work")
    add("--commit", metavar="HASH", help="of this code, where git cannot tell")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """The command line, without its first word."""
    given = arguments(argv)
    experiment = EXPERIMENTS[given.data]
    store = Store(given.out / f"{given.data}-{given.device.partition(':')[0]}.csv")
    pool: Executor = Here()
    if given.workers > 1:
        pool = ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn"))
    place = Place(given.root, given.device, given.commit)
    try:
        with pool:
            work(
                "growth", partial(growth_stages.everything, experiment), store, place.run, pool,
                given.workers, given.budget_s, partial(print, flush=True),
            )  # fmt: skip
    except (DataMissing, ValueError) as error:
        sys.exit(f"python -m bench.accuracy growth: {error}")
    return 0
