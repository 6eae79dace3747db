"""A report as a table: plain text, or rich's on a terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..reference import LOW
from .numbers import LayerReport, Numbers

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

# Left out, in this order, where the terminal is too narrow for all columns.
_DISPENSABLE = ("threshold", "temporal variance", "steps", "elements", "direction")
RICH_LAYERS = 500  # the most that rich lays out
_NAME_WIDTH = 16  # of a layer's name, at least; longer ones are folded then


@dataclass(frozen=True)
class Column:
    """Its heading (broken into lines at spaces) and a cell for each layer."""

    heading: str
    cells: list[str]

    @property
    def width(self) -> int:
        return max(map(len, [*self.heading.split(), *self.cells]))


def columns(report: Numbers) -> list[Column]:
    """The layers' names, then everything else, right-aligned."""

    def amplified(layer: LayerReport) -> str:
        if report.grow:
            return f"x{layer.factor:.3g}"
        return f"x{layer.factor:g}" if layer.selected else "off"

    def since(layer: LayerReport) -> str:
        return "never" if layer.steps_since_change is None else f"{layer.steps_since_change:,}"

    layers = report.layers
    return [
        Column("layer", [x.name or "(root)" for x in layers]),
        Column("elements", [f"{x.numel:,}" for x in layers]),
        Column("steps", [f"{x.steps:,}" for x in layers]),
        Column("variance", [f"{x.variance:.2e}" for x in layers]),
        Column("temporal variance", [f"{x.temporal_variance:.2e}" for x in layers]),
        Column("fluctu- ation", [f"{x.fluctuation:+.3f}" for x in layers]),
        Column("direc- tion", [f"{x.direction:+.3f}" for x in layers]),
        Column("score", [f"{x.score:+.3f}" for x in layers]),
        Column("threshold", [f"{report.threshold:+.3f}"] * len(layers)),
        Column("ampli- fied", [amplified(x) for x in layers]),
        *([Column("set- tled", ["yes" if x.settled else "no" for x in layers])] * report.grow),
        Column("share of steps", [f"{x.amplified_share:.0%}" for x in layers]),
        Column("since change", [since(x) for x in layers]),
    ]


def caption(report: Numbers) -> str:
    """The decision, how many steps the table covers, and what the directions say."""
    selected = sum(layer.selected for layer in report.layers)
    decision = "no decision yet"
    if not math.isnan(report.threshold):
        rule = f"{report.measure} {report.select} {report.threshold:.4g}"
        decision = f"{selected} of {len(report.layers)} layers selected: {rule}"
    if report.grow:
        settled = sum(layer.settled for layer in report.layers)
        decision += f"; {settled} of {len(report.layers)} settled"
    steps = f"{decision}; {report.steps:,} steps, {report.skipped_steps:,} skipped"
    return "\n".join([f"{steps}; {acts_on(report)}", *thermometer(report)])


def acts_on(report: Numbers) -> str:
    """What the factors multiply."""
    updates = sum(layer.acts_on == "update" for layer in report.layers)
    if updates in (0, len(report.layers)):
        return f"acts on: {'update' if updates else 'gradient'}"
    return f"acts on: update of {updates} layers, gradient of {len(report.layers) - updates}"


def thermometer(report: Numbers) -> list[str]:
    """What the mean direction says of the learning rate; nothing before the second step."""
    direction = report.direction
    if math.isnan(direction):
        return []
    if direction > LOW:
        return [f"gradients agree (direction {direction:+.2f}): the learning rate is low"]
    trend = "gradients turn back" if direction < -LOW else "no trend"
    return [f"{trend} (direction {direction:+.2f})"]


def plain(report: Numbers) -> str:
    """All columns, one line a layer, and a caption."""
    shown = columns(report)
    headings = [column.heading.replace("- ", "").split() for column in shown]
    depth = max(map(len, headings))
    rows = [[h[i] if i < len(h) else "" for h in headings] for i in range(depth)]
    rows += [list(row) for row in zip(*(column.cells for column in shown), strict=True)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, caption(report)])


def rich_table(report: Numbers, width: int) -> Table:
    """The same for rich, as many columns as fit in ``width`` characters."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    names, *numbers = columns(report)
    least = min(names.width, _NAME_WIDTH)
    for heading in _DISPENSABLE:
        needed = least + sum(column.width + 2 for column in numbers) + 2  # for the edges
        if needed <= width:
            break
        numbers = [column for column in numbers if column.heading != heading]
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=Text(caption(report))
    )
    table.add_column(names.heading, overflow="fold", min_width=least)
    for column in numbers:
        heading = column.heading.replace("- ", "-\n").replace(" ", "\n")
        table.add_column(heading, justify="right", no_wrap=True, min_width=column.width)
    cells = zip(names.cells, *(column.cells for column in numbers), strict=True)
    for layer, (name, *texts) in zip(report.layers, cells, strict=True):
        table.add_row(Text(name), *texts, style="bold" if layer.selected else "dim")
    return table


def plain_text(report: Numbers) -> Text:
    """The plain table for rich, which wraps lines that are too long."""
    from rich.text import Text

    return Text(plain(report))


def render(report: Numbers) -> str:
    """Rich's table if the standard output is a terminal and rich is there, else plain text.

    Of more than 500 layers plain text too: rich takes about a millisecond for each.
    """
    try:
        from rich.console import Console
    except ImportError:
        return plain(report)
    console = Console()
    if not console.is_terminal or len(report.layers) > RICH_LAYERS:
        return plain(report)
    with console.capture() as captured:
        console.print(rich_table(report, console.width))
    return captured.get().rstrip("\n")
