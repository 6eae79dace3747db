"""Updates without an amplifier."""

from __future__ import annotations

from .. import backends
from ..call import Call, Outcome
from ..model.gradients import FROZEN, TRAINABLE, GradientReader, state_device
from ..model.plan import Member, Plan, make_plan
from ..options import Options
from ..reference import State
from .updates import UpdatesOf

Parts = tuple[frozenset[int], ...]


class Alone:
    """Makes the updates of those parameters of an optimizer that no amplifier takes part in.

    To a backend that is a step over a model without layers. A parameter that is frozen is
    nobody's part: as with torch's optimizers its gradient, if it has one still, moves it.
    """

    _plan: Plan
    _backend: backends.Stepping | None

    def __init__(self, updates: UpdatesOf) -> None:
        self._updates = updates
        self._version = 0
        self._mask: tuple[Parts | None, bytes] = None, b""

    def step(self, call: Call, parts: Parts) -> None:
        """``parts``: ids of the parameters that are updated already."""
        call = self._call(call, parts)
        if self._backend is None:
            return
        outcome = self._backend.step(call)
        if outcome is Outcome.REBIND:
            self._bind()
        if outcome in (Outcome.REBIND, Outcome.MISSING):
            self._backend.step(call._replace(walked=True))

    def check(self, call: Call, part: frozenset[int]) -> None:
        """Raises, with nothing changed, what a step of all but a part would raise."""
        call = self._call(call, (part,))
        slots = self._plan.slots
        if all(s.parameter.grad is None for s in slots if id(s.parameter) not in part):
            return
        reader = GradientReader(self._plan, state_device(self._plan))
        if not isinstance(reader.read(call._replace(walked=True)), Outcome):
            reader.updated(call)

    def _call(self, call: Call, parts: Parts) -> Call:
        """The call, for what is left."""
        self._updates.look()
        if self._version != self._updates.version:
            self._bind()
        if self._mask[0] != parts:
            taken = frozenset[int]().union(*parts)
            left = (FROZEN | (id(s.parameter) not in taken) * TRAINABLE for s in self._plan.slots)
            self._mask = parts, bytes(left)
        return call._replace(only=self._mask[1])

    def _bind(self) -> None:
        members: list[Member] = []
        for number, group in enumerate(self._updates.optimizer.param_groups):
            names = group.get("param_names") or [
                f"parameter {index} of group {number}" for index in range(len(group["params"]))
            ]
            members += [(n, p, None) for n, p in zip(names, group["params"], strict=True)]
        self._plan, self._backend = make_plan(members, watched=()), None
        self._version, self._mask = self._updates.version, (None, b"")
        if self._plan.slots:
            device = state_device(self._plan)
            rules = Options.make({}).rules()
            state = State(self._plan, rules.factor, device)
            self._backend = backends.choose("auto", device)(self._plan, state, rules)
