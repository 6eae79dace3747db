"""Plain PyTorch on any device: the definition itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .. import reference
from ..gradients import GradientReader, Outcome
from ..options import Options
from ..plan import Plan
from ..state import State


class TorchBackend:
    """Runs ``reference.step``."""

    name: ClassVar[str] = "torch"

    def __init__(self, plan: Plan, state: State, options: Options) -> None:
        self.plan, self.state, self.options = plan, state, options
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
            self.options,
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
        state, options = self.state, self.options
        inverse = reference.inverse_scale(state, grad_scale)
        measured = reference.measure(self.plan, state, options, gradients, inverse)
        sums[:-1, : len(measured)] = torch.stack(measured, dim=1)
        if options.one_pass():
            reference.multiply(
                self.plan,
                gradients,
                state.column("selected"),
                reference.active_factor(state, options),
                inverse if unscale else torch.ones_like(inverse),
                ~reference.is_marked(state, found_inf),
            )

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        if device.type == "mps":
            return "its state is fp64, which MPS does not have"
        return None
