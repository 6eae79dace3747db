"""Plain PyTorch on any device: the definition itself."""

from __future__ import annotations

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

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        if device.type == "mps":
            return "its state is fp64, which MPS does not have"
        return None
