"""Reports for other programs: CSV, JSON, and writers of scalars such as TensorBoard's."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from .numbers import Numbers

_SCALARS = (
    "variance", "temporal_variance", "fluctuation", "direction", "score", "factor",
    "amplified_share",
)  # fmt: skip


class ScalarWriter(Protocol):
    """Such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


def save(reports: Sequence[Numbers], path: str | PathLike[str]) -> None:
    """Writes the reports to ``path``, in the format of its ending.

    ``.json`` holds a list of reports, with null for NaN and infinity; ``.csv`` a row for each
    report and layer, with the report's own numbers first, and empty cells for None.

    Raises ValueError for another ending.
    """
    path = Path(path)
    if path.suffix == ".json":
        path.write_text(json.dumps([_plain(asdict(r)) for r in reports], indent=1) + "\n")
    elif path.suffix == ".csv":
        _write_csv(reports, path)
    else:
        raise ValueError(f"path={str(path)!r} must end in .csv or .json")


def log_scalars(report: Numbers, writer: ScalarWriter, step: int) -> None:
    """Every finite number as ``gradamp/<layer>/<metric>``, and the report's own as ``gradamp/...``.

    Raises TypeError for a writer without ``add_scalar``.
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(
            f"writer is a {type(writer).__name__}, which has no add_scalar(tag, value, step); "
            "give a torch.utils.tensorboard.SummaryWriter or something like it"
        )
    scalars: dict[str, float] = {
        "threshold": report.threshold,
        "direction": report.direction,
        "amplified_layers": sum(layer.selected for layer in report.layers),
        "skipped_steps": report.skipped_steps,
    }
    for layer in report.layers:
        name = layer.name or "(root)"
        scalars |= {f"{name}/{metric}": getattr(layer, metric) for metric in _SCALARS}
        if report.grow:
            scalars[f"{name}/settled"] = layer.settled
    for tag, value in scalars.items():
        if math.isfinite(value):
            writer.add_scalar(f"gradamp/{tag}", value, step)


def _write_csv(reports: Sequence[Numbers], path: Path) -> None:
    rows = []
    for report in reports:
        own = asdict(report)
        layers = own.pop("layers")
        # A layer has columns "steps" and "direction", too: its own.
        shared = {f"run_{n}" if n in ("steps", "direction") else n: v for n, v in own.items()}
        rows += [shared | layer for layer in layers]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def _plain(value: Any) -> Any:
    """With None for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
