"""One ``optimizer.step()``, whatever it is given: amplified once for each set of gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from . import ops


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
    gradients = gradients_of(optimizer)
    return [None if g is None else (weakref.ref(g), _version(g)) for g in gradients]


def _version(gradient: Tensor) -> int:
    return 0 if gradient.is_inference() else gradient._version


def gradients_of(optimizer: Optimizer) -> list[Tensor | None]:
    return [p.grad for group in optimizer.param_groups for p in group["params"]]


def _anything_new(optimizer: Optimizer, before: list[_Mark]) -> bool:
    """Whether some gradient is not what it was; in compiled code always."""
    if ops.compiling():
        return True
    gradients = gradients_of(optimizer)
    return len(gradients) != len(before) or any(
        g is not None and (mark is None or mark[0]() is not g or mark[1] != _version(g))
        for g, mark in zip(gradients, before, strict=True)
    )
