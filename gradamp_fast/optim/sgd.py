"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..call import Hyper
from .fused import Fused, rate


class SGD(Fused, torch.optim.SGD):
    """``torch.optim.SGD``, in one launch, and with an Amplifier attached in the same one.

    The multiplier acts on the gradient, before weight decay and momentum, as
    ``grad.mul_(multiplier)`` would before the step: for fp32 and fp64 bit for bit. ``.grad`` stays
    as ``backward()`` left it.

    Args:
        params: parameters or groups of them, as torch takes them.
        lr: learning rate; a tensor of one element may change in a captured graph.
        momentum, dampening, weight_decay, nesterov, maximize: torch's.

    State and ``state_dict()`` are those of ``torch.optim.SGD(fused=True)``, in both directions.
    Raises ValueError as torch does; a step raises TypeError or ValueError, naming the parameter,
    for a gradient that is sparse or of another shape, dtype or device than the parameter, and
    for parameters of several devices.
    """

    _multiplies_update: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        torch.optim.SGD.__init__(
            self, params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize,
            fused=True,
        )  # fmt: skip

    @staticmethod
    def _hyper(group: Mapping[str, Any]) -> Hyper:
        return Hyper(
            "sgd",
            rate(group),
            float(group["weight_decay"]),
            beta1=group["momentum"],
            beta2=group["dampening"],
            maximize=group["maximize"],
            nesterov=group["nesterov"],
        )
