"""Trains an image classifier, with or without gradient amplification.

    python -m bench.accuracy.train --data cifar10 --root data --download --arch resnet18 --lr 0.4

`train` is the whole of it and can be called many times in one process on data loaded once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite, log
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn.functional import cross_entropy

import gradamp_fast
from bench.accuracy import controls, models, optimizers
from bench.accuracy.data import NAMES, Data, DataMissing, load

EVALUATION_BATCH = 1000
Fall = Literal["linear", "steps"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run is, but for its data and its amplification.

    SGD with Nesterov momentum; the learning rate rises linearly to `lr` over `warmup` of all steps.
    It then falls linearly to 0, or (`fall="steps"`) to a tenth at half of all steps and at three
    quarters. Weight decay is coupled and applies to every parameter. `optimizer="adamw"`
    is AdamW, whose updates are multiplied; one of `optimizers.PEERS` has options of its own.
    """

    arch: str = "resnet18"
    width: float = 1.0
    epochs: int = 30
    batch: int = 128
    lr: float = 0.1
    warmup: float = 0.1  # a share of all steps
    fall: Fall = "linear"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    optimizer: str = "sgd"
    seed: int = 0
    bf16: bool = False  # forward pass under bf16 autocast; parameters and gradients stay fp32

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.fall not in get_args(Fall):
            raise ValueError(f"fall={self.fall!r}: must be one of {', '.join(get_args(Fall))}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a 0-based step out of `steps`."""
        rising = (step + 1) / max(self.warmup * steps, 1.0)
        if self.fall == "steps":
            falling = 0.1 ** sum(step >= share * steps for share in (0.5, 0.75))
        else:
            falling = (steps - step) / max((1.0 - self.warmup) * steps, 1.0)
        return self.lr * min(rising, falling, 1.0)


@dataclass(frozen=True)
class Epoch:
    """One epoch's outcome: mean training loss, and loss and accuracy (0 to 1) on the test set."""

    train_loss: float
    test_loss: float
    accuracy: float


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    `diverged`: a loss was not finite (the run ended there), or the last training loss is no better
    than guessing. `history` holds one report per epoch, none for a plain run.
    """

    recipe: Recipe
    diverged: bool
    seconds: float
    epochs: list[Epoch] = field(default_factory=list)
    history: list[gradamp_fast.Report] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """On the test set after the last epoch, 0 to 1."""
        return self.epochs[-1].accuracy


def train(
    data: Data,
    recipe: Recipe,
    amplify: Mapping[str, Any] | None = None,
    on_step: Callable[[], object] = lambda: None,
    on_epoch: Callable[[int, Epoch, nn.Module], object] = lambda number, epoch, model: None,
) -> Result:
    """Trains one model on `data`, on the data's device.

    `amplify` holds the options of `controls.make`: those of `gradamp_fast.Amplifier`, and
    `shuffle`. None trains plainly. Runs that differ in nothing but `amplify` start from the same
    weights and see the same batches. The host waits for the device once an epoch, for the metrics
    and the report, and never in between.
    """
    device = data.device
    torch.manual_seed(recipe.seed)
    model = models.build(recipe.arch, data.classes, recipe.width)
    model = model.to(device).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, recipe, device)
    amplifier = None if amplify is None else controls.make(model, amplify)
    attached = amplifier is not None and recipe.optimizer == "adamw"
    if amplifier is not None and attached:
        amplifier.attach(optimizer)
    generator = torch.Generator(device).manual_seed(recipe.seed)
    batch = min(recipe.batch, len(data.train_labels))
    steps = data.steps(batch)
    epochs: list[Epoch] = []
    history: list[gradamp_fast.Report] = []
    step = 0
    start = time.perf_counter()
    for number in range(recipe.epochs):
        if amplifier is not None:
            amplifier.set_epoch(number)
        model.train()
        total = torch.zeros((), device=device)
        for images, labels in data.train_batches(batch, generator):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step, steps * recipe.epochs)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
                loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            if amplifier is not None and not attached:
                amplifier.step()
            optimizer.step()
            total += loss.detach()
            step += 1
            on_step()
        epochs.append(evaluate(model, data, total / steps, recipe.bf16))
        if amplifier is not None:
            history.append(amplifier.report())
        on_epoch(number, epochs[-1], model)
        if not isfinite(epochs[-1].train_loss):
            break
    last = epochs[-1].train_loss
    return Result(
        recipe=recipe,
        diverged=not last < log(data.classes),
        seconds=time.perf_counter() - start,
        epochs=epochs,
        history=history,
    )


def make_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        decay = recipe.weight_decay
        return gradamp_fast.optim.AdamW(model.parameters(), recipe.lr, weight_decay=decay)
    if recipe.optimizer != "sgd":
        return optimizers.peer(recipe.optimizer, model)
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
        fused=device.type == "cuda",
    )


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, train_loss: torch.Tensor, bf16: bool) -> Epoch:
    """Runs the test set and brings all three numbers to the host in one copy."""
    model.eval()
    loss = torch.zeros((), device=data.device)
    correct = torch.zeros((), device=data.device)
    for images, labels in data.test_batches(EVALUATION_BATCH):
        with torch.autocast(data.device.type, torch.bfloat16, enabled=bf16):
            logits = model(images)
        loss += cross_entropy(logits.float(), labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    count = len(data.test_labels)
    numbers = torch.stack([train_loss, loss / count, correct / count]).tolist()
    return Epoch(*numbers)


@contextmanager
def watch(
    label: str, steps: int, epochs: int
) -> Iterator[tuple[Callable[[], None], Callable[[int, Epoch, nn.Module], None]]]:
    """Shows one run of `steps` steps; yields `on_step` and `on_epoch` for `train`."""
    console = Console()
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=steps, note="")

        def on_step() -> None:
            bar.advance(task)

        def on_epoch(number: int, epoch: Epoch, model: nn.Module) -> None:
            note = f"loss {epoch.train_loss:.3f}, accuracy {epoch.accuracy:.1%}"
            bar.update(task, note=note)
            if not console.is_terminal:
                print(f"{label}: epoch {number + 1}/{epochs}, {note}", flush=True)

        yield on_step, on_epoch


def train_watched(
    data: Data,
    recipe: Recipe,
    amplify: Mapping[str, Any] | None = None,
    label: str | None = None,
) -> Result:
    """`train` with its progress shown on the standard output, under a label."""
    steps = data.steps(recipe.batch) * recipe.epochs
    label = label or ("plain" if amplify is None else "amplified")
    with watch(label, steps, recipe.epochs) as (on_step, on_epoch):
        return train(data, recipe, amplify, on_step, on_epoch)


def threshold(text: str) -> str | float:
    """ "0.5" is a number; anything else is a threshold's name."""
    try:
        return float(text)
    except ValueError:
        return text


def arguments(argv: list[str] | None) -> argparse.Namespace:
    recipe = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy.train",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", choices=NAMES, default="digits", help="what to train on")
    add("--root", default="data", metavar="DIR", help="where CIFAR lies")
    add("--download", action="store_true", help="fetch CIFAR into --root if it is not there")
    add("--arch", choices=models.NAMES, default=recipe.arch, help="the network")
    add("--width", type=float, default=recipe.width, help="times the usual number of channels")
    add("--lr", type=float, default=recipe.lr, help="the highest learning rate")
    add("--epochs", type=int, default=recipe.epochs, help="passes over the training images")
    add("--batch", type=int, default=recipe.batch, help="images in a step")
    add("--seed", type=int, default=recipe.seed, help="of the weights and of the batches")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch's name")
    add("--bf16", action="store_true", help="forward pass under bf16 autocast")
    group = parser.add_argument_group("amplification")
    add = group.add_argument
    add("--plain", action="store_true", help="train without amplification")
    add("--factor", type=float, default=2.0, help="what selected layers are multiplied by")
    add("--measure", default="fluctuation", help="fluctuation, direction or variance")
    add("--threshold", type=threshold, default="mean", help="mean, std, quantile or a number")
    add("--select", default="below", help="below or above the threshold")
    add("--min-steps", type=int, default=100, help="steps before a layer may be selected")
    add("--refresh", type=int, default=100, help="steps between decisions")
    add("--backend", default="auto", help="auto, cuda, triton, cpu or torch")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    given = arguments(argv)
    names = ("factor", "measure", "threshold", "select", "min_steps", "refresh", "backend")
    amplify = None if given.plain else {name: getattr(given, name) for name in names}
    try:
        recipe = Recipe(
            arch=given.arch,
            width=given.width,
            epochs=given.epochs,
            batch=given.batch,
            lr=given.lr,
            seed=given.seed,
            bf16=given.bf16,
        )
        data = load(given.data, given.root, given.download, given.device)
        result = train_watched(data, recipe, amplify)
    except (DataMissing, ValueError) as error:
        sys.exit(f"python -m bench.accuracy.train: {error}")
    print(
        f"accuracy {result.accuracy:.2%}, training loss {result.epochs[-1].train_loss:.4f}, "
        f"{result.seconds:.0f} s{', diverged' if result.diverged else ''}"
    )


if __name__ == "__main__":
    main()
