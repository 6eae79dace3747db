"""Which parameters are members of their layers: those that had a gradient, and still may."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence

from torch import Tensor

from .plan import Plan

# So many steps without some member's gradient are no accident.
LACKING_FOR_LONG = 1000

Order = tuple[int, ...] | None


class Members:
    """The members of a plan's layers, as the host knows them; part of the state.

    A layer is measured in steps in which all its members have a gradient. It begins anew when one
    joins or leaves, and when the elements of one come in another order.

    Attributes:
        flags: of each measured slot: 0 if it is no member, 1 if it is one whose elements lie in
            row-major order, 2 if in another, 3 if in another that no step has seen. The compiled
            stepper reads and writes them.
        orders: of each measured slot, the dimensions from the outermost in memory to the
            innermost; None for row-major order.
        lacking: of each layer, how many steps in a row had some of its gradients, but not all; -1
            before the first of them. Written by the compiled stepper as well.
        anew: layers that begin anew because of what was looked at last.
        untold: layers whose state has to be told how many elements their members have: it takes
            the first step that it measures for one of all members.
        restored: how often all this was forgotten, or came out of a checkpoint.
    """

    def __init__(self, plan: Plan) -> None:
        self.flags = bytearray(plan.measured)
        self.orders: list[Order] = [None] * plan.measured
        self.lacking = array("q", [-1] * len(plan.layers))
        self.anew: list[int] = []
        self.untold: list[int] = []
        self.restored = 0
        self._incomplete: list[int] = []  # layers, in the step that was looked at last
        self._warned = False

    def clear(self) -> None:
        self.restored += 1
        for index in range(len(self.flags)):
            self.flags[index], self.orders[index] = 0, None
        for layer in range(len(self.lacking)):
            self.lacking[layer] = -1

    def set(self, index: int, order: Order, seen: bool = True) -> None:
        self.flags[index] = 1 if order is None else 2 if seen else 3
        self.orders[index] = order

    def numel(self, plan: Plan, layer: int) -> int:
        """Elements of a layer's members, wherever they are."""
        return sum(plan.slots[index].total for index in plan.slots_of[layer] if self.flags[index])

    def look(self, plan: Plan, gradients: Sequence[Tensor | None], wanted: Sequence[bool]) -> None:
        """Takes note of a step's gradients, one or None for each slot.

        ``wanted``: False for a slot that the step leaves out.
        """
        self.anew, self.untold, self._incomplete = [], [], []
        for layer, indices in enumerate(plan.slots_of):
            if all(gradients[index] is None for index in indices):
                continue
            fresh, changed, complete = not any(self.flags[i] for i in indices), False, True
            for index in indices:
                gradient = gradients[index]
                if gradient is not None:
                    order = order_of(gradient)
                    changed |= not self.flags[index] or self.orders[index] != order
                    self.set(index, order)
                elif self.flags[index]:
                    if wanted[index] and plan.slots[index].parameter.requires_grad:
                        complete = False
                    else:  # it was frozen alone, or is stepped by nobody any more
                        self.flags[index], changed = 0, True
            if changed and not fresh:
                self.anew.append(layer)
            if complete:
                self.lacking[layer] = min(self.lacking[layer], 0)
                continue
            self._incomplete.append(layer)
            if self.lacking[layer] < 0:
                self.untold.append(layer)
            self.lacking[layer] = max(self.lacking[layer], 0) + 1
        self._warn(plan)

    def again(self, plan: Plan) -> None:
        """Takes note of a step with the same gradients as in the one that was looked at last."""
        for layer in self._incomplete:
            self.lacking[layer] += 1
        if self._incomplete:
            self._warn(plan)

    def _warn(self, plan: Plan) -> None:
        if self._warned:
            return
        for layer in self._incomplete:
            if self.lacking[layer] < LACKING_FOR_LONG:
                continue
            self._warned = True
            name = next(
                plan.slots[index].name
                for index in plan.slots_of[layer]
                if self.flags[index] and plan.slots[index].parameter.grad is None
            )
            warnings.warn(
                f"layer {plan.layers[layer]!r} has not been measured for {LACKING_FOR_LONG} steps: "
                f"its parameter {name!r} had no gradient, others of it had; exclude that one, or "
                'make it a layer of its own (group_by="tensor")',
                stacklevel=2,
            )
            return


def order_of(gradient: Tensor) -> Order:
    """The dimensions from the outermost in memory to the innermost; None for row-major order.

    That is the order in which a step takes the elements: row-major too for a gradient that it
    copies.
    """
    copied = gradient.is_conj() or gradient.is_neg() or not is_dense(gradient)
    if copied or gradient.is_contiguous():
        return None
    strides = gradient.stride()
    longer = [dim for dim, size in enumerate(gradient.shape) if size > 1]
    return tuple(sorted(longer, key=lambda dim: -strides[dim]))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each once, in whatever order."""
    expected = 1
    for stride, size in sorted(
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size != 1
    ):
        if size == 0:
            return True
        if stride != expected:
            return False
        expected *= size
    return True
