"""Runs the benchmarks, and shows, stores, draws and compares what they measured.

python -m bench                      everything; minutes on two cores
python -m bench --quick              a first look, in about one minute
python -m bench models training      parts of it
python -m bench headline             of models, only lagged with a quarter amplified
python -m bench --compare OLD.json   what got slower since OLD.json was stored
python -m bench --docs               docs/benchmarks.md and the figures, from stored results
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import docs, figures, report
from bench.parts import HEADLINE, PARTS, units
from bench.results import Results, compare, describe_machine, results_in

STORED = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def run(device: torch.device, parts: Sequence[str], quick: bool, out: Path) -> Results:
    """Everything, with a progress bar; stored after every piece."""
    console = Console(stderr=True)
    results = Results(describe_machine(device), quick)
    todo = list(units(results, parts, device, quick))
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=len(todo))
        for label, piece in todo:
            bar.update(task, description=label)
            if not console.is_terminal:
                print(label, file=sys.stderr, flush=True)
            piece()
            bar.advance(task)
            results.save(out)
    return results


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="a first look, in about one minute")
    extent.add_argument("--full", action="store_true", help="everything; the default")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, help=f"cpu or cuda; default here: {default}")
    add(
        "--out",
        type=Path,
        help="where results go; default: bench/results, or out/bench if it is not everything",
    )
    add(
        "--compare", type=Path, metavar="OLD.json", help="compare with stored results; runs nothing"
    )
    add("--docs", action="store_true", help="write docs/benchmarks.md anew; runs nothing")
    given = parser.parse_args(argv)
    if unknown := [part for part in given.parts if part not in (*PARTS, HEADLINE)]:
        parser.error(f"no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    everything = not given.quick and not given.parts
    given.out = given.out or (STORED if everything else Path("out/bench"))
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if a result was wrong or became slower."""
    given = arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    if given.docs:
        for results in results_in(STORED):
            figures.draw(results, STORED)
        docs.write(DOCUMENT, results_in(STORED))
        console.print(f"wrote {DOCUMENT}")
        return 0
    if given.compare:
        old = Results.load(given.compare)
        new = Results.load(given.out / f"{old.machine['device']}.json")
        for results in (old, new):
            console.print(report.machine_line(results))
        changes = compare(old, new)
        report.show_changes(changes, console)
        return int(any(change.regression for change in changes))
    device = torch.device(given.device)
    results = run(device, given.parts or PARTS, given.quick, given.out)
    report.show(results, console)
    written = [*results.save(given.out), *figures.draw(results, given.out)]
    console.print(f"wrote {', '.join(map(str, written))}")
    return int(any(failure.wrong for failure in results.failures))


if __name__ == "__main__":
    sys.exit(main())
