"""What every attachment of an Amplifier to an optimizer is, and which optimizers can have one."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .bound_model import BoundModel
from .model.optimizers import Holding
from .one_step import gradients_of
from .optimizer_scale import follows_gradient_size, inside

# Under these names an optimizer keeps one that it steps: Accelerate's, Lookahead, SAM. Its own
# hooks are not called then, or not on the gradients that count.
_STEPS_ANOTHER = ("optimizer", "base_optimizer", "_base_optimizer")


class Attachment:
    """Handle of ``Amplifier.attach``; ``remove()`` ends it.

    The optimizer's hooks keep it alive, and it what is bound of the model.
    """

    multiplies_update: bool = False

    def __init__(self, bound: BoundModel, optimizer: Optimizer) -> None:
        _refuse_without_hooks(optimizer)
        if bound.attached_to(optimizer):
            raise ValueError("the amplifier is attached to this optimizer already")
        bound.meet()
        holding = Holding(optimizer)
        if not bound.knows_any_of(holding):
            raise ValueError("the optimizer holds no parameter of the amplifier's model")
        self._bound, self._holding = bound, holding
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )
        holding.hook = self._hooks[0]
        holding.multiplies_update = self.multiplies_update
        try:
            bound.join(holding)
        except ValueError:
            self._unhook()
            raise

    @property
    def active(self) -> bool:
        """Whether the optimizer's steps still amplify."""
        return self._holding.attached

    def remove(self) -> None:
        """The optimizer's steps no longer amplify."""
        self._unhook()
        self._bound.leave(self._holding)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """``args`` begins with the optimizer."""
        raise NotImplementedError

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        raise NotImplementedError


def warn_if_scale_invariant(optimizer: Optimizer, stacklevel: int = 2) -> None:
    """Warns if a layer goes no further when its gradients are larger, as under Adam."""
    if not follows_gradient_size(optimizer):
        warnings.warn(
            f"{type(optimizer).__name__} divides out the scale of a layer's gradients: a constant "
            "factor changes nothing, and a change of factor acts as a short kick to the learning "
            "rate. Use gradamp_fast.optim.AdamW, whose updates are multiplied, or SGD.",
            stacklevel=stacklevel + 1,
        )


def refuse_growth(optimizer: Optimizer) -> None:
    """ValueError if a layer goes no further when its gradients are larger, as under Adam."""
    if not follows_gradient_size(optimizer):
        raise ValueError(
            f"grow=True does nothing under {type(optimizer).__name__}, which divides out the "
            "scale of a layer's gradients: use gradamp_fast.optim.AdamW, whose updates are "
            "multiplied, or SGD, or leave grow out"
        )


def innermost(optimizer: Any) -> Optimizer:
    """The optimizer whose steps move the parameters, and whose hooks are called before."""
    found = inside(optimizer, _STEPS_ANOTHER)
    if not isinstance(found, Optimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not a {kind}")
    return found


def _refuse_without_hooks(optimizer: Optimizer) -> None:
    """TypeError where nothing would call a hook."""
    kind = type(optimizer).__name__
    if hasattr(optimizer, "fused_backward"):
        raise TypeError(
            f"{kind} updates inside fused_backward(), while gradients are computed, and calls no "
            "hooks: nothing would be amplified; use an optimizer that steps"
        )
    own = inspect.unwrap(type(optimizer).step)
    hooked = getattr(type(optimizer).step, "hooked", False)
    if not hooked or own is inspect.unwrap(Optimizer.step):
        raise TypeError(
            f"{kind}.step() calls no hooks, so nothing would be amplified: attach to the optimizer "
            "inside it, or let it call Optimizer.__init__ and have a step of its own"
        )


def makes_state_only(optimizer: Optimizer) -> bool:
    """Whether this is a step that only makes an optimizer's state, as for a checkpoint.

    The learning rate is 0 then, and so are all gradients; where it is not, nothing is looked at.
    """
    for group in optimizer.param_groups:
        rate = group.get("lr", 1.0)
        if (isinstance(rate, Tensor) and rate.device.type != "cpu") or rate != 0:
            return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    gradients = [g for g in gradients_of(optimizer) if g is not None]
    return bool(gradients) and not any(bool(g.any()) for g in gradients)
