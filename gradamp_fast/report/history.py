"""How the layers fared over a run: a bounded sequence of reports."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import overload

from . import export
from .report import Report, Snapshot, make_report

LIMIT = 512  # entries; even, since every second one is let go


class History(Sequence[Report]):
    """What ``Amplifier.record`` kept, oldest first.

    Holds at most 512 entries of 120 bytes a layer, on the host. When it is full every second
    entry is let go, and from then on only every second call adds one: it covers the whole run,
    evenly, at half the resolution.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._entries: list[Snapshot] = []
        self._calls = 0
        self._stride = 1

    def due(self, every: int) -> bool:
        """Counts a call and says whether it is one that adds an entry."""
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r} is out of range: it must be a whole number >= 1")
        self._calls += 1
        return self._calls % (every * self._stride) == 0

    def add(self, snapshot: Snapshot) -> None:
        self._entries.append(snapshot)
        if len(self._entries) == LIMIT:
            del self._entries[::2]  # the last one stays
            self._stride *= 2

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Report: ...
    @overload
    def __getitem__(self, index: slice) -> list[Report]: ...
    def __getitem__(self, index: int | slice) -> Report | list[Report]:
        if isinstance(index, slice):
            return [make_report(entry) for entry in self._entries[index]]
        return make_report(self._entries[index])

    def save(self, path: str | PathLike[str]) -> None:
        """Writes ``.csv`` or ``.json``, as ``Report.save`` does."""
        export.save(self, path)
