"""The heat-map of layers against time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SHAPES, Stream, bare, put

from gradamp_fast import Amplifier, LayerReport, Report, plot
from gradamp_fast.plot import heatmap

pytest.importorskip("matplotlib")


def made_up_history(layers: int, epochs: int, by_epoch: bool = True) -> list[Report]:
    """Reports in which every other layer is amplified half of the time, from the second on."""

    def made_up(layer: int, epoch: int) -> LayerReport:
        return LayerReport(
            name=f"block{layer // 8}.conv{layer % 8}",
            numel=100,
            steps=20 * epoch,
            variance=1e-6 * (layer + 1),
            temporal_variance=1e-8,
            fluctuation=float("nan") if epoch == 0 else (layer - layers / 2) / layers,
            direction=0.1,
            score=0.0,
            selected=layer % 2 == 1,
            factor=2.0 if layer % 2 else 1.0,
            amplified_steps=10 * epoch * (layer % 2),
            amplified_share=0.5 * (layer % 2),
            changed_at=20,
            steps_since_change=20 * epoch,
        )

    return [
        Report(
            layers=tuple(made_up(layer, epoch) for layer in range(layers)),
            threshold=0.0,
            steps=20 * (epoch + 1),
            skipped_steps=0,
            epoch=epoch + 3 if by_epoch else None,
            measure="fluctuation",
            select="below",
        )
        for epoch in range(epochs)
    ]


@pytest.mark.parametrize(("layers", "epochs"), [(1, 1), (60, 15), (300, 4)])
def test_the_heat_map_is_written(layers: int, epochs: int, tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    heatmap(made_up_history(layers, epochs), path, title="made up")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("show", ["fluctuation", "direction", "variance", "temporal_variance"])
def test_every_measure_can_be_shown(show: Any, tmp_path: Path) -> None:
    heatmap(made_up_history(5, 4), tmp_path / "map.svg", show=show)
    text = (tmp_path / "map.svg").read_text()
    assert text.startswith("<?xml")


def test_a_misspelt_measure_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'variance'"):
        heatmap(made_up_history(2, 2), tmp_path / "map.png", show="varience")  # type: ignore[arg-type]


def test_the_share_is_that_of_the_steps_since_the_report_before() -> None:
    names, values, share = plot._tables(made_up_history(2, 3), "fluctuation")
    assert names == ["block0.conv0", "block0.conv1"]
    assert share.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.5, 0.5]]
    assert values.isnan().tolist() == [[True, False, False]] * 2


@pytest.mark.parametrize(
    ("by_epoch", "label", "times"), [(True, "epoch", "3456"), (False, "step", "20")]
)
def test_time_is_the_epoch_or_the_step(by_epoch: bool, label: str, times: str) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    plot._time(axes, made_up_history(1, 4, by_epoch))
    assert axes.get_xlabel() == label
    assert axes.xaxis.get_major_formatter()(0.0) in times
    assert axes.xaxis.get_major_formatter()(9.0) == ""


def test_a_recorded_history_is_drawn(tmp_path: Path) -> None:
    model = bare(SHAPES)
    amplifier = Amplifier(model, min_steps=1, refresh=1, measure="variance")
    stream = Stream(model)
    for _ in range(6):
        put(model, stream.next())
        amplifier.step()
        history = amplifier.record(every=2)
    heatmap(history, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 0
    assert (plot._tables(history, "variance")[2] > 0).any()


def test_amplified_cells_are_framed_within_themselves() -> None:
    share = torch.tensor([[0.0, 1.0, 0.25], [0.5, 0.0, 0.0]], dtype=torch.float64)
    figure, scale, axes = plot._canvas(2, 3)
    plot._colours(scale, axes, torch.zeros(2, 3, dtype=torch.float64), "fluctuation")
    plot._frames(figure, axes, share)
    [frames] = axes.collections
    corners = [path.vertices[:4] for path in frames.get_paths()]
    centres = [tuple(c.mean(0).round(6)) for c in corners]
    assert centres == [(1, 0), (2, 0), (0, 1)]  # column, row
    assert all((abs(c - c.mean(0)) < 0.5).all() for c in corners)
    widths = frames.get_linewidths()
    assert widths[0] > widths[2] > widths[1] > 0


def test_the_heat_map_needs_layers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="history"):
        heatmap([], tmp_path / "map.png")


def test_the_heat_map_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"\[viz\]"):
        heatmap(made_up_history(2, 2), tmp_path / "map.png")
