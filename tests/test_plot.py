"""The heat-map of fluctuation per layer and epoch."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradamp_fast.plot import heatmap

pytest.importorskip("matplotlib")


def made_up_history(layers: int, epochs: int) -> Any:
    """Reports as `Amplifier.report()` gives them, as far as the heat-map reads them."""
    return [
        SimpleNamespace(
            steps=20 * (epoch + 1),
            skipped_steps=0,
            layers=[
                SimpleNamespace(
                    name=f"block{layer // 8}.conv{layer % 8}",
                    fluctuation=float("nan") if epoch == 0 else (layer - layers / 2) / layers,
                    amplified_steps=10 * epoch * (layer % 2),
                )
                for layer in range(layers)
            ],
        )
        for epoch in range(epochs)
    ]


@pytest.mark.parametrize(("layers", "epochs"), [(1, 1), (20, 15), (300, 4)])
def test_the_heat_map_is_written(layers: int, epochs: int, tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    heatmap(made_up_history(layers, epochs), path)
    assert path.read_bytes().startswith(b"\x89PNG")


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
