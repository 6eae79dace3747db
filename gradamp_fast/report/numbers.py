"""The numbers of a report; what can be done with them is in the other files of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..options import Measure, Select


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        numel: elements of its gradients.
        steps: steps that its averages cover.
        variance: running variance across the gradient's elements, averaged over time.
        temporal_variance: variance over time of the mean element, from the sketch.
        fluctuation: ln(F/R); 0 uncorrelated steps, below 0 steady, above 0 oscillating.
        direction: running cosine between a step's gradient and the mean before it.
        score: the chosen measure's value now.
        selected: the decision taken last.
        factor: what it is multiplied by now; 1 outside all windows of the schedule.
        acts_on: what that is: its gradients, or the updates of an optimizer of
            ``gradamp_fast.optim`` that divides out a gradient's scale.
        settled: with ``grow=True``, whether it grows no more; else False.
        amplified_steps: counted steps on which they were.
        amplified_share: the same as a share of all counted steps; 0 before the first.
        changed_at: step number at which ``selected`` last changed.
        steps_since_change: steps since then; None if it never was selected.
    """

    name: str
    numel: int
    steps: int
    variance: float
    temporal_variance: float
    fluctuation: float
    direction: float
    score: float
    selected: bool
    factor: float
    acts_on: Literal["gradient", "update"]
    settled: bool
    amplified_steps: int
    amplified_share: float
    changed_at: int
    steps_since_change: int | None


@dataclass(frozen=True)
class Numbers:
    """All layers at one moment; described where ``Report`` is."""

    layers: tuple[LayerReport, ...]
    threshold: float
    direction: float
    steps: int
    skipped_steps: int
    epoch: int | None
    measure: Measure
    select: Select
    grow: bool
