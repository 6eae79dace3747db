"""What the CPU and the CUDA backend share: the compiled extension behind both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, get_args

from torch import Tensor

from .. import _extension
from ..gradients import GradientReader, Outcome
from ..options import Measure, Options, Select, ThresholdRule
from ..plan import Plan
from ..schedule import ScheduleUnit
from ..state import FIELDS, GLOBALS, State

_SCHEDULE_UNITS = ("always", *get_args(ScheduleUnit))
# What the extension must name alike, in the same order.
LISTS = {
    "GLOBAL_FIELDS": GLOBALS,
    "LAYER_FIELDS": FIELDS,
    "ENUMS": {
        "measure": get_args(Measure),
        "threshold": (*get_args(ThresholdRule), "number"),
        "select": get_args(Select),
        "schedule_unit": _SCHEDULE_UNITS,
    },
}


class CompiledBackend:
    """Hands the parameters to the extension, which reads their gradients itself."""

    name: ClassVar[str]

    def __init__(self, plan: Plan, state: State, options: Options) -> None:
        extension = _extension.load()
        assert extension is not None, _extension.reason()
        _extension.check_lists(extension, LISTS)
        self.reader = GradientReader(plan, state.device)
        self.compiled = extension.Stepper(
            parameters=[slot.parameter for slot in plan.slots],
            watched=list(plan.watched),
            tensors=[
                (s.layer, s.numel, s.bucket_log2, s.first_bucket, s.first_word) for s in plan.slots
            ],
            num_layers=len(plan.layers),
            options=for_kernel(options),
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


def for_kernel(options: Options) -> dict[str, Any]:
    """Options as numbers: positions in the enumerations of ``LISTS``."""
    rules = get_args(ThresholdRule)
    rule = options.threshold
    values = {
        "mean": 0.0,
        "std": 1.0 if options.num_std is None else options.num_std,
        "quantile": 0.5 if options.quantile is None else options.quantile,
    }
    schedule = options.schedule
    return {
        "measure": get_args(Measure).index(options.measure),
        "threshold": rules.index(rule) if isinstance(rule, str) else len(rules),
        "threshold_value": values[rule] if isinstance(rule, str) else float(rule),
        "select": get_args(Select).index(options.select),
        "exact": options.timing == "exact",
        "match_norm": options.match_norm,
        "max_norm": options.max_norm or 0.0,
        "decay": 1.0 if options.decay is None else options.decay,
        "min_steps": float(options.min_steps),
        "refresh": 0.0 if options.refresh == "epoch" else float(options.refresh),
        "seed": options.seed or 0,
        "schedule_unit": _SCHEDULE_UNITS.index(schedule.unit if schedule else "always"),
        "windows": [
            (float(start), float(stop), math.nan if factor is None else float(factor))
            for start, stop, factor in (schedule.windows if schedule else ())
        ],
    }
