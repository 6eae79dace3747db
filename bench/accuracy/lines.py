"""Lines of a CSV file that several processes add to: each whole or not there."""

from __future__ import annotations

import csv
import fcntl
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

csv.field_size_limit(1 << 24)
T = TypeVar("T")
_READ: dict[str, Callable[[str], Any]] = {
    "bool": lambda text: text == "True",
    "float": float,
    "int": int,
    "str": str,
}


def part(kind: type[T], record: object) -> T:
    """What another dataclass says of a record, which has all its fields."""
    return kind(**{f.name: getattr(record, f.name) for f in fields(kind)})  # type: ignore[arg-type]


def every(records: Iterable[object], name: str) -> str:
    """The values of a column, each once, in order."""
    return ", ".join(map(str, sorted({getattr(record, name) for record in records})))


def provenance(records: Sequence[object]) -> str:
    """Machines, torch versions and commits."""
    device, torch, commit = (every(records, name) for name in ("device", "torch", "commit"))
    return f"{device}, torch {torch}, {commit}"


def read_records(path: Path, kind: type[T]) -> list[T]:
    """Lines as objects of a dataclass of plain values, whose columns are its fields.

    None if there is no file; a last line without its end is not one.
    """
    if not path.exists():
        return []
    kinds = {f.name: _READ[str(f.type)] for f in fields(kind)}  # type: ignore[arg-type]
    return [
        kind(**{name: kinds[name](cell) for name, cell in cells.items()})
        for cells in read_lines(path, list(kinds))
    ]


def read_lines(path: Path, names: Sequence[str]) -> list[dict[str, str]]:
    """The cells of each line, by column; a last line without its end is not one.

    ValueError if the columns are not ``names``.
    """
    whole = path.read_bytes().rpartition(b"\n")[0].decode()
    reader = csv.DictReader(whole.splitlines())
    if whole and reader.fieldnames != list(names):
        raise ValueError(f"{path}: has other columns than {', '.join(names)}")
    return list(reader)


def append_record(path: Path, record: object) -> None:
    """Adds what ``read_records`` reads; makes the file and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = asdict(record)  # type: ignore[call-overload]
    append_line(path, list(cells), cells)


def append_line(path: Path, names: Sequence[str], cells: Mapping[str, object]) -> None:
    """Adds a line; what an earlier command left unfinished is cut off first."""
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole = file.read().rpartition(b"\n")
        file.truncate(len(whole[0]) + len(whole[1]))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        if not whole[0]:
            writer.writeheader()
        writer.writerow(cells)
        file.write(text.getvalue().encode())
