"""What an Amplifier knows, on the host."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

from . import export, reference, table
from .options import Measure, Options, Select
from .plan import Plan
from .state import FIELDS, GLOBALS, State

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType


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
        factor: what its gradients are multiplied by now; 1 outside all windows of the schedule.
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
    amplified_steps: int
    amplified_share: float
    changed_at: int
    steps_since_change: int | None


@dataclass(frozen=True)
class Report:
    """All layers at one moment.

    Attributes:
        threshold: that of the last decision; NaN before the first.
        steps: steps so far, skipped ones included.
        epoch: as ``set_epoch`` told it last; None if it never did.
        measure, select: the options that the decision follows.
    """

    layers: tuple[LayerReport, ...]
    threshold: float
    steps: int
    skipped_steps: int
    epoch: int | None
    measure: Measure
    select: Select

    def __str__(self) -> str:
        return table.plain(self)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        if len(self.layers) > table.RICH_LAYERS:
            yield table.plain_text(self)
        else:
            yield table.rich_table(self, options.max_width)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes ``.csv`` (a row for each layer) or ``.json``; ValueError for another ending."""
        export.save([self], path)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A state's numbers on the host, and what it takes to read them: 80 bytes a layer."""

    layers: tuple[str, ...]
    layer_numel: tuple[int, ...]
    state: State
    options: Options


def take_snapshot(plan: Plan, state: State, options: Options) -> Snapshot:
    """One device-to-host copy."""
    return Snapshot(plan.layers, plan.layer_numel, state.on_host(), options)


def make_report(snapshot: Snapshot) -> Report:
    """Host arithmetic alone."""
    state, options = snapshot.state, snapshot.options
    values = dict(zip(GLOBALS, state.values[: len(GLOBALS)].tolist(), strict=True))
    step = int(values["step"] + values["unmeasured_steps"])
    skipped = int(values["skipped_steps"] + values["unmeasured_skipped"])
    apart = (options.measure_every or 10) if options.placement == "backward" else 1
    fluctuation, direction, score = (
        values.tolist()
        for values in (
            reference.scores(state.layers, "fluctuation"),
            reference.scores(state.layers, "direction"),
            reference.chosen_scores(state, options, reference.last_decision(state, options)),
        )
    )
    factor = float(reference.active_factor(state, options))
    rows = state.layers.tolist()
    layers = []
    for index, (name, numel) in enumerate(zip(snapshot.layers, snapshot.layer_numel, strict=True)):
        row = dict(zip(FIELDS, rows[index], strict=True))
        selected, changed_at = row["selected"] != 0, min(int(row["changed_at"]) * apart, step)
        temporal = max(row["power"] - row["mean_power"], 0.0) / numel if numel else math.nan
        layers.append(
            LayerReport(
                name=name,
                numel=numel,
                steps=int(row["steps"]),
                variance=row["variance"],
                temporal_variance=temporal,
                fluctuation=fluctuation[index],
                direction=-direction[index],
                score=score[index],
                selected=selected,
                factor=factor if selected else 1.0,
                amplified_steps=int(row["amplified_steps"]),
                amplified_share=row["amplified_steps"] / (step - skipped)
                if step > skipped
                else 0.0,
                changed_at=changed_at,
                steps_since_change=step - changed_at if selected or changed_at else None,
            )
        )
    return Report(
        layers=tuple(layers),
        threshold=values["threshold"],
        steps=step,
        skipped_steps=skipped,
        epoch=int(values["epoch"]) if values["epoch"] >= 0 else None,
        measure=options.measure,
        select=options.select,
    )
