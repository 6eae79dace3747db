"""Steps of an Amplifier that an optimizer calls by itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from .plan import Plan

if TYPE_CHECKING:
    from .amplifier import Amplifier

# Their updates do not change when a layer's gradients are multiplied by a constant.
_SCALE_INVARIANT = (
    "adam", "adagrad", "adadelta", "rmsprop", "rprop", "lion", "lamb", "lars", "muon", "adafactor",
    "shampoo", "soap", "adan", "adabelief", "adopt", "prodigy", "sophia",
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


class Attachment:
    """Handle of ``Amplifier.attach``; ``remove()`` ends it."""

    def __init__(self, amplifier: Amplifier, optimizer: Optimizer) -> None:
        self.amplifier = amplifier
        self._seen: object = None  # the groups as they were when the mask was made
        self._mask: tuple[Plan, bytes | None] | None = None
        self._parameters: frozenset[int] = frozenset()
        self.left_out: frozenset[int] = frozenset()
        self._look_at(optimizer)
        if not self._parameters & {id(slot.parameter) for slot in amplifier._plan.slots}:
            raise ValueError("the optimizer holds no trainable parameter of the amplifier's model")
        warn_if_scale_invariant(optimizer, stacklevel=3)
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        self.active = True

    def remove(self) -> None:
        """The optimizer's steps no longer amplify."""
        self._hook.remove()
        self.active = False

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """``args`` begins with the optimizer; a closure makes the gradients after this call."""
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._amplified(optimizer, args[1]), *args[2:]), kwargs
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._amplified(optimizer, kwargs["closure"])}
        self._step(optimizer)
        return None

    def _amplified(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def amplified_closure() -> Any:
            loss = closure()
            self._step(optimizer)
            return loss

        return amplified_closure

    def _step(self, optimizer: Optimizer) -> None:
        self._look_at(optimizer)
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            scale = getattr(optimizer, "grad_scale", None)
            found_inf = getattr(optimizer, "found_inf", None)
            self.amplifier._step(scale, found_inf, False, self._only)
        else:
            self.amplifier._step(None, None, True, self._only)

    def _look_at(self, optimizer: Optimizer) -> None:
        """Notices new groups and parameters, and groups that are not to be amplified."""
        groups = optimizer.param_groups
        seen = [(len(group["params"]), group.get("amplify", True)) for group in groups]
        if seen == self._seen:
            return
        self._seen = seen
        self._mask = None
        self._parameters = frozenset(id(p) for group in groups for p in group["params"])
        self.left_out = frozenset(
            id(p) for group in groups if not group.get("amplify", True) for p in group["params"]
        )
        others = [a.left_out for a in self.amplifier._attachments if a is not self and a.active]
        self.amplifier._exclude(self.left_out.union(*others))

    def _only(self, plan: Plan) -> bytes | None:
        """A byte for each slot, 1 if the optimizer holds it; None if it holds all."""
        if self._mask is None or self._mask[0] is not plan:
            held = [id(slot.parameter) in self._parameters for slot in plan.slots]
            self._mask = plan, None if all(held) else bytes(held)
        return self._mask[1]
