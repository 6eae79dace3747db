"""Runs the accuracy experiment, a stage at a time, and reports on it.

python -m bench.accuracy stage0           does a score repeat?
python -m bench.accuracy stage1           the best plain recipe
python -m bench.accuracy stage2           which layers, when, how strongly
python -m bench.accuracy stage3           confirmation on fresh seeds and the test images
python -m bench.accuracy more             other thresholds, and backward placement
python -m bench.accuracy report           tables and figures of what is there; runs nothing

Every command goes on where an earlier one ended, on whichever machine.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import models
from bench.accuracy import figures, report
from bench.accuracy.presets import RECIPES, experiment_for, name_of
from bench.accuracy.stages import STAGES
from bench.accuracy.worker import store_for, worker
from bench.data import NAMES

OUT = Path(__file__).parent.parent / "results" / "accuracy"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("stage", choices=(*STAGES, "report"))
    add("--data", choices=NAMES, help="default: cifar10 on a GPU, digits elsewhere")
    add("--root", default="data", metavar="DIR", help="where CIFAR lies")
    add("--device", default="cuda" if cuda else "cpu", help="default here: %(default)s")
    add("--out", type=Path, default=OUT, metavar="DIR", help="where the CSV goes")
    add("--seen", type=Path, action="append", default=[], metavar="DIR", help="more finished runs")
    add("--budget-s", type=float, default=math.inf, metavar="S", help="begin what ends in time")
    add("--workers", type=int, default=1, metavar="N", help="processes that share the work")
    add("--commit", metavar="HASH", help="of this code, where git cannot tell")
    parts = parser.add_argument_group("another experiment than the usual one")
    add = parts.add_argument
    add("--recipe", choices=RECIPES, default="usual", help="paper: no warm-up, rate in steps")
    add("--arch", choices=models.NAMES, help="the network that screens")
    add("--width", type=float, help="times the usual number of channels")
    add("--epochs", type=int)
    add("--train", type=int, metavar="N", help="train on N images of those not held out")
    add("--confirm-data", choices=NAMES, help="stage 3 on other data than the screening's")
    add("--confirm-arch", choices=models.NAMES, help="stage 3 with another network")
    add("--confirm-width", type=float)
    given = parser.parse_args(argv)
    given.data = given.data or ("cifar10" if given.device.startswith("cuda") else "digits")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    started = time.time()
    given = arguments(argv)
    experiment = experiment_for(given)
    if given.stage == "report":
        rows = store_for(given).rows()
        name = name_of(given)
        path = given.out / f"{name}.md"
        drawn = figures.draw(experiment, rows, given.out, name)
        path.write_text(report.page(experiment, rows, drawn))
        print(path.read_text())
        return 0
    if given.workers == 1:
        worker(given, experiment, started)
        return 0
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=worker, args=(given, experiment, started))
        for _ in range(given.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return int(any(process.exitcode for process in processes))


if __name__ == "__main__":
    sys.exit(main())
