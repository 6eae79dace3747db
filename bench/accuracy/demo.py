"""Trains a ResNet-18 of half width on handwritten digits, once plainly and once amplified.

    python -m bench.accuracy.demo

Real images, nothing to download, about a minute on one core. Ends with both accuracies, what is
known of each layer, and a heat-map of the layers' fluctuation in which amplified epochs are framed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from bench.accuracy.data import DataMissing, load
from bench.accuracy.train import Recipe, Result, train_watched
from gradamp_fast.plot import heatmap
from gradamp_fast.report.table import render

RECIPE = Recipe(arch="resnet18", width=0.5, epochs=20, batch=64, lr=0.3, warmup=0.2)
# An epoch has 22 steps: with the usual 100 before the first decision there is little left to see.
AMPLIFY = {"factor": 2.0, "measure": "fluctuation", "min_steps": 20, "refresh": 20, "decay": 0.95}


def outcome(plain: Result, amplified: Result) -> str:
    """Both accuracies, and what they do not say."""
    lines = ["", "on 360 test images        accuracy   training loss   seconds"]
    for label, run in (("plain", plain), ("amplified", amplified)):
        note = "   diverged" if run.diverged else ""
        lines.append(
            f"{label:<25} {run.accuracy:>8.1%} {run.epochs[-1].train_loss:>15.4f}"
            f" {run.seconds:>9.0f}{note}"
        )
    lines.append("One seed on 360 test images shows that it runs, not that it helps.")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy.demo", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs, help="default: %(default)s")
    parser.add_argument("--out", default="out/demo.png", help="the heat-map; default: %(default)s")
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
    print(f"\nLayers at the end of the amplified run\n{render(amplified.history[-1])}")
    print(outcome(plain, amplified))
    out = Path(given.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    heatmap(amplified.history, out, title="ResNet-18 of half width on handwritten digits")
    print(f"Heat-map: {out}")


if __name__ == "__main__":
    main()
