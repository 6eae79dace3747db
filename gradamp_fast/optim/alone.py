"""Updates without an amplifier."""

from __future__ import annotations

from collections.abc import Collection

from .. import backends
from ..call import Call, Outcome
from ..model.gradients import state_device
from ..model.plan import Member, Plan, make_plan
from ..options import Options
from ..reference import State
from .updates import UpdatesOf


class Alone:
    """Makes the updates of those parameters of an optimizer that no amplifier takes part in.

    To a backend that is a step over a model without layers.
    """

    _plan: Plan
    _backend: backends.Stepping

    def __init__(self, updates: UpdatesOf) -> None:
        self._updates = updates
        self._version = 0

    def step(self, call: Call, done: Collection[int]) -> None:
        """``done``: ids of parameters that are updated already."""
        self._updates.look()
        if self._version != self._updates.version:
            self._bind()
        only = bytes(id(slot.parameter) not in done for slot in self._plan.slots)
        if 1 not in only:
            return
        if done:
            call = call._replace(only=only)
        outcome = self._backend.step(call)
        if outcome is Outcome.REBIND:
            self._bind()
        if outcome in (Outcome.REBIND, Outcome.MISSING):
            self._backend.step(call._replace(walked=True))

    def _bind(self) -> None:
        members: list[Member] = []
        for number, group in enumerate(self._updates.optimizer.param_groups):
            names = group.get("param_names") or [
                f"parameter {index} of group {number}" for index in range(len(group["params"]))
            ]
            members += [(n, p, None) for n, p in zip(names, group["params"], strict=True)]
        self._plan = make_plan(members, watched=())
        self._version = self._updates.version
        if self._plan.slots:
            device = state_device(self._plan)
            rules = Options.make({}).rules()
            state = State(self._plan, rules.factor, device)
            self._backend = backends.choose("auto", device)(self._plan, state, rules)
