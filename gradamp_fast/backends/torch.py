"""Plain PyTorch on any device: the definition itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .. import reference
from ..gradients import GradientReader, Outcome
from ..options import Rules
from ..plan import Plan
from ..state import State


class TorchBackend:
    """Runs ``reference.step``."""

    name: ClassVar[str] = "torch"

    def __init__(self, plan: Plan, state: State, rules: Rules) -> None:
        self.plan, self.state, self.rules = plan, state, rules
        self.reader = GradientReader(plan, state.device)

    def step(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        unscale: bool,
        only: bytes | None,
        walked: bool,
    ) -> Outcome:
        gradients = self.reader.read(only, walked)
        if isinstance(gradients, Outcome):
            return gradients
        reference.step(
            self.plan,
            self.state,
            self.rules,
            gradients,
            grad_scale=grad_scale,
            found_inf=found_inf,
            unscale=unscale,
        )
        self.reader.write_back()
        return Outcome.DONE

    def measure(
        self,
        gradients: Sequence[Tensor | None],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        unscale: bool,
        sums: Tensor,
    ) -> None:
        state, rules = self.state, self.rules
        inverse = reference.inverse_scale(state, grad_scale)
        measured = reference.measure(self.plan, state, rules, gradients, inverse)
        sums[:-1] = torch.stack(measured, dim=1)
        if not rules.two_phases:
            reference.multiply(
                self.plan,
                gradients,
                state.column("selected"),
                reference.active_factor(state, rules),
                inverse if unscale else torch.ones_like(inverse),
                ~reference.is_marked(state, found_inf),
            )

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        if device.type == "mps":
            return "its state is fp64, which MPS does not have"
        return None
