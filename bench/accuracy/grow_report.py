"""Markdown tables of growing runs beside plain ones."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from bench.accuracy import statistics
from bench.accuracy.grow_runs import Row
from bench.accuracy.lines import every, provenance
from bench.docs import table as markdown

_PART = re.compile(r"(<!-- grow: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
HARM = 1.5  # points below plain at the same rate
NOTHING = "Not measured yet (`python -m bench.accuracy grow`; the larger grid with `--edge`)."
NEAR = 2.0  # points below the best plain rate


@dataclass(frozen=True)
class Setting:
    """All but the learning rate, the seed and whether it grows."""

    network: str
    optimizer: str
    batch: int
    schedule: str
    steps: int


@dataclass(frozen=True)
class Cell:
    """A setting at one learning rate: accuracies in percent, by seed, of seeds that both have."""

    rate: float
    plain: tuple[float, ...]
    growing: tuple[float, ...]

    @property
    def difference(self) -> float:
        return mean(self.growing) - mean(self.plain)

    @property
    def paired(self) -> statistics.Interval | None:
        """Of growing minus plain from the same weights and batches."""
        return statistics.mean([g - p for g, p in zip(self.growing, self.plain, strict=True)])


Cells = dict[Setting, list[Cell]]


def cells(rows: Iterable[Row]) -> Cells:
    found: dict[Setting, dict[float, tuple[dict[int, float], dict[int, float]]]] = defaultdict(dict)
    for row in rows:
        setting = Setting(row.network, row.optimizer, row.batch, row.schedule, row.steps)
        arms = found[setting].setdefault(row.rate, ({}, {}))
        arms[row.grow][row.seed] = 100 * row.accuracy
    made: Cells = {}
    for setting, rates in found.items():
        for rate, (plain, growing) in sorted(rates.items()):
            both = sorted(plain.keys() & growing.keys())
            if both:
                cell = Cell(rate, tuple(plain[s] for s in both), tuple(growing[s] for s in both))
                made.setdefault(setting, []).append(cell)
    return made


def accuracy(values: Sequence[float]) -> str:
    interval = statistics.mean(values)
    return f"{mean(values):.1f}" + (f" ± {interval.half_width:.1f}" if interval else "")


def table(rows: Sequence[Row]) -> str:
    """A page of its own."""
    command = "Written by `python -m bench.accuracy grow`."
    return "\n".join(["# Growing amplification", "", command, "", table_part(rows)])


def table_part(rows: Sequence[Row]) -> str:
    """Plain → growing, a line a setting and a column a learning rate."""
    lines = []
    for setting, of in cells(rows).items():
        texts = [f"{c.rate:g}: {accuracy(c.plain)} → {accuracy(c.growing)}" for c in of]
        lines.append([f"{setting.network}, {setting.optimizer}", *texts])
    most = max((len(line) for line in lines), default=1)
    ranks = ("far too low", "low", "tuned", "too high")
    lines = [line + [""] * (most - len(line)) for line in lines]
    return "\n".join(
        [
            "Test accuracy in percent with its 95 % interval over the seeds, plain → growing from "
            "the same learning rate.",
            "",
            conditions(rows),
            "",
            *markdown(["network, optimizer", *ranks[: most - 1]], lines),
        ]
    )


def conditions(rows: Sequence[Row]) -> str:
    seeds, batch, steps, schedule = (
        every(rows, name) for name in ("seed", "batch", "steps", "schedule")
    )
    return (
        f"{len(rows)} runs, seeds {seeds}; batches of {batch}, {steps} steps, {schedule}; "
        f"{provenance(rows)}."
    )


def edge(rows: Sequence[Row]) -> str:
    """A page of its own."""
    command = "Written by `python -m bench.accuracy grow --edge`."
    return "\n".join(["# Growing amplification at the edge", "", command, "", edge_part(rows)])


def edge_part(rows: Sequence[Row]) -> str:
    """How many cells are worse off, which, and how far the lowest rates come."""
    made = cells(rows)
    all_cells = [(setting, cell) for setting, of in made.items() for cell in of]
    harmed = [(s, c) for s, c in all_cells if c.difference < -HARM]
    surely = [c for _, c in harmed if c.paired is not None and c.paired.high < 0]
    lows = [(s, of[0], max(mean(c.plain) for c in of)) for s, of in made.items()]
    near = [low for low in lows if mean(low[1].growing) >= low[2] - NEAR]
    by_network = []
    for network in dict.fromkeys(s.network for s in made):
        of = [c for s, c in all_cells if s.network == network]
        low = [entry for entry in lows if entry[0].network == network]
        by_network.append(
            [
                network,
                str(len(of)),
                str(sum(c.difference < -HARM for c in of)),
                f"{min(c.difference for c in of):+.1f}",
                f"{sum(mean(c.growing) >= best - NEAR for _, c, best in low)} of {len(low)}",
                f"{sum(mean(c.plain) >= best - NEAR for _, c, best in low)} of {len(low)}",
            ]
        )
    worst = [
        [f"{place(s)}, {c.rate:g}", accuracy(c.plain), accuracy(c.growing), f"{c.difference:+.1f}"]
        for s, c in sorted(harmed, key=lambda found: found[1].difference)
    ]
    far = [
        [f"{place(s)}, {c.rate:g}", accuracy(c.plain), accuracy(c.growing), f"{best:.1f}"]
        for s, c, best in lows
        if mean(c.growing) < best - NEAR
    ]
    return "\n".join(
        [
            "Test accuracy in percent, with its 95 % interval where there are several seeds.",
            "",
            conditions(rows),
            "",
            f"- {len(harmed)} of {len(all_cells)} cells end more than {HARM} points below plain "
            f"training at the same rate; for {len(surely)} of these the paired interval excludes "
            "0.",
            f"- From the lowest rate {len(near)} of {len(lows)} settings end within {NEAR:g} "
            "points of the best plain rate.",
            "",
            *markdown(
                ["network", "cells", "harmed", "worst", "lowest rate near best", "plain there"],
                by_network,
            ),
            *([] if not worst else ["Worse off:", ""]),
            *markdown(["cell", "plain", "growing", "difference"], worst),
            *([] if not far else ["Lowest rates that stay behind:", ""]),
            *markdown(["cell", "plain", "growing", "best plain rate"], far),
        ]
    )


def place(setting: Setting) -> str:
    return f"{setting.network}, {setting.optimizer}, batch {setting.batch}, {setting.schedule}"


def write(document: Path, rows: dict[str, list[Row]]) -> None:
    """Fills the parts ``table`` and ``edge`` of a document, each with its rows."""
    made = {"table": table_part, "edge": edge_part}

    def replaced(found: re.Match[str]) -> str:
        of = rows[found[2]]
        return f"{found[1]}\n{made[found[2]](of).strip() if of else NOTHING}\n\n{found[3]}"

    document.write_text(_PART.sub(replaced, document.read_text()))
