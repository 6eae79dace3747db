"""Steps of an Amplifier that an optimizer calls by itself."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import ops
from .bound_model import BoundModel
from .call import Call
from .model.optimizers import Holding
from .optim import Fused
from .optimizer_scale import follows_gradient_size, inside

# Under these names an optimizer keeps one that it steps: Accelerate's, Lookahead, SAM. Its own
# hooks are not called then, or not on the gradients that count.
_STEPS_ANOTHER = ("optimizer", "base_optimizer", "_base_optimizer")


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


def updates_itself(bound: BoundModel, optimizer: Optimizer) -> bool:
    """Whether the optimizer's own pass amplifies; not where backpropagation does."""
    return isinstance(optimizer, Fused) and not bound.rules.backward


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


class Attachment:
    """Handle of ``Amplifier.attach``; ``remove()`` ends it.

    The optimizer's hook keeps it alive, and it what is bound of the model. One of
    ``gradamp_fast.optim`` is given a part in its steps; ``always``: in each of them, else in the
    next one after ``arm`` alone.
    """

    def __init__(self, bound: BoundModel, optimizer: Optimizer, always: bool = True) -> None:
        _refuse_without_hooks(optimizer)
        if bound.attached_to(optimizer):
            raise ValueError("the amplifier is attached to this optimizer already")
        fused = updates_itself(bound, optimizer)
        if bound.rules.grow and not fused:
            refuse_growth(optimizer)
        bound.meet()
        plan, holding = bound.plan, Holding(optimizer)
        ours = {id(p) for p in (*(slot.parameter for slot in plan.slots), *plan.watched)}
        if ours.isdisjoint(holding.parameters):
            raise ValueError("the optimizer holds no parameter of the amplifier's model")
        self._bound, self._holding, self._fused = bound, holding, fused
        self.always, self._armed = always, always
        self._given = Call()
        self._depth = 0  # of calls of step within each other
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )
        holding.hook = self._hooks[0]
        holding.multiplies_update = (
            fused and isinstance(optimizer, Fused) and optimizer.multiplies_update
        )
        try:
            bound.join(holding)
        except ValueError:
            self._unhook()
            raise
        if isinstance(optimizer, Fused) and fused:
            optimizer.amplifiers.append(self)
        else:
            warn_if_scale_invariant(optimizer, stacklevel=3)

    @property
    def active(self) -> bool:
        """Whether the optimizer's steps still amplify."""
        return self._holding.attached

    def remove(self) -> None:
        """The optimizer's steps no longer amplify."""
        self._unhook()
        optimizer = self._holding.optimizer
        if isinstance(optimizer, Fused) and self in optimizer.amplifiers:
            optimizer.amplifiers.remove(self)
        self._bound.leave(self._holding)

    def amplifies_for(self, bound: BoundModel) -> bool:
        return self._bound is bound

    def arm(self, call: Call) -> None:
        """The optimizer's next step amplifies, with the call's scale unless it has one.

        ValueError if every step does, or if that leaves out a part of the model.
        """
        if self.always:
            raise ValueError(
                "the model's Amplifier is attached to this optimizer, which amplifies by itself: "
                "remove this call, or the handle that attach() returned"
            )
        self._bound.follow(self._holding)
        plan = self._bound.plan
        for held, slot in zip(self._holding.only(plan) or (), plan.slots, strict=False):
            if not held and slot.layer >= 0:
                raise ValueError(
                    f"the optimizer does not hold {slot.name!r}, so its step cannot amplify the "
                    "whole model: attach an Amplifier to each of the optimizers"
                )
        self._armed, self._given = True, call

    def update(self, call: Call) -> Collection[int]:
        """In the step of an optimizer of ``gradamp_fast.optim``: amplifies and updates.

        Returns the ids of all parameters that had their turn.
        """
        optimizer = self._holding.optimizer
        armed, self._armed = self._armed, self.always
        if not (armed and self.active and optimizer) or _makes_state_only(optimizer):
            return ()
        if call.grad_scale is None and call.found_inf is None:
            call = call._replace(grad_scale=self._given.grad_scale, found_inf=self._given.found_inf)
        self._bound.follow(self._holding)
        self._bound.step(call, self._holding)
        held = self._holding.parameters
        return {
            id(slot.parameter)
            for slot in self._bound.plan.slots
            if slot.parameter.requires_grad and id(slot.parameter) in held
        }

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """``args`` begins with the optimizer."""
        if self._fused:
            return None
        if self._depth > 0 and not ops.compiling():
            self._depth = _steps_under_way(optimizer)  # one that raised was not counted down
        self._depth += 1
        if self._depth == 1:
            self._once = OneStep(optimizer, partial(self._step, optimizer))
        return self._once.enter(args, kwargs)

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._depth = max(self._depth - 1, 0)

    def _step(self, optimizer: Optimizer) -> None:
        if _makes_state_only(optimizer):
            return
        self._bound.follow(self._holding)
        call = Call()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            scale = getattr(optimizer, "grad_scale", None)
            call = Call(scale, getattr(optimizer, "found_inf", None), unscale=False)
        ops.step(self._bound, call, self._holding)


