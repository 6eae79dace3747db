"""Trains a ResNet-18 of half width on handwritten digits at a learning rate that is far too low.

    python -m bench.accuracy.demo

Three runs: plain, growing from the same rate, and plain at a tuned rate, which is the yardstick.
Real images, nothing to download, about a minute on one core. Ends with the accuracies, what has
grown, and a map of the layers' factors over the epochs, in which settled layers are framed;
`--full` adds what is known of each layer.
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

# The warm-up is over when growth may begin, after 50 steps: an epoch has 22.
TUNED = Recipe(arch="resnet18", width=0.5, epochs=13, batch=64, lr=0.06, warmup=0.1)
TOO_LOW = 100  # times lower


def outcome(plain: Result, growing: Result, tuned: Result, images: int) -> list[str]:
    """The three lines to be read first."""

    def accuracy(run: Result) -> str:
        return f"{run.accuracy:.1%}{' (diverged)' if run.diverged else ''}"

    report = growing.history[-1]
    layers = sorted(report.layers, key=lambda layer: layer.factor)
    least, most = layers[0], layers[-1]
    directions = [entry.direction for entry in growing.history]
    return [
        f"Accuracy on {images} test images at learning rate {plain.recipe.lr:g}: "
        f"{accuracy(plain)} plain, {accuracy(growing)} growing; at {tuned.recipe.lr:g}, tuned: "
        f"{accuracy(tuned)} plain. One seed shows that it runs, not how well.",
        f"Factors grew to between {least.factor:.3g} ({least.name}) and {most.factor:.3g} "
        f"({most.name}); {sum(layer.settled for layer in layers)} of {len(layers)} layers have "
        "settled",
        f"The mean direction went from {directions[0]:+.2f} after the first epoch to "
        f"{directions[-1]:+.2f}: above 0.10 the learning rate is low",
    ]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy.demo", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--epochs", type=int, default=TUNED.epochs, help="default: %(default)s")
    parser.add_argument("--out", default="out/demo.png", help="the heat-map; default: %(default)s")
    parser.add_argument("--full", action="store_true", help="a table of every layer as well")
    given = parser.parse_args(argv)
    # On images this small a second thread gains little, loses much on a busy machine, and gives
    # another sum: the figures would depend on the number of cores.
    torch.set_num_threads(1)
    try:
        tuned = replace(TUNED, epochs=given.epochs)
        data = load("digits")
    except (DataMissing, ValueError) as error:
        sys.exit(f"python -m bench.accuracy.demo: {error}")
    low = replace(tuned, lr=tuned.lr / TOO_LOW)
    plain = train_watched(data, low)
    growing = train_watched(data, low, {"grow": True}, "growing")
    yardstick = train_watched(data, tuned, None, "tuned")
    out = Path(given.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    heatmap(
        growing.history, out, show="factor", title="ResNet-18 of half width on handwritten digits"
    )
    if given.full:
        print(f"\nLayers at the end of the growing run\n{render(growing.history[-1])}")
    print("", *outcome(plain, growing, yardstick, len(data.test_labels)), sep="\n")
    print(f"Factors of all layers in all epochs, settled ones framed: {out}")


if __name__ == "__main__":
    main()
