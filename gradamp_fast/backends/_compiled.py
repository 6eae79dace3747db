"""What the CPU and the CUDA backend share: the compiled extension behind both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, get_args

from torch import Tensor

from .. import _extension
from ..gradients import GradientReader, Outcome
from ..options import Measure, Rules, ScheduleKind, Select, ThresholdKind
from ..plan import Plan
from ..state import State


class CompiledBackend:
    """Hands the parameters to the extension, which reads their gradients itself."""

    name: ClassVar[str]

    def __init__(self, plan: Plan, state: State, rules: Rules) -> None:
        extension = _extension.load()
        assert extension is not None, _extension.reason()
        self.reader = GradientReader(plan, state.device)
        self.compiled = extension.Plan(
            parameters=[slot.parameter for slot in plan.slots],
            watched=list(plan.watched),
            tensors=[
                (s.layer, s.numel, s.bucket_log2, s.first_bucket, s.first_word) for s in plan.slots
            ],
            num_layers=len(plan.layers),
            options=for_kernel(rules),
            values=state.values,
            sketch=state.sketch,
            parity=state.parity,
        )

    def step(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        unscale: bool,
        only: bytes | None,
        walked: bool,
    ) -> Outcome:
        outcome = self.compiled.step(grad_scale, found_inf, unscale, only, walked)
        if outcome <= Outcome.REBIND:
            return Outcome(outcome)
        # Something is unusual: look closer, and raise, rebind, or go on with what was copied.
        gradients = self.reader.read(only, walked)
        if isinstance(gradients, Outcome):
            return gradients
        self.compiled.step_gradients(gradients, grad_scale, found_inf, unscale, None)
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
        self.compiled.step_gradients(gradients, grad_scale, found_inf, unscale, sums)


def for_kernel(rules: Rules) -> dict[str, Any]:
    """Rules as numbers, with the values of the enumerations in csrc/state.h."""
    return {
        "measure": get_args(Measure).index(rules.measure),
        "threshold": get_args(ThresholdKind).index(rules.threshold),
        "threshold_value": rules.threshold_value,
        "select": get_args(Select).index(rules.select),
        "exact": rules.exact,
        "match_norm": rules.match_norm,
        "max_norm": rules.max_norm,
        "decay": rules.decay,
        "min_steps": float(rules.min_steps),
        "refresh": float(rules.refresh),
        "seed": rules.seed,
        "schedule_unit": get_args(ScheduleKind).index(rules.schedule),
        "windows": list(rules.windows),
    }
