"""What the optimizers of this package have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ..call import Call, Hyper
from .alone import Alone
from .updates import UpdatesOf


class Amplifying(Protocol):
    """An Amplifier's attachment to an optimizer."""

    def update(self, call: Call) -> Collection[int]:
        """Amplifies and updates its part of the parameters; their ids."""


class Fused(Optimizer):
    """Base of the optimizers that update in the pass that measures and amplifies.

    Attributes:
        amplifiers: what takes part in the steps, and updates its part of the parameters.
    """

    # A GradScaler leaves unscaling to the step, and tells it what it found.
    _step_supports_amp_scaling = True
    _multiplies_update: ClassVar[bool]

    @staticmethod
    def _hyper(group: Mapping[str, Any]) -> Hyper:
        raise NotImplementedError

    @property
    def multiplies_update(self) -> bool:
        """Whether multipliers act on the update, as under Adam, and not on the gradient."""
        return self._multiplies_update

    @property
    def amplifiers(self) -> list[Amplifying]:
        """May be changed in place."""
        found: list[Amplifying] = self.__dict__.setdefault("_amplifiers", [])
        return found

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient, which is read only.

        ``closure`` computes the loss and its gradients anew, and is called first.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @_disable_dynamo
    @torch.no_grad()
    def _update(self) -> None:
        updates, alone = self._parts()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        call = Call(scale, found_inf, update=updates)
        done: set[int] = set()
        for amplifier in tuple(self.amplifiers):
            done.update(amplifier.update(call))
        alone.step(call, done)

    def _parts(self) -> tuple[UpdatesOf, Alone]:
        parts: tuple[UpdatesOf, Alone] | None = self.__dict__.get("_fused_parts")
        if parts is None:
            updates = UpdatesOf(self, self._hyper, self._multiplies_update)
            parts = self.__dict__["_fused_parts"] = updates, Alone(updates)
        return parts

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or of a checkpoint that torch's class, too, may have written."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.update(foreach=None, differentiable=False, fused=True)
        self.__dict__.pop("_fused_parts", None)


def rate(group: Mapping[str, Any]) -> float | Tensor:
    """A group's learning rate; a tensor where a kernel is to read it from the device."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return float(lr)
    on_device = lr.device.type != "cpu" and lr.dtype in (torch.float32, torch.float64)
    return lr.detach() if on_device else lr.item()
