"""The learning rates of an optimizer, watched from step to step: nothing grows in a warm-up."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer


class LearningRates:
    """Those of an optimizer's groups, as they were at its last step."""

    def __init__(self) -> None:
        self._before: list[float | None] | None = None

    def rise(self, optimizer: Optimizer) -> bool | None:
        """Whether one is higher than at the last call; None if that cannot be told.

        Of a tensor on a GPU it cannot: to read it would wait for the device.
        """
        now = [_number(group.get("lr")) for group in optimizer.param_groups]
        before, self._before = self._before, now
        if before is None or len(before) != len(now):
            return None
        pairs = [
            (old, new)
            for old, new in zip(before, now, strict=True)
            if old is not None and new is not None
        ]
        return any(new > old for old, new in pairs) if pairs else None


def _number(rate: object) -> float | None:
    if isinstance(rate, Tensor):
        return rate.item() if rate.device.type == "cpu" and rate.numel() == 1 else None
    return float(rate) if isinstance(rate, (int, float)) else None
