"""The same inputs give the same bits, whatever the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import SHAPES, Place, digest

SETTINGS: list[dict[str, Any]] = [
    {"timing": "lagged"},
    {"timing": "exact", "measure": "direction"},
    {"match_norm": True, "measure": "random", "threshold": 0.5, "seed": 7},
    {"max_norm": 0.5, "timing": "exact"},
    {"threshold": "quantile", "decay": None, "group_by": "tensor"},
]


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_threads_change_no_bit(place: Place, options: dict[str, Any]) -> None:
    shapes = {**SHAPES, "wider.weight": (700, 701)}
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(digest(place, options, shapes))
    assert len(set(found)) == 1


@pytest.mark.parametrize("options", SETTINGS[:2], ids=str)
def test_repeated_runs_are_equal(place: Place, options: dict[str, Any]) -> None:
    assert len({digest(place, options, SHAPES) for _ in range(3)}) == 1


def test_the_digest_sees_a_single_bit(place: Place) -> None:
    assert digest(place, {"factor": 2.0}, SHAPES) != digest(place, {"factor": 2.0000002}, SHAPES)


def test_many_layers(place: Place) -> None:
    """Decisions over more layers than a warp has threads."""
    shapes = {f"m{i}.w": (i % 7 + 2,) for i in range(300)}
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(digest(place, {"threshold": "quantile", "quantile": 0.3}, shapes))
    assert found[0] == found[1]
