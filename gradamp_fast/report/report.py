"""What an Amplifier knows, on the host."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from .. import reference
from ..call import Call
from ..model.plan import Plan
from ..options import Rules
from ..reference.state import GLOBAL_FIELDS, State
from . import export, table
from .numbers import LayerReport, Numbers

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType


class Report(Numbers):
    """All layers at one moment.

    Attributes:
        threshold: that of the last decision; NaN before the first.
        direction: mean of the layers' directions, weighted by elements: above 0.1 the learning
            rate is low. NaN before the second step.
        steps: steps so far, skipped ones included.
        epoch: as ``set_epoch`` told it last; None if it never did.
        measure, select, grow: the options that the decision follows.
    """

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
    """A state's numbers on the host, and what it takes to read them: 120 bytes a layer."""

    layers: tuple[str, ...]
    layer_numel: tuple[int, ...]
    state: State
    rules: Rules


def take_snapshot(plan: Plan, state: State, rules: Rules) -> Snapshot:
    """One device-to-host copy."""
    return Snapshot(plan.layers, plan.layer_numel, state.on_host(), rules)


def make_report(snapshot: Snapshot) -> Report:
    """Host arithmetic alone."""
    state, rules = snapshot.state, snapshot.rules
    values = dict(zip(GLOBAL_FIELDS, state.values[: len(GLOBAL_FIELDS)].tolist(), strict=True))
    step = int(values["step"] + values["unmeasured_steps"])
    skipped = int(values["skipped_steps"] + values["unmeasured_skipped"])
    fluctuation = reference.scores(state.layers, "fluctuation")
    direction = reference.scores(state.layers, "direction")
    score = reference.chosen_scores(state, rules, reference.last_decision(state, rules))
    factor = reference.active_factor(state, rules, Call())
    numel = torch.tensor(snapshot.layer_numel, dtype=torch.float64, device="cpu")
    temporal = (state.column("power") - state.column("mean_power")).clamp(min=0.0) / numel
    counted = state.column("amplified_steps")
    shares = counted / (step - skipped) if step > skipped else torch.zeros_like(counted)
    changes = (state.column("changed_at") * rules.measure_every).clamp(max=step)
    chosen = state.column("selected") != 0
    since = step - changes.where(chosen | (changes != 0), torch.nan)
    layers = _layer_reports(
        name=snapshot.layers,
        numel=snapshot.layer_numel,
        steps=state.column("steps").long().tolist(),
        variance=state.column("variance").tolist(),
        temporal_variance=temporal.tolist(),
        fluctuation=fluctuation.tolist(),
        direction=(-direction).tolist(),
        score=score.tolist(),
        selected=chosen.tolist(),
        factor=reference.multipliers(state, rules, factor).tolist(),
        acts_on=["update" if on else "gradient" for on in state.column("on_update").tolist()],
        settled=(state.column("settled") != 0).tolist(),
        amplified_steps=counted.long().tolist(),
        amplified_share=shares.tolist(),
        changed_at=changes.long().tolist(),
        steps_since_change=[None if math.isnan(n) else int(n) for n in since.tolist()],
    )
    return Report(
        layers=tuple(layers),
        threshold=values["threshold"],
        direction=_mean_direction(layers),
        steps=step,
        skipped_steps=skipped,
        epoch=int(values["epoch"]) if values["epoch"] >= 0 else None,
        measure=rules.measure,
        select=rules.select,
        grow=rules.grow,
    )


def _layer_reports(**columns: Sequence[Any]) -> list[LayerReport]:
    """One for each layer, of its fields' values for all layers.

    Its own way to be made, field by field as it is frozen, would take most of a report's time.
    """
    layers = []
    for values in zip(*columns.values(), strict=True):
        layer = object.__new__(LayerReport)
        layer.__dict__.update(zip(columns, values, strict=True))
        layers.append(layer)
    return layers


def _mean_direction(layers: Sequence[LayerReport]) -> float:
    measured = [layer for layer in layers if math.isfinite(layer.direction)]
    elements = sum(layer.numel for layer in measured)
    if elements == 0:
        return math.nan
    return sum(layer.numel * layer.direction for layer in measured) / elements
