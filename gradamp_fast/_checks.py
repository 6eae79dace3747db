"""Messages for values that are not what they should be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
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
