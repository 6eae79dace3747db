"""Finished runs in CSV files: one line each, whole or not there."""

from __future__ import annotations

import csv
import fcntl
import io
from dataclasses import fields
from pathlib import Path

from bench.accuracy.runs import Row

NAMES = [f.name for f in fields(Row)]
Rows = dict[tuple[str, int], Row]
csv.field_size_limit(1 << 24)


def read(path: Path) -> list[Row]:
    """The rows of a file; a last line without its end is not one."""
    whole = path.read_bytes().rpartition(b"\n")[0].decode()
    reader = csv.DictReader(whole.splitlines())
    if whole and reader.fieldnames != NAMES:
        raise ValueError(f"{path}: has other columns than {', '.join(NAMES)}")
    return [Row.from_cells(cells) for cells in reader]


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
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            whole = file.read().rpartition(b"\n")
            file.truncate(len(whole[0]) + len(whole[1]))
            text = io.StringIO()
            writer = csv.DictWriter(text, NAMES, lineterminator="\n")
            if not whole[0]:
                writer.writeheader()
            writer.writerow(row.to_cells())
            file.write(text.getvalue().encode())
