"""What every backend is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..call import Call, Outcome, Updated
from ..model.plan import Plan
from ..options import Rules
from ..reference.state import State


class Stepping:
    """Makes the steps of one plan on the device that holds its state.

    Attributes:
        acts_between_steps: whether gradients depend on it while they are computed, so that a
            model that was looked at again needs its successor at once.
        suspended: whether it leaves gradients alone while they are computed.
    """

    acts_between_steps: ClassVar[bool] = False
    suspended: bool = False

    def step(self, call: Call) -> Outcome:
        raise NotImplementedError

    def settle(self) -> None:
        """Finishes what the last step left under way; whoever reads the state calls it before."""

    def follow(self, restored: bool = False) -> None:
        """Goes by the state as it stands, after another than a step wrote to it.

        ``restored``: all of it, the counters included; then this may wait for the device.
        """

    def found_anywhere(self, layers: Sequence[int]) -> Sequence[int]:
        """The layers that some process gives, of all that step together. Waits for the device."""
        return layers


class Backend(Stepping):
    """One that may be asked for by name."""

    name: ClassVar[str]

    def __init__(self, plan: Plan, state: State, rules: Rules) -> None:
        raise NotImplementedError

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        """Why the backend cannot serve the device, with the fix; None if it can."""
        raise NotImplementedError


class Measuring(Backend):
    """One that can also serve gradients that are spread over processes."""

    def measure(
        self,
        gradients: Sequence[Tensor | None],
        call: Call,
        sums: Tensor,
        updated: Sequence[Updated | None] | None = None,
    ) -> None:
        """A step up to its sums; nothing is committed.

        Flat gradients, one or None for each slot, are multiplied by what stood before the step
        unless ``Rules.two_phases``, or ``found_inf`` is set; where there is ``updated`` that is
        updated instead. Each tensor's new running means go to the row of the sketch that is not
        in use. ``sums``, fp64 [layers + 1, 8], gets ``reference.Sums`` of each layer; its last row
        and last column may hold anything.
        """
        raise NotImplementedError
