"""Steps of an Amplifier that an optimizer calls by itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer

from . import ops
from .bound_model import BoundModel
from .call import Call
from .model.optimizers import Holding

# Their updates do not change when a layer's gradients are multiplied by a constant.
_SCALE_INVARIANT = (
    "adam", "adagrad", "adadelta", "rmsprop", "rprop", "lion", "lamb", "lars", "muon", "adafactor",
    "shampoo", "soap", "adan", "adabelief", "adopt", "prodigy", "sophia", "novograd", "signsgd",
    "laprop", "mars", "kron",
)  # fmt: skip


def warn_if_scale_invariant(optimizer: Optimizer, stacklevel: int = 2) -> None:
    """Warns for an optimizer, known by its class's name or an ancestor's, like Adam."""
    names = [ancestor.__name__.lower() for ancestor in type(optimizer).__mro__]
    if any(known in name for name in names for known in _SCALE_INVARIANT):
        warnings.warn(
            f"{type(optimizer).__name__} divides out the scale of a layer's gradients: a constant "
            "factor changes nothing, and a change of factor acts as a short kick to the learning "
            "rate. Use SGD, or scale learning rates by parameter group instead.",
            stacklevel=stacklevel + 1,
        )


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside wrappers, Accelerate's or timm's Lookahead, which call no hooks."""
    for name in ("optimizer", "_base_optimizer"):
        if isinstance(inner := getattr(optimizer, name, None), Optimizer):
            return innermost(inner)
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not a {kind}")
    return optimizer


class Attachment:
    """Handle of ``Amplifier.attach``; ``remove()`` ends it.

    The optimizer's hook keeps it alive, and it what is bound of the model.
    """

    def __init__(self, bound: BoundModel, optimizer: Optimizer) -> None:
        if not getattr(type(optimizer).step, "hooked", False):
            raise TypeError(
                f"{type(optimizer).__name__}.step() calls no hooks, so nothing would be amplified: "
                "attach to the optimizer inside it, or let it call Optimizer.__init__"
            )
        if bound.attached_to(optimizer):
            raise ValueError("the amplifier is attached to this optimizer already")
        bound.meet()
        plan, holding = bound.plan, Holding(optimizer)
        ours = {id(p) for p in (*(slot.parameter for slot in plan.slots), *plan.watched)}
        if ours.isdisjoint(holding.parameters()):
            raise ValueError("the optimizer holds no parameter of the amplifier's model")
        self._bound, self._holding = bound, holding
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        holding.hook = self._hook
        try:
            bound.join(holding)
        except ValueError:
            self._hook.remove()
            raise
        warn_if_scale_invariant(optimizer, stacklevel=3)

    @property
    def active(self) -> bool:
        """Whether the optimizer's steps still amplify."""
        return self._holding.attached

    def remove(self) -> None:
        """The optimizer's steps no longer amplify."""
        self._hook.remove()
        self._bound.leave(self._holding)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """``args`` begins with the optimizer."""
        return after_backward(partial(self._step, optimizer), args, kwargs)

    def _step(self, optimizer: Optimizer) -> None:
        self._bound.follow(self._holding)
        call = Call()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            scale = getattr(optimizer, "grad_scale", None)
            call = Call(scale, getattr(optimizer, "found_inf", None), unscale=False)
        ops.step(self._bound, call, self._holding)


def after_backward(
    step: Callable[[], None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Steps now, or after each call of the closure if ``optimizer.step``'s arguments hold one.

    ``args`` begins with the optimizer. Returns the arguments with the closure that does so.
    """
    if len(args) > 1 and args[1] is not None:
        return (args[0], partial(_call_and_step, args[1], step), *args[2:]), kwargs
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": partial(_call_and_step, kwargs["closure"], step)}
    step()
    return None


def _call_and_step(closure: Callable[[], Any], step: Callable[[], None]) -> Any:
    loss = closure()
    step()
    return loss
