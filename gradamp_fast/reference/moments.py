"""Count, mean and squared deviations of a tensor, and of several together."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

# Elements of a row, which torch sums on one thread, in an order that depends on nothing else.
_ROW = 4096


@functools.lru_cache(maxsize=256)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A device tensor that is copied from the host once, not once a step."""
    return torch.tensor(values, dtype=dtype, device=device)


def total(values: Tensor) -> Tensor:
    """Sum of a vector: rows first, so that its order does not depend on the threads at work."""
    while values.numel() > _ROW:
        rows = torch.nn.functional.pad(values, (0, -values.numel() % _ROW)).view(-1, _ROW)
        values = rows.sum(dim=1)
    return values.sum()


def moments_of(values: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations of an fp64 tensor: [3]."""
    count = constant((float(values.numel()),), torch.float64, values.device).squeeze()
    mean = total(values) / count
    return torch.stack((count, mean, total((values - mean).square())))


def merge(moments: Sequence[Tensor]) -> Tensor:
    """Moments of several sets together (Chan, Golub and LeVeque): k of [3] -> [3]."""
    count, mean, m2 = torch.stack(tuple(moments)).unbind(1)
    total = count.sum()
    centre = (count * mean).sum() / total
    return torch.stack((total, centre, m2.sum() + (count * (mean - centre).square()).sum()))
