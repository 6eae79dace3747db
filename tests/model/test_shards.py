"""What a process makes of its part of a gradient, without other processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import REALS
from parts import CUTS, check_left_alone, check_parts
from torch import Tensor

from gradamp_fast import backends
from gradamp_fast.backends.sharded import additive, not_additive

MAKERS = [pytest.param(backends._BACKENDS[name], id=name) for name in ("torch", "cpu")]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize(("numel", "starts"), CUTS)
def test_parts_add_up(make: Any, numel: int, starts: tuple[int, ...], dtype: Any) -> None:
    check_parts(make, numel, starts, dtype)


@pytest.mark.parametrize("make", MAKERS)
def test_left_alone(make: Any) -> None:
    check_left_alone(make)


def test_what_fp64_sums_resolve() -> None:
    """Ten digits of the variance at a mean of 1000 deviations; of equal elements there is none."""
    rows = torch.tensor([[1000.0, 1000.0, 1000.0, 0, 0, 0, 0], [7.0, 1 / 3, 0.0, 0, 0, 0, 0]])
    found = not_additive(additive(rows.double() / 1))
    assert found.m2[0].item() == pytest.approx(1000.0, rel=1e-9)
    assert found.m2[1].item() == 0.0
    lost: Tensor = not_additive(additive(rows.double()) * torch.tensor(float("inf"))).finite()
    assert not lost.any()
