"""Growing amplification against plain training, at learning rates from far too low to too high.

python -m bench.accuracy grow --data digits            the table: three networks, three optimizers
python -m bench.accuracy grow --data digits --edge     the edge: batches and schedules that hurt
python -m bench.accuracy grow --data digits --report   tables of what is there; runs nothing
python -m bench.accuracy grow --data digits --docs     writes them into docs/growing.md

Every command goes on where an earlier one ended.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from bench.accuracy import grow_report, small_runs
from bench.accuracy.data import DataMissing
from bench.accuracy.grow_nets import NETWORKS
from bench.accuracy.grow_runs import OPTIMIZERS, SCHEDULES, Row, Run, execute, read

OUT = Path(__file__).parent.parent / "results" / "accuracy" / "grow"
DOCUMENT = Path(__file__).parents[2] / "docs" / "growing.md"
SEEDS = range(5)

# Far too low, low, tuned, too high.
TABLE_NETWORKS = ("mlp", "cnn_bn", "transformer")
TABLE_RATES = {
    "SGD": (0.0025, 0.04, 0.64, 2.56),
    "momentum": (0.0005, 0.008, 0.128, 0.512),
    "AdamW": (5e-5, 8e-4, 0.0128, 0.05),
}
EDGE_NETWORKS = ("deep", "layernorm", "cnn", "cnn_bn", "transformer", "linear")
EDGE_RATES = {
    "momentum": (0.0005, 0.008, 0.032, 0.128),
    "AdamW": (6e-5, 1e-3, 4e-3, 0.016),
}
EDGE_BATCHES = (8, 32, 512)


def table() -> Iterator[Run]:
    """The table's runs; seed by seed, so that what is there is balanced."""
    for seed, network, optimizer in itertools.product(SEEDS, TABLE_NETWORKS, TABLE_RATES):
        for rate, grow in itertools.product(TABLE_RATES[optimizer], (False, True)):
            yield Run(network, optimizer, 32, "linear", 600, rate, grow, seed)


def edge() -> Iterator[Run]:
    """The runs at which growing is most likely to do harm."""
    for seed, batch, schedule in itertools.product(SEEDS, EDGE_BATCHES, SCHEDULES):
        for network, optimizer in itertools.product(EDGE_NETWORKS, EDGE_RATES):
            for rate, grow in itertools.product(EDGE_RATES[optimizer], (False, True)):
                yield Run(network, optimizer, batch, schedule, 500, rate, grow, seed)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy grow",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", choices=("digits",), default="digits", help="default: %(default)s")
    add("--edge", action="store_true", help="the larger grid at which harm is most likely")
    add("--report", action="store_true", help="run nothing; write and print the tables")
    add("--docs", action="store_true", help="run nothing; fill the tables of docs/growing.md")
    add("--networks", nargs="+", choices=NETWORKS, metavar="NAME", help="only these")
    add("--optimizers", nargs="+", choices=OPTIMIZERS, metavar="NAME", help="only these")
    add("--seeds", type=int, default=len(SEEDS), metavar="N", help="only the first N")
    add("--out", type=Path, default=OUT, metavar="DIR", help="where the CSV and tables go")
    add("--workers", type=int, default=1, metavar="N", help="processes that share the work")
    add("--commit", metavar="HASH", help="of this code, where git cannot tell")
    return parser.parse_args(argv)


def wanted(given: argparse.Namespace) -> list[Run]:
    return [
        run
        for run in (edge() if given.edge else table())
        if run.seed < given.seeds
        and run.network in (given.networks or NETWORKS)
        and run.optimizer in (given.optimizers or OPTIMIZERS)
    ]


def told(row: Row) -> str:
    arm = "growing" if row.grow else "plain"
    return (
        f"{row.network}, {row.optimizer} {row.rate:g}, batch {row.batch}, {row.schedule}, {arm}, "
        f"seed {row.seed}: {row.accuracy:.1%}"
    )


def main(argv: Sequence[str]) -> int:
    """The command line, without its first word."""
    given = arguments(argv)
    name = f"{given.data}{'-edge' if given.edge else ''}"
    path = given.out / f"{name}.csv"
    try:
        if given.docs:
            stored = {"table": given.data, "edge": f"{given.data}-edge"}
            rows_of = {part: read(given.out / f"{file}.csv") for part, file in stored.items()}
            grow_report.write(DOCUMENT, rows_of)
            return 0
        if not given.report:
            do = partial(execute, name=given.data)
            small_runs.work(wanted(given), path, Row, do, told, given.workers, given.commit)
        rows = read(path)
    except (DataMissing, ValueError) as error:
        sys.exit(f"python -m bench.accuracy grow: {error}")
    page = grow_report.edge(rows) if given.edge else grow_report.table(rows)
    (given.out / f"{name}.md").write_text(page)
    print(page)
    return 0
