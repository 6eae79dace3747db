"""Adam, and Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..call import Hyper
from .fused import Fused, rate


class Adam(Fused, torch.optim.Adam):
    """``torch.optim.Adam``, in one launch, and with an Amplifier attached in the same one.

    The moments take the plain gradient; the multiplier acts on the update. A factor is then a
    learning rate for the layer, while one on the gradient would be divided out again. Weight decay
    is part of the gradient. ``.grad`` stays as ``backward()`` left it.

    Args:
        params: parameters or groups of them, as torch takes them.
        lr: learning rate; a tensor of one element may change in a captured graph.
        betas, eps, weight_decay, amsgrad, maximize: torch's.
        capturable: torch's, for its checkpoints; a step can always be captured here.
        decoupled_weight_decay: torch's; makes this ``AdamW``.

    State and ``state_dict()`` are those of ``torch.optim.Adam(fused=True)``, in both directions.
    Raises ValueError as torch does; a step raises TypeError or ValueError, naming the parameter,
    for a gradient that is sparse or of another shape, dtype or device than the parameter, and
    for parameters of several devices.
    """

    _multiplies_update: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
    ) -> None:
        torch.optim.Adam.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize,
            capturable=capturable, decoupled_weight_decay=decoupled_weight_decay, fused=True,
        )  # fmt: skip

    @staticmethod
    def _hyper(group: Mapping[str, Any]) -> Hyper:
        beta1, beta2 = group["betas"]
        return Hyper(
            "adam",
            rate(group),
            float(group["weight_decay"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=group["eps"],
            maximize=group["maximize"],
            amsgrad=group["amsgrad"],
            decoupled=group["decoupled_weight_decay"],
        )


class AdamW(Adam, torch.optim.AdamW):
    """``torch.optim.AdamW``, in one launch, and with an Amplifier attached in the same one.

    As ``Adam`` here, but weight decay acts on the parameter, and is not multiplied.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        Adam.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize,
            capturable=capturable, decoupled_weight_decay=True,
        )  # fmt: skip
