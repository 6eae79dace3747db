"""Finished runs in CSV files: one line each, whole or not there."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from bench.accuracy.lines import append_line, read_lines
from bench.accuracy.runs import Row

NAMES = [f.name for f in fields(Row)]
Rows = dict[tuple[str, int], Row]


def read(path: Path) -> list[Row]:
    """The rows of a file; a last line without its end is not one."""
    return [Row.from_cells(cells) for cells in read_lines(path, NAMES)]


class Store:
    """The runs in `path`, to which new ones go, and in every other CSV file of its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> Rows:
        """By key; the first file that has a run, by name, gives it."""
        found: Rows = {}
        for path in sorted(self.path.parent.glob("*.csv")):
            for row in read(path):
                found.setdefault((row.key, row.seed), row)
        return found

    def add(self, row: Row) -> None:
        """Appends a line; what an earlier command left unfinished is cut off first."""
        append_line(self.path, NAMES, row.to_cells())
