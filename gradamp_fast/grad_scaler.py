"""Loss scaling whose unscaling is the amplifier's step."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from . import ops
from .amplifier import Amplifier
from .attach import Attachment, OneStep, refuse_growth, updates_itself, warn_if_scale_invariant
from .call import Call
from .model.optimizers import Holding
from .model.plan import Plan


class GradScaler(torch.amp.GradScaler):
    """A ``torch.amp.GradScaler`` that unscales, checks, measures and amplifies in one step.

    Use it in the place of torch's, and do not step the amplifier as well: ``unscale_(optimizer)``
    is one step over the optimizer's part of the model, and ``step(optimizer)`` makes it if
    ``unscale_`` was not called. An optimizer that unscales by itself (``fused=True``) is left to
    do so, unless ``unscale_`` was called. One of ``gradamp_fast.optim`` amplifies in its own step:
    it is attached to when it is met first, and gradients are as torch's scaler leaves them.
    Parameters of an optimizer that are not the
    amplifier's, such as another model's, are unscaled and checked as torch does it. With
    ``enabled=False`` nothing is scaled, and gradients are amplified all the same.

    Args:
        amplifier: of the model whose loss is scaled. Groups with
            ``param_group["amplify"] = False`` are left alone.
        device: torch's, and so are ``init_scale``, ``growth_factor``, ``backoff_factor``,
            ``growth_interval`` and ``enabled``.

    ``state_dict()`` is torch's; the amplifier has its own. A deep copy scales for the same
    amplifier; one that comes out of a pickle has none until ``scaler.amplifier`` is set, and
    raises RuntimeError before. ``unscale_`` and ``step`` raise ValueError for an optimizer that
    the amplifier is attached to, and warn, as ``attach`` does, for one that a constant factor
    does not move.
    """

    def __init__(self, amplifier: Amplifier, device: str = "cuda", **options: Any) -> None:
        self.amplifier = amplifier
        super().__init__(device, **options)

    @property
    def amplifier(self) -> Amplifier:
        """Of the model whose loss is scaled."""
        if self._amplifier is None:
            raise RuntimeError(
                "a scaler from a pickle does not know its amplifier: set scaler.amplifier"
            )
        return self._amplifier

    @amplifier.setter
    def amplifier(self, amplifier: Amplifier) -> None:
        if not isinstance(amplifier, Amplifier):
            kind = type(amplifier).__name__
            raise TypeError(f"amplifier must be a gradamp_fast.Amplifier, not a {kind}")
        self._begin_with(amplifier)

    def _begin_with(self, amplifier: Amplifier | None) -> None:
        self._amplifier = amplifier
        self._holdings: weakref.WeakKeyDictionary[Optimizer, _Split] = weakref.WeakKeyDictionary()
        self._amplified: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # unless enabled

    def __getstate__(self) -> dict[str, Any]:
        """As torch's, which can be taken between iterations alone; without the amplifier."""
        state = super().__getstate__()
        return {
            n: v for n, v in state.items() if n not in ("_amplifier", "_holdings", "_amplified")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin_with(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> GradScaler:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        other._begin_with(self._amplifier)
        return other

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divides the optimizer's gradients by the scale, and amplifies."""
        if self.is_enabled() or self._amplifies_itself(optimizer):
            super().unscale_(optimizer)
            return
        if optimizer in self._amplified:
            raise RuntimeError("unscale_() has already been called on this optimizer")
        self._amplify(optimizer)
        self._amplified.add(optimizer)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Amplifies unless ``unscale_`` has, then steps the optimizer unless it overflowed."""
        amplifies = self._amplifies_itself(optimizer)
        if not self.is_enabled() and not amplifies and optimizer not in self._amplified:
            once = OneStep(optimizer, partial(self._amplify, optimizer))
            given = once.enter((optimizer, *args), kwargs)
            if given is not None:
                args, kwargs = given[0][1:], given[1]
        self._amplified.discard(optimizer)
        return super().step(optimizer, *args, **kwargs)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Ends the iteration, as torch's does."""
        self._amplified.clear()
        super().update(new_scale)

    def _amplify(self, optimizer: Optimizer) -> None:
        ops.step(self.amplifier.bound, Call(), self._holding(optimizer))

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """The scaler's only look at the gradients, from ``unscale_``.

        Or, with an inverse of 1 and ``allow_fp16``, from the check for an optimizer that unscales
        by itself. Returns a ``found_inf`` for each device.
        """
        if self._amplifies_itself(optimizer):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        bound, holding = self.amplifier.bound, self._holding(optimizer)
        bound.prepare()
        split = holding.split(optimizer, bound.plan)
        if not allow_fp16 and any(p.dtype == torch.float16 for p in split.measured):
            raise ValueError("Attempting to unscale FP16 gradients.")
        ours = [*split.measured, *split.excluded]
        by_torch = [*split.others, *(p for p in ours if not p.requires_grad)]

        # What the amplifier does not touch comes first, for an overflow there has to skip its
        # step. What it excludes it does unscale, but it does not check that.
        found = super()._unscale_grads_(_group(by_torch), inv_scale, found_inf, allow_fp16)
        if not any(p.requires_grad and p.grad is not None for p in ours):
            return found
        checked = [p for p in split.excluded if p.requires_grad]
        one = torch.ones_like(inv_scale)
        more = super()._unscale_grads_(_group(checked), one, found_inf, allow_fp16)
        device = bound.device
        total = found_inf.to(device, copy=True)
        for other in (*found.values(), *more.values()):
            total += other.to(device, non_blocking=True)

        def only(plan: Plan) -> bytes | None:
            if plan is split.plan:
                return holding.only(plan)
            done = {id(p) for p in by_torch}  # bound only now: from the next step on
            mask = holding.only(plan) or bytes([1] * len(plan.slots))
            return bytes(
                held and id(slot.parameter) not in done
                for held, slot in zip(mask, plan.slots, strict=True)
            )

        assert self._scale is not None
        scale = self._scale.to(device, non_blocking=True)
        ops.step(bound, Call(scale, total, unscale=not allow_fp16), holding, only)
        return {**found, device: total}

    def _amplifies_itself(self, optimizer: Optimizer) -> bool:
        bound = self.amplifier.bound
        if not updates_itself(bound, optimizer):
            return False
        if not bound.attached_to(optimizer):
            Attachment(bound, optimizer)
        return True

    def _holding(self, optimizer: Optimizer) -> _Split:
        bound = self.amplifier.bound
        if bound.attached_to(optimizer):
            raise ValueError(
                "the amplifier is attached to this optimizer, which would amplify twice: remove "
                "the handle that attach() returned, or use torch.amp.GradScaler"
            )
        holding = self._holdings.get(optimizer)
        if holding is None:
            if bound.rules.grow:
                refuse_growth(optimizer)
            bound.meet()
            holding = self._holdings[optimizer] = _Split(optimizer)
            bound.join(holding)
            warn_if_scale_invariant(optimizer, stacklevel=4)
        bound.follow(holding)
        return holding


class _Parameters(NamedTuple):
    """An optimizer's parameters, by what a plan makes of them."""

    plan: Plan
    measured: list[Parameter]
    excluded: list[Parameter]
    others: list[Parameter]


class _Split(Holding):
    """Remembers the split for as long as plan and groups stay."""

    _split: _Parameters | None = None

    def split(self, optimizer: Optimizer, plan: Plan) -> _Parameters:
        if self._split is None or self._split.plan is not plan:
            layers = {id(slot.parameter): slot.layer for slot in plan.slots}
            self._split = _Parameters(plan, [], [], [])
            for group in optimizer.param_groups:
                for p in group["params"]:
                    layer = layers.get(id(p))
                    where = 3 if layer is None else 1 if layer >= 0 else 2
                    cast("list[Parameter]", self._split[where]).append(p)
        return self._split

    def changed(self) -> bool:
        changed = super().changed()
        if changed:
            self._split = None
        return changed


def _group(parameters: Sequence[Parameter]) -> Any:
    """What torch's scaler looks at in an optimizer."""
    return SimpleNamespace(param_groups=[{"params": parameters}])
