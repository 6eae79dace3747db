"""What an optimizer holds of a model, and which of it it wants amplified."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import ClassVar

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .plan import Plan


class Holding:
    """The parameters that one optimizer holds; its groups are looked at again by ``changed``.

    Attributes:
        number: in the order in which they were made.
        hook: by which the optimizer's steps amplify; None if something else calls the steps.
    """

    hook: RemovableHandle | None = None
    _count: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, optimizer: Optimizer) -> None:
        self.number = next(self._count)
        self._optimizer = weakref.ref(optimizer)
        self._seen = _groups(optimizer)
        self._mask: tuple[Plan, bytes | None] | None = None

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, for as long as it lives."""
        return self._optimizer()

    @property
    def attached(self) -> bool:
        """Whether the optimizer's steps amplify."""
        hooks = None if self.hook is None else self.hook.hooks_dict_ref()
        return self.hook is not None and hooks is not None and self.hook.id in hooks

    @property
    def active(self) -> bool:
        """Whether the optimizer's wishes still count."""
        return self.optimizer is not None and (self.hook is None or self.attached)

    def changed(self) -> bool:
        """Looks at the groups again; whether they changed."""
        optimizer = self.optimizer
        seen = self._seen if optimizer is None else _groups(optimizer)
        if seen == self._seen:
            return False
        self._seen, self._mask = seen, None
        return True

    def parameters(self) -> frozenset[int]:
        """Ids of all its parameters."""
        optimizer = self.optimizer
        groups = [] if optimizer is None else optimizer.param_groups
        return frozenset(id(p) for group in groups for p in group["params"])

    def unwanted(self) -> frozenset[int]:
        """Ids of those in groups with ``"amplify": False``."""
        optimizer = self.optimizer
        groups = [] if optimizer is None else optimizer.param_groups
        left_out = [group for group in groups if not group.get("amplify", True)]
        return frozenset(id(p) for group in left_out for p in group["params"])

    def only(self, plan: Plan) -> bytes | None:
        """A byte for each slot, 1 if the optimizer holds it; None if it holds all."""
        if self._mask is None or self._mask[0] is not plan:
            parameters = self.parameters()
            held = [id(slot.parameter) in parameters for slot in plan.slots]
            self._mask = plan, None if all(held) else bytes(held)
        return self._mask[1]


def _groups(optimizer: Optimizer) -> list[tuple[int, int, bool]]:
    """What changes when groups or their parameters do."""
    return [
        (id(group["params"]), len(group["params"]), group.get("amplify", True))
        for group in optimizer.param_groups
    ]
