"""Messages for values that are not what they should be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


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