class OneStep:
    """One ``optimizer.step()``: what it begins with is amplified, or what its closure computes.

    A subclass that calls ``super().step()`` enters several times, for torch wraps both.
    """

    def __init__(self, optimizer: Optimizer, amplify: Callable[[], None]) -> None:
        self._optimizer, self._amplify = optimizer, amplify
        self._count = 0

    def enter(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Amplifies, unless that was done or a closure is there to do it after each of its calls.

        ``args`` begins with the optimizer. Returns the arguments with the closure that does so.
        """
        if len(args) > 1 and callable(args[1]):
            return (args[0], partial(self._called, args[1]), *args[2:]), kwargs
        if callable(closure := kwargs.get("closure")):
            return args, {**kwargs, "closure": partial(self._called, closure)}
        if self._count == 0:
            self._now()
        return None

    def _called(self, closure: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the closure; a call that only looks at the loss leaves the gradients alone."""
        count, before = self._count, _marks(self._optimizer)
        out = closure(*args, **kwargs)
        if self._count == count and (count == 0 or _anything_new(self._optimizer, before)):
            self._now()
        return out

    def _now(self) -> None:
        self._count += 1
        self._amplify()


_Mark = tuple["weakref.ref[Tensor]", int] | None


def _marks(optimizer: Optimizer) -> list[_Mark]:
    """By which gradients are known again, without holding them."""
    if ops.compiling():
        return []
    gradients = _gradients(optimizer)
    return [None if g is None else (weakref.ref(g), _version(g)) for g in gradients]


def _version(gradient: Tensor) -> int:
    return 0 if gradient.is_inference() else gradient._version


def _gradients(optimizer: Optimizer) -> list[Tensor | None]:
    return [p.grad for group in optimizer.param_groups for p in group["params"]]


def _anything_new(optimizer: Optimizer, before: list[_Mark]) -> bool:
    """Whether some gradient is not what it was; in compiled code always."""
    if ops.compiling():
        return True
    gradients = _gradients(optimizer)
    return len(gradients) != len(before) or any(
        g is not None and (mark is None or mark[0]() is not g or mark[1] != _version(g))
        for g, mark in zip(gradients, before, strict=True)
    )


# What torch makes of every optimizer's ``step``: the function that calls the hooks.
_CALLS_HOOKS = Optimizer.profile_hook_step(Optimizer.step).__code__


def _steps_under_way(optimizer: Optimizer) -> int:
    """Calls of the optimizer's ``step`` that have not returned, but for the innermost."""
    frame, found = inspect.currentframe(), -1
    while frame is not None:
        if frame.f_code is _CALLS_HOOKS and frame.f_locals["args"][0] is optimizer:
            found += 1
        frame = frame.f_back
    return found


def _makes_state_only(optimizer: Optimizer) -> bool:
    """Whether this is a step that only makes an optimizer's state, as for a checkpoint.

    The learning rate is 0 then, and so are all gradients; where it is not, nothing is looked at.
    """
    for group in optimizer.param_groups:
        rate = group.get("lr", 1.0)
        if (isinstance(rate, Tensor) and rate.device.type != "cpu") or rate != 0:
            return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    gradients = [g for g in _gradients(optimizer) if g is not None]
    return bool(gradients) and not any(bool(g.any()) for g in gradients)
