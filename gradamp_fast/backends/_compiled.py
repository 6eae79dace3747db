"""What the CPU and the CUDA backend share: the compiled extension behind both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from torch import Tensor

from .. import _extension
from ..call import Call, Outcome
from ..gradients import GradientReader
from ..options import Measure, Rules, ScheduleKind, Select, ThresholdKind
from ..plan import Plan
from ..state import State
from .stepping import Measuring


class CompiledBackend(Measuring):
    """Hands the parameters to the extension, which reads their gradients itself."""

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

    def step(self, call: Call) -> Outcome:
        outcome = self.compiled.step(*call)  # in the order of its fields
        if outcome <= Outcome.REBIND:
            return Outcome(outcome)
        # Something is unusual: look closer, and raise, rebind, or go on with what was copied.
        gradients = self.reader.read(call)
        if isinstance(gradients, Outcome):
            return gradients
        self._step_gradients(gradients, call, None)
        self.reader.write_back()
        return Outcome.DONE

    def measure(self, gradients: Sequence[Tensor | None], call: Call, sums: Tensor) -> None:
        self._step_gradients(gradients, call, sums)

    def _step_gradients(
        self, gradients: Sequence[Tensor | None], call: Call, sums: Tensor | None
    ) -> None:
        self.compiled.step_gradients(gradients, call.grad_scale, call.found_inf, call.unscale, sums)


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
