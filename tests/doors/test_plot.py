"""The heat-map of layers against time."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SHAPES, Stream, bare, put

from gradamp_fast import Amplifier, LayerReport, Report, plot
from gradamp_fast.plot import heatmap

matplotlib = pytest.importorskip("matplotlib")


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
            acts_on="gradient",
            settled=False,
            amplified_steps=10 * epoch * (layer % 2),
            amplified_share=0.5 * (layer % 2),
            changed_at=20,
            steps_since_change=20 * epoch,
        )

    return [
        Report(
            layers=tuple(made_up(layer, epoch) for layer in range(layers)),
            threshold=0.0,
            direction=0.1,
            steps=20 * (epoch + 1),
            skipped_steps=0,
            epoch=epoch + 3 if by_epoch else None,
            measure="fluctuation",
            select="below",
            grow=False,
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
    plot._lay_out(figure, axes, ["first", "second"])
    plot._frames(axes, share)
    _, frames = axes.collections
    corners = [path.vertices[:4] for path in frames.get_paths()]
    centres = [tuple(c.mean(0).round(6)) for c in corners]
    assert centres == [(1, 0), (2, 0), (0, 1)]  # column, row
    assert all((abs(c - c.mean(0)) < 0.5).all() for c in corners)
    widths = frames.get_linewidths()
    assert widths[0] > widths[2] > widths[1] > 0


def test_an_amplified_cell_of_a_thin_row_has_a_bar_as_long_as_its_share() -> None:
    axes = plot._canvas(1, 3)[2]
    plot._bars(axes, torch.tensor([[0.0, 1.0, 0.5]], dtype=torch.float64))
    [bars] = axes.collections
    left, right = ([f(path.vertices[:4, 0]) for path in bars.get_paths()] for f in (min, max))
    assert left == [0.5, 1.5]
    assert [b - a for a, b in zip(left, right, strict=True)] == pytest.approx([1 / 3, 1 / 6])


# ---- many layers --------------------------------------------------------------------


def names_of(shape: Sequence[int]) -> list[str]:
    """Paths of a tree of modules with so many children on each level."""
    return [".".join(map(str, path)) for path in product(*map(range, shape))]


@pytest.mark.parametrize(
    ("names", "blocks", "first", "last"),
    [
        (names_of((301,)), 151, "0 … 1 (2)", "300"),
        (names_of((100, 9)), 100, "0 (9)", "99 (9)"),
        (names_of((1, 299, 4)), 299, "0.0 (4)", "0.298 (4)"),
        (names_of((2, 500, 3)), 250, "0.0 … 3 (12)", "1.496 … 499 (12)"),
        ([*names_of((60, 6)), "head"], 61, "0 (6)", "head"),
        (["", *names_of((350, 1))], 176, "(root) … 0 (2)", "349"),
    ],
)
def test_many_layers_are_shown_by_block(
    names: list[str], blocks: int, first: str, last: str
) -> None:
    labels, rows = plot._blocks([name or "(root)" for name in names])
    assert (len(labels), labels[0], labels[-1]) == (blocks, first, last)
    assert len(set(labels)) == blocks <= plot.ROWS
    assert sorted(set(rows.tolist())) == list(range(blocks))
    counts = [int(label[:-1].rpartition("(")[2]) if label[-2:-1].isdigit() and label.endswith(")")
              else 1 for label in labels]  # fmt: skip
    assert rows.bincount().tolist() == counts


def test_a_block_is_the_mean_of_its_measured_layers() -> None:
    nan, inf = float("nan"), float("inf")
    table = torch.tensor([[1.0, nan], [3.0, nan], [5.0, 2.0], [inf, 4.0]], dtype=torch.float64)
    means = plot._mean(table, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(
        means, torch.tensor([[2.0, nan], [5.0, 3.0]]).double(), equal_nan=True
    )


def test_variances_are_averaged_by_their_logarithms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(plot, "_colours", lambda scale, axes, values, shown: drawn.append(values))
    heatmap(made_up_history(304, 2), tmp_path / "map.png", show="variance")
    [values] = drawn
    assert values.shape == (38, 2)  # blocks of eight
    expected = math.exp(sum(math.log(1e-6 * (layer + 1)) for layer in range(8)) / 8)
    assert values[0, 1].item() == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize(("all_layers", "rows"), [(False, 188), (True, 3000)])
def test_three_thousand_layers_make_a_picture_that_can_be_looked_at(
    all_layers: bool, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    lay_out = plot._lay_out

    def watched(figure: Any, axes: Any, names: Sequence[str]) -> None:
        assert len(names) == rows
        lay_out(figure, axes, names)
        figures.append((figure, axes))

    monkeypatch.setattr(plot, "_lay_out", watched)
    path = tmp_path / "map.png"
    heatmap(made_up_history(3000, 4), path, all_layers=all_layers)
    [(figure, axes)] = figures
    width, height = figure.canvas.get_width_height()
    assert height < 2**16
    assert width * height < 40e6
    boxes = sorted((box.y0, box.y1) for box in name_boxes(axes))
    assert 150 <= len(boxes) <= 300
    assert all(below[1] <= above[0] for below, above in pairwise(boxes)), "names overlap"
    assert all(0 <= box.x0 < box.x1 <= axes.get_window_extent().x0 for box in name_boxes(axes))
    assert len(axes.collections) == 2  # the cells and their frames


def name_boxes(axes: Any) -> list[Any]:
    return [label.get_window_extent() for label in axes.get_yticklabels()]


# ---- names --------------------------------------------------------------------------


def test_markup_in_a_name_is_text(tmp_path: Path) -> None:
    names = ["a$b$", "$\\frac$", "x_1^2", "50%", "line\nbreak", "long" * 40]
    [report] = made_up_history(len(names), 1)
    layers = tuple(replace(x, name=n) for x, n in zip(report.layers, names, strict=True))
    with matplotlib.rc_context({"svg.fonttype": "none", "text.usetex": True}):
        heatmap([replace(report, layers=layers)], tmp_path / "map.svg", title="$5 and $6")
    text = (tmp_path / "map.svg").read_text()
    for shown in ("a$b$", "$\\frac$", "x_1^2", "50%", "line?break", "$5 and $6"):
        assert f">{shown}</text>" in text, shown
    assert f">{('long' * 40)[:29]}…{('long' * 40)[-30:]}</text>" in text


def test_a_default_device_makes_no_difference(tmp_path: Path) -> None:
    heatmap(made_up_history(320, 3), tmp_path / "plain.png")
    with torch.device("meta"):
        heatmap(made_up_history(320, 3), tmp_path / "other.png")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "other.png").read_bytes()


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
