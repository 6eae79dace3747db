"""Finished runs in CSV files: one line each, whole or not there, from any number of workers."""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from bench.accuracy.runs import Row, Run

NAMES = [f.name for f in fields(Row)]
Rows = dict[tuple[str, int], Row]
csv.field_size_limit(1 << 24)


def line(cells: Iterable[str]) -> bytes:
    """One line of CSV. No cell holds a line break, so a file that was cut off shows it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    assert text.getvalue().count("\n") == 1
    return text.getvalue().encode()


def read(path: Path) -> list[Row]:
    """The rows of a file; a last line without its end is not one."""
    whole = path.read_bytes().rpartition(b"\n")[0].decode()
    reader = csv.DictReader(whole.splitlines())
    if whole and reader.fieldnames != NAMES:
        raise ValueError(f"{path}: has other columns than {', '.join(NAMES)}")
    return [Row.from_cells(cells) for cells in reader]


class Store:
    """The runs in `path`, and those in every CSV file of its folder and of the folders `seen`."""

    def __init__(self, path: Path, seen: Iterable[Path] = ()) -> None:
        self.path = path
        self.folders = [path.parent, *seen]
        path.parent.mkdir(parents=True, exist_ok=True)
        # Kept open for life: closing any descriptor of a file gives up the process's locks on it.
        self._lock = os.open(path.parent / ".lock", os.O_RDWR | os.O_CREAT, 0o644)

    def rows(self) -> Rows:
        """By key; the first file that has a run, by name, gives it."""
        found: Rows = {}
        for folder in self.folders:
            for path in sorted(folder.glob("*.csv")):
                for row in read(path):
                    found.setdefault((row.key, row.seed), row)
        return found

    def claim(self, run: Run) -> bool:
        """Whether the run is this process's to do; its end, however it comes, gives it back."""
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _offset(run))
        except OSError:
            return False
        return True

    def release(self, run: Run) -> None:
        fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, _offset(run))

    def add(self, row: Row) -> None:
        """Appends the line in one write; what an earlier one left unfinished is cut off first."""
        cells = row.to_cells()
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            before = file.read()
            whole = before.rpartition(b"\n")[0]
            file.truncate(len(whole) + 1 if whole else 0)
            new = line(cells[name] for name in NAMES)
            os.write(file.fileno(), new if whole else line(NAMES) + new)
            os.fsync(file.fileno())


def _offset(run: Run) -> int:
    """Where in the lock file this run's byte is."""
    key, seed = run.key
    return (int(key, 16) ^ (seed << 20)) % (1 << 48)
