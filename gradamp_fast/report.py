"""What an Amplifier knows, on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import reference
from .options import Options
from .plan import Plan
from .state import FIELDS, GLOBALS, State


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
        factor: what its gradients are multiplied by now.
        amplified_steps: counted steps on which they were.
        changed_at: step number at which ``selected`` last changed.
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
    amplified_steps: int
    changed_at: int


@dataclass(frozen=True)
class Report:
    """All layers; ``threshold`` is that of the last decision, NaN before the first."""

    layers: tuple[LayerReport, ...]
    threshold: float
    steps: int
    skipped_steps: int

    def table(self) -> str:
        """Plain text, one line a layer."""
        names = [layer.name or "(root)" for layer in self.layers]
        width = max(map(len, ["layer", *names]))
        head = f"{'layer':<{width}} {'elements':>11} {'steps':>7} {'variance':>10} "
        head += f"{'fluctuation':>11} {'direction':>9} {'score':>9} {'amplified':>9}"
        lines = [
            f"{name:<{width}} {x.numel:>11,} {x.steps:>7} {x.variance:>10.3g} "
            f"{x.fluctuation:>11.3f} {x.direction:>9.3f} {x.score:>9.3f} "
            f"{f'x{x.factor:g}' if x.selected else '-':>9}"
            for name, x in zip(names, self.layers, strict=True)
        ]
        foot = f"threshold {self.threshold:.4g}, {self.steps} steps, {self.skipped_steps} skipped"
        return "\n".join([head, *lines, foot])


def make_report(plan: Plan, state: State, options: Options) -> Report:
    """One copy from the device, the rest on the host."""
    host = state.on_host()
    values = dict(zip(GLOBALS, host.values[: len(GLOBALS)].tolist(), strict=True))
    scores = {
        name: reference.scores(host.layers, name).tolist() for name in ("fluctuation", "direction")
    }
    chosen = reference.scores(host.layers, options.measure).tolist()
    factor = float(reference.active_factor(host, options))
    layers = []
    for index, (name, numel) in enumerate(zip(plan.layers, plan.layer_numel, strict=True)):
        row = dict(zip(FIELDS, host.layers[index].tolist(), strict=True))
        selected = row["selected"] != 0
        temporal = max(row["power"] - row["mean_power"], 0.0) / numel if numel else math.nan
        layers.append(
            LayerReport(
                name=name,
                numel=numel,
                steps=int(row["steps"]),
                variance=row["variance"],
                temporal_variance=temporal,
                fluctuation=scores["fluctuation"][index],
                direction=-scores["direction"][index],
                score=chosen[index],
                selected=selected,
                factor=factor if selected else 1.0,
                amplified_steps=int(row["amplified_steps"]),
                changed_at=int(row["changed_at"]),
            )
        )
    return Report(
        layers=tuple(layers),
        threshold=values["threshold"],
        steps=int(values["step"]),
        skipped_steps=int(values["skipped_steps"]),
    )
