"""Messages for values that are not what they should be."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any


def plain(value: Any) -> Any:
    """Numbers and strings of numpy, or any other kind, as Python's own, which can be stored."""
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def nearest(value: object, names: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the nearest of the names, or nothing."""
    found = difflib.get_close_matches(str(value), list(names), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def one_of(option: str, value: Any, names: tuple[str, ...]) -> Any:
    """The value, if it is one of the names; else ValueError."""
    if value not in names:
        listed = ", ".join(map(repr, names))
        raise ValueError(f"{option}={value!r} is not one of {listed}{nearest(value, names)}")
    return value


def in_range(option: str, value: object, holds: Callable[[Any], bool], range_: str) -> None:
    """ValueError unless the value is a number for which ``holds``."""
    if isinstance(value, bool) or not isinstance(value, Real) or not holds(value):
        raise ValueError(f"{option}={value!r} is out of range: it must be {range_}")


def whole_number(
    option: str, value: object, range_: str, least: int = 1, most: float = math.inf
) -> None:
    """ValueError unless the value is a whole number from ``least`` to ``most``."""
    if (
        isinstance(value, bool)
        or not isinstance(value, Integral)
        or not least <= int(value) <= most
    ):
        near = nearest(value, ("epoch",)) if isinstance(value, str) else ""
        raise ValueError(f"{option}={value!r} is out of range: it must be {range_}{near}")
