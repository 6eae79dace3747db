"""The experiments that the command line knows: data, networks and recipes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from bench.accuracy.stages import Experiment, Family
from bench.accuracy.train import Recipe

CIFAR = Recipe(width=0.5, epochs=16, batch=512, lr=0.4, warmup=2 / 16, bf16=True)
CONFIRM_WIDTH = 1.0  # on a GPU
CIFAR_SMALL = Recipe(width=0.25, epochs=6, batch=128, lr=0.1, warmup=1 / 6)  # without one
# One core of a CPU takes about a minute for it, in bf16 three quarters of what it takes in fp32.
CIFAR_16 = Recipe(
    arch="resnet10", width=0.25, epochs=5, batch=128, lr=0.1, warmup=0.0, bf16=True
)  # fmt: skip
# Growing needs no warm-up to be safe, and without one nothing has to wait for its end.
CIFAR_GROWTH = replace(CIFAR, batch=128, lr=0.1, warmup=0.0)
DIGITS = Recipe(width=0.125, epochs=20, batch=32, lr=0.1, warmup=0.1)
FAKE = Recipe(arch="cnn", epochs=3, batch=32, lr=0.1)
RECIPES: dict[str, dict[str, Any]] = {"usual": {}, "paper": {"warmup": 0.0, "fall": "steps"}}


def family(data: str, gpu: bool) -> Family:
    """Of a data set; without a GPU, in small."""
    if data == "fake":
        return Family(data, FAKE, None, 128)
    if data == "digits":
        return Family(data, replace(DIGITS, bf16=gpu), None, 360)
    return Family(data, CIFAR, None, 5000) if gpu else Family(data, CIFAR_SMALL, 10_000, 2000)


def name_of(given: argparse.Namespace) -> str:
    """Of the experiment's report: the data, the device and what is not as usual."""
    parts = [given.data, given.device.partition(":")[0]]
    if given.recipe != "usual":
        parts.append(given.recipe)
    for name in ("arch", "width", "epochs", "train"):
        if getattr(given, name) is not None:
            parts.append(f"{name}-{getattr(given, name)}")
    for name in ("confirm_data", "confirm_arch", "confirm_width"):
        if getattr(given, name) is not None:
            parts.append(f"on-{getattr(given, name)}")
    return "-".join(parts)


def experiment_for(given: argparse.Namespace) -> Experiment:
    """What the command line asks for."""
    gpu = given.device.startswith("cuda")
    screen = family(given.data, gpu)
    changed = {
        name: getattr(given, name)
        for name in ("arch", "width", "epochs")
        if getattr(given, name) is not None
    }
    recipe = replace(screen.recipe, **RECIPES[given.recipe], **changed)
    screen = replace(screen, recipe=recipe, train=given.train or screen.train)
    width = given.confirm_width or (CONFIRM_WIDTH if gpu and given.width is None else recipe.width)
    confirm = replace(
        screen,
        data=given.confirm_data or given.data,
        recipe=replace(recipe, arch=given.confirm_arch or recipe.arch, width=width),
    )
    return Experiment(screen, confirm)
