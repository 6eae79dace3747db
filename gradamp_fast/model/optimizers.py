"""What an optimizer holds of a model, and which of it it wants amplified."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Iterator
from itertools import chain
from typing import ClassVar

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..learning_rates import LearningRates
from .plan import Plan


class Holding:
    """The parameters that one optimizer holds; its groups are looked at again by ``changed``.

    Attributes:
        number: in the order in which they were made.
        hook: by which the optimizer's steps amplify; None if something else calls the steps.
        rates: the learning rates of its groups at the last step.
        multiplies_update: whether its updates are multiplied, not the gradients.
    """

    multiplies_update: bool = False
    hook: RemovableHandle | None = None
    _count: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, optimizer: Optimizer) -> None:
        self.number = next(self._count)
        self._optimizer = weakref.ref(optimizer)
        self.rates = LearningRates()
        # Held, and compared by identity: addresses are given to other parameters in time.
        self._parameters: list[Parameter] = []
        self._groups: list[tuple[int, object]] = []
        self._unwanted: frozenset[int] = frozenset()
        self._mask: tuple[weakref.ref[Plan], bytes | None] | None = None
        self.changed()

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
        """Looks at the groups again; whether they, or what they hold, changed."""
        optimizer = self.optimizer
        if optimizer is None:
            return False
        given = optimizer.param_groups
        groups = [(len(group["params"]), group.get("amplify")) for group in given]
        held = chain.from_iterable(group["params"] for group in given)
        if groups == self._groups and all(map(operator.is_, held, self._parameters)):
            return False
        # A group that lost its key, as by a checkpoint without it, does not change its mind.
        self._unwanted = frozenset(
            id(p)
            for group in given
            for p in group["params"]
            if not group.get("amplify", id(p) not in self._unwanted)
        )
        self._parameters = [p for group in given for p in group["params"]]
        self._groups, self._mask = groups, None
        return True

    @property
    def parameters(self) -> frozenset[int]:
        """Ids of all its parameters."""
        return frozenset(map(id, self._parameters))

    @property
    def unwanted(self) -> frozenset[int]:
        """Ids of those in groups with ``"amplify": False``."""
        return self._unwanted

    def only(self, plan: Plan) -> bytes | None:
        """A byte for each slot, 1 if the optimizer holds it; None if it holds all."""
        if self._mask is None or self._mask[0]() is not plan:
            parameters = self.parameters
            held = [id(slot.parameter) in parameters for slot in plan.slots]
            self._mask = weakref.ref(plan), None if all(held) else bytes(held)
        return self._mask[1]

    def let_go(self) -> None:
        """Holds no parameter any more: the model is gone."""
        self._parameters, self._groups, self._mask = [], [], None
