"""What a step has to give, from the fp64 reference; nothing is timed before it agrees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.workload import FACTOR, Workload, holder, same_bits
from gradamp_fast import Amplifier, reference
from gradamp_fast.model.plan import bucket_log2
from gradamp_fast.reference import bucket_sums
from gradamp_fast.reference.state import State

NEVER = 10**9  # steps between decisions: the selection made by hand stands
WEIGHT = 0.01  # of a new step in the running statistics of the baselines
TWO_STEPS = 500_000_000  # elements; of larger sets one step is checked

# Of the columns of the state, relative.
STATE_TOLERANCE = {"variance": 1e-5, "power": 1e-5, "noise": 1e-5, "mean_power": 1e-4}


class Wrong(Exception):
    """A result differs from the reference; the message says in what."""


def factor_of(step: int) -> float:
    """Steps alternate, so that values do not drift."""
    return 1.0 / FACTOR if step % 2 else FACTOR


def select_by_hand(amplifier: Amplifier, layers: frozenset[str]) -> None:
    """Makes these layers the standing selection, which otherwise the gradients decide."""
    amplifier.prepare()
    column = amplifier.bound.settled_state().column("selected")
    column.copy_(torch.tensor([float(name in layers) for name in amplifier.bound.plan.layers]))


@dataclass(eq=False)
class Expected:
    """One or two steps of the reference.

    Attributes:
        gradients: after each step, one-dimensional, in the order of the shapes.
        state: the reference's after the last step.
        running: of each gradient, running means of statistics over the steps: fp64 [tensors].
        power: of each gradient, the sum of its squared buckets in the last step: fp64 [tensors].
    """

    workload: Workload
    options: dict[str, Any]
    gradients: list[list[Tensor]] = field(default_factory=list)
    state: State = field(init=False)
    running: dict[str, Tensor] = field(init=False)
    power: Tensor = field(init=False)

    def __post_init__(self) -> None:
        workload = self.workload
        model = holder(workload.shapes, workload.dtype, workload.device)
        amplifier = Amplifier(model, backend="torch", **self.options)
        select_by_hand(amplifier, workload.layers)
        plan, self.state = amplifier.bound.plan, amplifier.bound.settled_state()
        place = {name: index for index, name in enumerate(workload.shapes)}
        order = [place[slot.name] for slot in plan.slots]
        work = [g.clone() for g in workload.sets[0].flats]
        zeros = torch.zeros(len(work), dtype=torch.float64, device=workload.device)
        self.running = {name: zeros.clone() for name in ("variance", "mean", "norm")}
        for step in range(1 if workload.elements > TWO_STEPS else 2):
            self._add_statistics(work)
            amplifier.factor = factor_of(step)
            reference.step(plan, self.state, amplifier.options.rules(), [work[i] for i in order])
            self.gradients.append([g.clone() for g in work])

    def _add_statistics(self, gradients: list[Tensor]) -> None:
        rows, powers = [], []
        for gradient in gradients:
            x = gradient.double()
            powers.append(bucket_sums(x, bucket_log2(x.numel())).square().sum())
            mean = x.mean()
            variance = (x - mean).square_().mean()
            rows.append(torch.stack((variance, mean, (variance + mean**2).mul(x.numel()).sqrt())))
        for name, value in zip(self.running, torch.stack(rows, dim=1), strict=True):
            self.running[name].lerp_(value, WEIGHT)
        self.power = torch.stack(powers)

    @property
    def steps(self) -> int:
        return len(self.gradients)

    def check_untouched(self, actual: list[Tensor]) -> None:
        """Nothing was written. Without a norm a factor and its inverse give the old values."""
        pristine = self.workload.pristine
        if pristine is not None:
            before = self.workload.views(pristine)
        elif self.steps == 2:
            before = self.gradients[1]
        else:
            return
        if not same_bits(actual, before):
            raise Wrong("gradients were changed")

    def check_gradients(self, step: int, actual: list[Tensor], tolerance: float) -> None:
        """Bit for bit; what was multiplied by a norm's coefficient, within ``tolerance`` of it."""
        expected = self.gradients[step]
        if "max_norm" not in self.options:
            if not same_bits(actual, expected):
                raise Wrong(f"gradients differ from the reference after step {step + 1}")
            return
        eps = torch.finfo(self.workload.dtype).eps
        for a, e in zip(actual, expected, strict=True):
            if not torch.allclose(a, e, rtol=tolerance + eps, atol=1e-30):
                raise Wrong(f"clipped gradients differ from the reference after step {step + 1}")

    def check_state(self, actual: State) -> None:
        """The state of an amplifier that took the same steps."""
        for name, tolerance in STATE_TOLERANCE.items():
            check_close(name, actual.column(name), self.state.column(name), tolerance)

    def check_running(self, name: str, actual: Tensor, tolerance: float) -> None:
        """A running statistic of a baseline."""
        check_close(f"running {name}", actual, self.running[name], tolerance, small=1e-2)


def check_close(
    what: str, actual: Tensor, expected: Tensor, tolerance: float, small: float = 1e-6
) -> None:
    """Element by element, relative; below ``small`` times the largest, relative to that."""
    difference = (actual.double() - expected).abs()
    scale = expected.abs().clamp(min=max(small * float(expected.abs().max()), 1e-300))
    worst = float((difference / scale).max())
    if not worst <= tolerance:
        raise Wrong(f"{what} is off by {worst:.1e}, allowed is {tolerance:.0e}")
