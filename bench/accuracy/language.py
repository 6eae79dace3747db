"""Growing amplification under AdamW on a character transformer: does it find the way as well?

python -m bench.accuracy language            the plain rate tuned, then the contrasts; resumable
python -m bench.accuracy language --report   the tables of what is there; runs nothing
python -m bench.accuracy language --docs     writes them into docs/accuracy.md; runs nothing
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from bench.accuracy import small_runs, statistics
from bench.accuracy.language_runs import BATCH, CONTEXT, STEPS, Row, Run, execute
from bench.accuracy.lines import provenance, read_records
from bench.accuracy.statistics import Interval
from bench.docs import table

OUT = Path(__file__).parent.parent / "results" / "accuracy" / "language"
DOCUMENT = Path(__file__).parents[2] / "docs" / "accuracy.md"
NOTHING = "Not measured yet."
_PART = re.compile(r"(<!-- language -->\n).*?(<!-- end -->)", re.DOTALL)

# Fixed before any of these runs was made, as are the contrasts: growing minus plain.
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
TUNE_SEEDS = range(1)
SEEDS = range(100, 105)  # chose nothing
TIMES = {1 / 64: "best/64", 1.0: "best", 8.0: "8 x best"}
CONTRASTS = ((1 / 64, 1 / 64), (1 / 64, 1.0), (1.0, 1.0), (8.0, 8.0))


def tuning() -> list[Run]:
    return [Run(rate, False, seed, "validation") for seed in TUNE_SEEDS for rate in RATES]


def best(rows: Sequence[Row]) -> float | None:
    """The plain rate of the lowest validation loss; None before all were tried."""
    of = {row.run: row.loss for row in rows}
    if not all(run in of for run in tuning()):
        return None
    return min(RATES, key=lambda rate: fmean(of[r] for r in tuning() if r.rate == rate))


def arms(rate: float) -> list[Run]:
    """Seed by seed, so that what is there is balanced."""
    return [
        Run(rate * times, grow, seed, "test")
        for seed in SEEDS
        for times in TIMES
        for grow in (False, True)
    ]


def losses(rows: Sequence[Row], rate: float, times: float, grow: bool) -> list[float]:
    wanted = {run for run in arms(rate) if (run.rate, run.grow) == (rate * times, grow)}
    return [row.loss for row in rows if row.run in wanted]


def contrasts(rows: Sequence[Row], rate: float) -> Mapping[str, Interval | None]:
    return {
        f"growing, {TIMES[a]} - plain, {TIMES[b]}": statistics.welch(
            losses(rows, rate, a, True), losses(rows, rate, b, False)
        )
        for a, b in CONTRASTS
    }


def part(rows: Sequence[Row]) -> Iterator[str]:
    """How it was tuned, a line an arm, and the contrasts."""
    if not rows:
        yield NOTHING
        return
    of = {row.run: row.loss for row in rows}
    there = [rate for rate in RATES if any(r in of for r in tuning() if r.rate == rate)]
    means = [fmean(of[r] for r in tuning() if r.rate == rate and r in of) for rate in there]
    yield "Plain, tuned on the validation files, one seed:"
    yield ""
    yield from table(
        ("learning rate", *(f"{rate:g}" for rate in there)),
        [("validation loss", *(f"{value:.3f}" for value in means))],
    )
    rate = best(rows)
    if rate is None:
        return
    fresh = [row for row in rows if row.part == "test"]
    if not fresh:
        return
    yield (
        f"{len(fresh)} of {len(arms(rate))} runs on fresh seeds: {STEPS} steps of {BATCH} x "
        f"{CONTEXT} characters out of {fresh[0].characters:,}; the best plain rate is {rate:g}. "
        f"The median run took {median(row.seconds for row in fresh):.0f} s on one thread. "
        f"{provenance(fresh)}."
    )
    yield ""
    yield from table(
        ("arm", "test loss", "runs", "amplified"),
        [
            _line(fresh, rate, times, grow)
            for times in TIMES
            for grow in (False, True)
            if losses(fresh, rate, times, grow)
        ],
    )
    found = contrasts(fresh, rate)
    known = {name: interval for name, interval in found.items() if interval is not None}
    adjusted = statistics.holm([interval.p or 0.0 for interval in known.values()])
    yield from table(
        ("contrast", "nats [95 %]", "n", "p", "p, Holm"),
        [
            (name, _numbers(i, "+"), str(i.n), f"{i.p:.2g}", f"{p:.2g}")
            for (name, i), p in zip(known.items(), adjusted, strict=True)
        ],
    )


def _line(rows: Sequence[Row], rate: float, times: float, grow: bool) -> tuple[str, ...]:
    values = losses(rows, rate, times, grow)
    interval = statistics.mean(values)
    mine = [r for r in rows if (r.rate, r.grow) == (rate * times, grow)]
    grown = (
        f"by {min(r.factor for r in mine):.1f} to {max(r.factor for r in mine):.1f}, "
        f"{fmean(r.settled for r in mine):.0%} settled"
    )
    name = f"{'growing' if grow else 'plain'}, {TIMES[times]}"
    shown = _numbers(interval) if interval else f"{fmean(values):.3f}"
    return name, shown, str(len(values)), grown if grow else ""


def _numbers(interval: Interval, sign: str = "") -> str:
    centre, low, high = (f"{x:{sign}.3f}" for x in (interval.value, interval.low, interval.high))
    return f"{centre} [{low}, {high}]"


def told(row: Row) -> str:
    arm = "growing" if row.grow else "plain"
    return f"{arm} {row.rate:g}, seed {row.seed}: {row.part} loss {row.loss:.3f}"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy language",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--report", action="store_true", help="run nothing; write and print the tables")
    add("--docs", action="store_true", help="run nothing; fill the tables of docs/accuracy.md")
    add("--out", type=Path, default=OUT, metavar="DIR", help="where the CSV and the page go")
    add("--workers", type=int, default=1, metavar="N", help="processes that share the work")
    add("--commit", metavar="HASH", help="of this code, where git cannot tell")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """The command line, without its first word."""
    given = arguments(argv)
    path = given.out / "stdlib.csv"
    try:
        if not (given.report or given.docs):
            run(path, given)
        rows = read_records(path, Row)
    except ValueError as error:
        sys.exit(f"python -m bench.accuracy language: {error}")
    text = "\n".join(part(rows)).strip()
    if given.docs:
        page = _PART.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", DOCUMENT.read_text())
        DOCUMENT.write_text(page)
        return 0
    head = "# A character transformer\n\nWritten by `python -m bench.accuracy language`.\n"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "stdlib.md").write_text(f"{head}\n{text}\n")
    print(text)
    return 0


def run(path: Path, given: argparse.Namespace) -> None:
    """What nobody has run yet: the tuning first, which says at which rates the rest is run."""

    def made(runs: Sequence[Run]) -> None:
        small_runs.work(runs, path, Row, execute, told, given.workers, given.commit)

    made(tuning())
    rate = best(read_records(path, Row))
    assert rate is not None
    made(arms(rate))
