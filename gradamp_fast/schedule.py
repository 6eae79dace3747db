"""When to amplify: windows over epochs or steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ._checks import one_of, plain

ScheduleUnit = Literal["epoch", "step"]
Window = tuple[float, float, float | None]


@dataclass(frozen=True)
class Schedule:
    """Windows ``(start, stop)`` or ``(start, stop, factor)`` in which layers are amplified.

    A window holds its start and not its stop, counted from 0 in epochs (as given to
    ``set_epoch``) or in steps (skipped ones included). A window without a factor of its own
    uses the amplifier's. Outside all windows nothing is amplified; measuring goes on.

    Raises ValueError for empty, overlapping or malformed windows.
    """

    windows: tuple[Window, ...]
    unit: ScheduleUnit = "epoch"

    def __init__(
        self, windows: Iterable[Sequence[float | None]], unit: ScheduleUnit = "epoch"
    ) -> None:
        object.__setattr__(self, "windows", tuple(_window(window) for window in windows))
        object.__setattr__(self, "unit", one_of("unit", plain(unit), get_args(ScheduleUnit)))
        if not self.windows:
            raise ValueError("Schedule needs at least one window (start, stop[, factor])")
        ordered = sorted(self.windows, key=lambda window: window[:2])
        for earlier, later in itertools.pairwise(ordered):
            if later[0] < earlier[1]:
                raise ValueError(f"Schedule windows {earlier} and {later} overlap")

    def to_dict(self) -> dict[str, Any]:
        return {"windows": [list(window) for window in self.windows], "unit": self.unit}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Schedule:
        return cls(stored["windows"], unit=stored["unit"])


def _window(given: Sequence[float | None]) -> Window:
    try:
        start, stop, *rest = map(plain, given)
        numbers_given = isinstance(start, (int, float)) and isinstance(stop, (int, float))
    except (TypeError, ValueError):
        numbers_given, rest = False, []
    if not numbers_given or len(rest) > 1:
        raise ValueError(f"Schedule window {given!r} is not (start, stop) or (start, stop, factor)")
    if not 0 <= start < stop:  # false for NaN too
        raise ValueError(f"Schedule window {given!r} needs 0 <= start < stop")
    factor = rest[0] if rest else None
    if factor is not None and not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"Schedule window {given!r} needs a finite factor > 0")
    return start, stop, factor
