"""Runs the accuracy experiment, a stage at a time, and reports on it.

python -m bench.accuracy stage0           does a score repeat?
python -m bench.accuracy stage1           the best plain recipe
python -m bench.accuracy stage2           which layers, when, how strongly
python -m bench.accuracy stage3           confirmation on fresh seeds and the test images
python -m bench.accuracy more             other thresholds, and backward placement
python -m bench.accuracy report           tables and figures of what is there; runs nothing
python -m bench.accuracy grow --help      growing amplification on digits
python -m bench.accuracy growth --help    growing amplification on CIFAR-10
python -m bench.accuracy language --help  growing amplification under AdamW on text
python -m bench.accuracy thermometer --help    the direction against the learning rate

Every command goes on where an earlier one ended, on whichever machine.
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

from bench.accuracy import figures, grow, growth, language, models, report, thermometer
from bench.accuracy.data import NAMES, DataMissing
from bench.accuracy.presets import RECIPES, experiment_for, name_of
from bench.accuracy.stages import STAGES, NotReady
from bench.accuracy.store import Store
from bench.accuracy.work import Here, Place, work

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
    add("--budget-s", type=float, default=math.inf, metavar="S", help="begin no run later")
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
    argv = sys.argv[1:] if argv is None else argv
    others = {
        "grow": grow.main, "growth": growth.main, "language": language.main,
        "thermometer": thermometer.main,
    }  # fmt: skip
    if argv[:1] and argv[0] in others:
        return others[argv[0]](argv[1:])
    given = arguments(argv)
    experiment = experiment_for(given)
    store = Store(given.out / f"{given.data}-{given.device.partition(':')[0]}.csv")
    if given.stage == "report":
        rows, name = store.rows(), name_of(given)
        page = report.page(experiment, rows, figures.draw(experiment, rows, given.out, name))
        (given.out / f"{name}.md").write_text(page)
        print(page)
        return 0
    pool: Executor = Here()
    if given.workers > 1:
        pool = ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn"))
    place = Place(given.root, given.device, given.commit)
    say = partial(print, flush=True)
    try:
        with pool:
            work(
                given.stage, partial(STAGES[given.stage], experiment), store, place.run, pool,
                given.workers, given.budget_s, say,
            )  # fmt: skip
    except (DataMissing, NotReady, ValueError) as error:
        sys.exit(f"python -m bench.accuracy: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
