"""Steps of an Amplifier that an optimizer calls by itself."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from .call import Call
from .model.plan import Plan

if TYPE_CHECKING:
    from .amplifier import Amplifier

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


class Part:
    """What one optimizer holds of an amplifier's parameters, and which it wants amplified."""

    def __init__(self, amplifier: Amplifier, optimizer: Optimizer) -> None:
        self.amplifier = amplifier
        self._optimizer = weakref.ref(optimizer)
        self._seen = _groups(optimizer)
        self._mask: tuple[Plan, bytes | None] | None = None

    @property
    def active(self) -> bool:
        """Whether the optimizer's wishes still count."""
        return self._optimizer() is not None

    def begin(self) -> None:
        """From here on groups with ``"amplify": False`` are left out; all or nothing."""
        self.amplifier._parts.add(self)
        try:
            self.amplifier._exclude(self._left_out_by_all())
        except ValueError:
            self.amplifier._parts.discard(self)
            raise

    def end(self) -> None:
        self.amplifier._parts.discard(self)
        self.amplifier._exclude(self._left_out_by_all())

    def refresh(self, optimizer: Optimizer) -> bool:
        """Looks at the groups again; whether they changed."""
        seen = _groups(optimizer)
        if seen == self._seen:
            return False
        self._seen, self._mask = seen, None
        self.amplifier._exclude(self._left_out_by_all())
        return True

    def only(self, plan: Plan) -> bytes | None:
        """A byte for each slot, 1 if the optimizer holds it; None if it holds all."""
        if self._mask is None or self._mask[0] is not plan:
            optimizer = self._optimizer()
            assert optimizer is not None
            parameters = _parameters(optimizer)
            held = [id(slot.parameter) in parameters for slot in plan.slots]
            self._mask = plan, None if all(held) else bytes(held)
        return self._mask[1]

    def _left_out_by_all(self) -> frozenset[int]:
        """Ids of the parameters that the amplifier's optimizers do not want amplified."""
        optimizers = [part._optimizer() for part in self.amplifier._parts if part.active]
        return frozenset(
            id(p)
            for optimizer in optimizers
            if optimizer is not None
            for group in optimizer.param_groups
            if not group.get("amplify", True)
            for p in group["params"]
        )


class Attachment(Part):
    """Handle of ``Amplifier.attach``; ``remove()`` ends it.

    The optimizer's hook keeps it alive, and it the amplifier.
    """

    def __init__(self, amplifier: Amplifier, optimizer: Optimizer) -> None:
        super().__init__(amplifier, optimizer)
        if not getattr(type(optimizer).step, "hooked", False):
            raise TypeError(
                f"{type(optimizer).__name__}.step() calls no hooks, so nothing would be amplified: "
                "attach to the optimizer inside it, or let it call Optimizer.__init__"
            )
        if any(other.serves(optimizer) for other in attachments(amplifier)):
            raise ValueError("the amplifier is attached to this optimizer already")
        amplifier._rebind(warn=bool(amplifier._owned))  # new parameters, new optimizer
        plan = amplifier._plan
        ours = {id(p) for p in (*(slot.parameter for slot in plan.slots), *plan.watched)}
        if ours.isdisjoint(_parameters(optimizer)):
            raise ValueError("the optimizer holds no parameter of the amplifier's model")
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        try:
            self.begin()
        except ValueError:
            self._hook.remove()
            raise
        warn_if_scale_invariant(optimizer, stacklevel=3)

    @property
    def active(self) -> bool:
        """Whether an optimizer's steps still amplify."""
        hooks = self._hook.hooks_dict_ref()
        return hooks is not None and self._hook.id in hooks

    def serves(self, optimizer: Optimizer) -> bool:
        return self.active and self._optimizer() is optimizer

    def remove(self) -> None:
        """The optimizer's steps no longer amplify."""
        self._hook.remove()
        self.end()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """``args`` begins with the optimizer."""
        return after_backward(partial(self._step, optimizer), args, kwargs)

    def _step(self, optimizer: Optimizer) -> None:
        self.refresh(optimizer)
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            scale = getattr(optimizer, "grad_scale", None)
            found_inf = getattr(optimizer, "found_inf", None)
            self.amplifier._step(Call(scale, found_inf, unscale=False), self.only)
        else:
            self.amplifier._step(Call(), self.only)


def attachments(amplifier: Amplifier) -> list[Attachment]:
    """Those that still step the amplifier."""
    return [p for p in amplifier._parts if isinstance(p, Attachment) and p.active]


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


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _groups(optimizer: Optimizer) -> list[tuple[int, int, bool]]:
    """What changes when groups or their parameters do."""
    return [
        (id(group["params"]), len(group["params"]), group.get("amplify", True))
        for group in optimizer.param_groups
    ]
