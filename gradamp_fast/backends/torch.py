"""Plain PyTorch on any device: the definition itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .. import reference
from ..call import Call, Outcome, Updated
from ..model.gradients import GradientReader
from ..model.plan import Plan
from ..options import Rules
from ..reference.state import State
from .stepping import Measuring


class TorchBackend(Measuring):
    """Runs ``reference.step``."""

    name: ClassVar[str] = "torch"

    def __init__(self, plan: Plan, state: State, rules: Rules) -> None:
        self.plan, self.state, self.rules = plan, state, rules
        self.reader = GradientReader(plan, state.device, state.members, rules.needs_norm)

    def step(self, call: Call) -> Outcome:
        gradients = self.reader.read(call)
        if isinstance(gradients, Outcome):
            return gradients
        updated = self.reader.updated(call)
        self.state.heed_members(self.plan)
        reference.step(self.plan, self.state, self.rules, gradients, call, updated)
        self.reader.write_back(call)
        return Outcome.DONE

    def measure(
        self,
        gradients: Sequence[Tensor | None],
        call: Call,
        sums: Tensor,
        updated: Sequence[Updated | None] | None = None,
    ) -> None:
        before = reference.standing(self.state, self.rules, call)
        measured = reference.measure(self.plan, self.state, self.rules, gradients, before.inverse)
        sums[:-1, : len(measured)] = torch.stack(measured, dim=1)
        if self.rules.two_phases:
            return
        if updated is not None:
            reference.update_all(
                self.plan, gradients, updated, before.multipliers, before.inverse, ~before.skipped
            )
        else:
            reference.multiply(
                self.plan,
                gradients,
                before.multipliers,
                before.inverse if call.unscale else torch.ones_like(before.inverse),
                ~before.skipped,
            )

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        if device.type == "mps":
            return "its state is fp64, which MPS does not have"
        return None
