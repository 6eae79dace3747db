"""Trains a ResNet-18 of half width on handwritten digits, once plainly and once amplified.

    python -m bench.accuracy.demo

Real images, nothing to download, about a minute on one core. Ends with both accuracies, what was
amplified, and a heat-map of the layers' fluctuation in which amplified epochs are framed; `--full`
adds what is known of each layer.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from math import isfinite
from pathlib import Path

import torch

from bench.accuracy.data import DataMissing, load
from bench.accuracy.train import Recipe, Result, train_watched
from gradamp_fast.plot import heatmap
from gradamp_fast.report.table import render

RECIPE = Recipe(arch="resnet18", width=0.5, epochs=20, batch=64, lr=0.3, warmup=0.2)
# An epoch has 22 steps: with the usual 100 before the first decision there is little left to see.
AMPLIFY = {"factor": 2.0, "measure": "fluctuation", "min_steps": 20, "refresh": 20, "decay": 0.95}


def outcome(plain: Result, amplified: Result, images: int) -> list[str]:
    """The three lines to be read first."""
    accuracies = ", ".join(
        f"{run.accuracy:.1%} {label}{' (diverged)' if run.diverged else ''}"
        for label, run in (("plain", plain), ("amplified", amplified))
    )
    report = amplified.history[-1]
    layers = [layer for layer in report.layers if isfinite(layer.fluctuation)]
    layers.sort(key=lambda layer: layer.fluctuation)
    chosen = [layer for layer in layers if layer.selected]
    share = sum(layer.numel for layer in chosen) / sum(layer.numel for layer in report.layers)
    names = ", ".join(layer.name for layer in chosen[:3]) + (", ..." if len(chosen) > 3 else "")
    lines = [
        f"Accuracy on {images} test images: {accuracies}. "
        "One seed shows that it runs, not that it helps.",
        f"Amplified by {AMPLIFY['factor']:g} at the end: {len(chosen)} of {len(layers)} layers "
        f"with {share:.0%} of the elements" + (f": {names}" if names else ""),
    ]
    if layers:
        lines.append(
            f"Fluctuation went from {layers[0].fluctuation:+.2f} ({layers[0].name}, steadiest) to "
            f"{layers[-1].fluctuation:+.2f} ({layers[-1].name}); those below "
            f"{report.threshold:+.2f} were chosen"
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy.demo", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs, help="default: %(default)s")
    parser.add_argument("--out", default="out/demo.png", help="the heat-map; default: %(default)s")
    parser.add_argument("--full", action="store_true", help="a table of every layer as well")
    given = parser.parse_args(argv)
    # On images this small a second thread gains little, loses much on a busy machine, and gives
    # another sum: the figures would depend on the number of cores.
    torch.set_num_threads(1)
    try:
        recipe = replace(RECIPE, epochs=given.epochs)
        data = load("digits")
    except (DataMissing, ValueError) as error:
        sys.exit(f"python -m bench.accuracy.demo: {error}")
    plain = train_watched(data, recipe)
    amplified = train_watched(data, recipe, AMPLIFY)
    out = Path(given.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    heatmap(amplified.history, out, title="ResNet-18 of half width on handwritten digits")
    if given.full:
        print(f"\nLayers at the end of the amplified run\n{render(amplified.history[-1])}")
    print("", *outcome(plain, amplified, len(data.test_labels)), sep="\n")
    print(f"Heat-map of all layers and epochs, amplified ones framed: {out}")


if __name__ == "__main__":
    main()
