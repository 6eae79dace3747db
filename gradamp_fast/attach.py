"""Steps of an Amplifier that an optimizer calls by itself: before its own step, or within it."""

from __future__ import annotations

import inspect
import warnings
from functools import partial
from typing import Any

from torch.optim import Optimizer

from . import ops
from .attachment import Attachment, makes_state_only, refuse_growth, warn_if_scale_invariant
from .bound_model import BoundModel
from .call import Call
from .model.optimizers import scaling_of
from .one_step import OneStep
from .optim import Fused


def attach(bound: BoundModel, optimizer: Optimizer) -> Attachment:
    """As ``Amplifier.attach`` says, which calls it."""
    if updates_itself(bound, optimizer):
        return WithinStep(bound, optimizer)
    return BeforeStep(bound, optimizer)


def updates_itself(bound: BoundModel, optimizer: Optimizer) -> bool:
    """Whether the optimizer's own pass amplifies; not where backpropagation does."""
    return isinstance(optimizer, Fused) and not bound.rules.backward


class BeforeStep(Attachment):
    """Gradients are multiplied, then the optimizer steps: any of torch's, or of others."""

    def __init__(self, bound: BoundModel, optimizer: Optimizer) -> None:
        if bound.rules.grow:
            refuse_growth(optimizer)
        self._depth = 0  # of calls of step within each other
        super().__init__(bound, optimizer)
        warn_if_scale_invariant(optimizer, stacklevel=4)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
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
        if makes_state_only(optimizer):
            return
        self._bound.follow(self._holding)
        call = Call()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            call = Call(*scaling_of(optimizer), unscale=False)
        ops.step(self._bound, call, self._holding)


class WithinStep(Attachment):
    """One of ``gradamp_fast.optim`` amplifies in the pass that updates.

    ``always``: in each of its steps, else in the next one after ``arm`` alone.
    """

    def __init__(self, bound: BoundModel, optimizer: Optimizer, always: bool = True) -> None:
        assert isinstance(optimizer, Fused)
        self.multiplies_update = optimizer.multiplies_update
        self.always, self._armed = always, always
        self._given = Call()
        self._came = self._warned = False
        super().__init__(bound, optimizer)
        optimizer.amplifiers.append(self)

    def remove(self) -> None:
        super().remove()
        optimizer = self._holding.optimizer
        if isinstance(optimizer, Fused) and self in optimizer.amplifiers:
            optimizer.amplifiers.remove(self)

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

    def part(self) -> frozenset[int]:
        """Before a step: ids of the parameters that it is to update; none if it takes no part."""
        self._came = True
        optimizer = self._holding.optimizer
        if not (self._armed and self.active) or optimizer is None or makes_state_only(optimizer):
            return frozenset()
        self._bound.follow(self._holding)
        return self._holding.part(self._bound.plan)

    def update(self, call: Call) -> frozenset[int]:
        """Amplifies and updates; ids of the parameters that it was for, as the model is now."""
        self._armed = self.always
        if call.grad_scale is None and call.found_inf is None:
            call = call._replace(grad_scale=self._given.grad_scale, found_inf=self._given.found_inf)
        self._bound.step(call, self._holding)
        return self._holding.part(self._bound.plan)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._came = False

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._armed and not self._came and not self._warned:
            self._warned = True
            kind = type(optimizer)
            warnings.warn(
                f"{kind.__name__}.step() did not call the step of gradamp_fast.optim."
                f"{_base(kind).__name__}, so nothing was amplified: let it call super().step()",
                stacklevel=3,
            )


def _base(kind: type[Optimizer]) -> type[Optimizer]:
    """The class of this package that another one is made from."""
    return next(k for k in kind.__mro__ if k.__module__.startswith(f"{__package__}.optim."))


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
