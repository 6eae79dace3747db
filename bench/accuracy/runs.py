"""One run of the experiment: what it is, and what came of it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from statistics import mean
from typing import Any

import torch
from torch import nn

from bench.accuracy.data import Data
from bench.accuracy.train import Recipe, Result, evaluate, train
from gradamp_fast import Options, Report

MEASURES = ("fluctuation", "direction", "variance")
# Always part of a configuration; other options are when they are not the default.
CHOSEN = ("measure", "threshold", "select", "factor", "decay", "min_steps", "refresh", "schedule")
OURS = ("shuffle", "one_factor", "dose")  # options of `controls.make` alone
NOT_CONFIG = ("backend", "error_if_nonfinite", "seed")


@dataclass(frozen=True)
class Run:
    """Everything that an outcome depends on, but for the machine.

    Attributes:
        train: images trained on; None is all that are not held out.
        validation: training images held out, the same in all runs.
        amplify: options as for `bench.accuracy.train.train`; None is a plain run.
        scores: keep all layers' scores, epoch by epoch.
        test: look at the test images when training is over.
    """

    data: str
    train: int | None
    validation: int
    recipe: Recipe
    amplify: Mapping[str, Any] | None = None
    scores: bool = False
    test: bool = False

    @cached_property
    def config(self) -> str:
        """All of it but the seed, as JSON."""
        recipe = asdict(self.recipe)
        del recipe["seed"]
        if self.recipe.optimizer == "sgd":  # as it was before there were others
            del recipe["optimizer"]
        config = {
            "data": self.data,
            "train": self.train,
            "validation": self.validation,
            "recipe": recipe,
            "amplify": None if self.amplify is None else stored_options(self.amplify),
            "scores": self.scores,
            "test": self.test,
        }
        return compact(config)

    @property
    def key(self) -> tuple[str, int]:
        """A hash of the configuration, and the seed: what is not run twice."""
        return hashlib.sha256(self.config.encode()).hexdigest()[:12], self.recipe.seed


def stored_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """What selects and multiplies; a default that changes later changes no stored run.

    Seeds of controls are left out: they go with the run's.
    """
    plain = {name: value for name, value in given.items() if name not in OURS}
    stored = Options.make(plain).to_dict()
    usual = Options().to_dict()
    ours = {name: given[name] for name in OURS if name in given}
    if "shuffle" in ours:
        ours["shuffle"] = True
    return ours | {
        name: value
        for name, value in stored.items()
        if name not in NOT_CONFIG and (name in CHOSEN or value != usual[name])
    }


@dataclass(frozen=True)
class Row:
    """One finished run: a line of the CSV.

    Attributes:
        validation, test: accuracy after the last epoch, 0 to 1; `test` is None but in stage 3.
        amplified: share of the elements that were amplified, averaged over the steps.
        weights: JSON, the norm of each parameter at the end (up to version 0.2.0 of each layer,
            with how far the last epoch moved it).
        layer_scores: JSON as `scores_of` makes it, of a growing run as `growth_of` does, or empty.
    """

    stage: str
    arm: str
    key: str
    seed: int
    validation: float
    test: float | None
    diverged: bool
    train_loss: float
    amplified: float
    seconds: float
    device: str
    torch: str
    commit: str
    date: str
    config: str
    weights: str
    layer_scores: str

    def to_cells(self) -> dict[str, str]:
        return {
            name: "" if value is None else str(value)
            for name, value in ((f.name, getattr(self, f.name)) for f in fields(self))
        }

    @staticmethod
    def from_cells(cells: Mapping[str, str]) -> Row:
        given: dict[str, Any] = dict(cells)
        for name in ("validation", "train_loss", "amplified", "seconds"):
            given[name] = float(cells[name])
        given["seed"] = int(cells["seed"])
        given["test"] = float(cells["test"]) if cells["test"] else None
        given["diverged"] = cells["diverged"] == "True"
        return Row(**given)


def execute(run: Run, data: Data, about: Mapping[str, str]) -> Row:
    """Trains; `about` holds the row's other cells, such as stage and device."""
    models: list[nn.Module] = []
    start = time.perf_counter()
    part = held_out(data, run.validation, run.train)
    result = train(
        part, run.recipe, run.amplify, on_epoch=lambda number, epoch, model: models.append(model)
    )
    model, test = models[-1], None
    if run.test:
        nothing = torch.zeros((), device=data.device)
        test = evaluate(model, data, nothing, run.recipe.bf16).accuracy
    key, seed = run.key
    return Row(
        key=key,
        seed=seed,
        validation=result.accuracy,
        test=test,
        diverged=result.diverged,
        train_loss=rounded(result.epochs[-1].train_loss),
        amplified=rounded(amplified_share(result)),
        seconds=round(time.perf_counter() - start, 2),
        config=run.config,
        weights=compact(norms(model)),
        layer_scores=told(run, result, model),
        **about,
    )


def norms(model: nn.Module) -> dict[str, float]:
    """Of each parameter."""
    return {
        name: rounded(float(p.detach().double().norm())) for name, p in model.named_parameters()
    }


@lru_cache(maxsize=2)
def held_out(data: Data, validation: int, train: int | None) -> Data:
    return data.hold_out(validation, train)


def amplified_share(result: Result) -> float:
    """Of all elements, averaged over the counted steps."""
    if not result.history:
        return 0.0
    layers = result.history[-1].layers
    amplified = sum(layer.amplified_share * layer.numel for layer in layers)
    return amplified / sum(layer.numel for layer in layers)


def told(run: Run, result: Result, model: nn.Module) -> str:
    """What the reports say, as JSON, as far as it is kept."""
    if run.scores:
        return compact(scores_of(result.history, model))
    if run.amplify is not None and run.amplify.get("grow"):
        return compact(growth_of(result.history))
    return ""


def growth_of(history: Sequence[Report]) -> dict[str, list[float | None]]:
    """By epoch: factor (geometric mean, weighted by elements), share that settled, direction."""
    return {
        "factor": [_or_null(_mean_factor(report)) for report in history],
        "settled": [rounded(mean(layer.settled for layer in r.layers)) for r in history],
        "direction": [_or_null(report.direction) for report in history],
    }


def _mean_factor(report: Report) -> float:
    logs = sum(layer.numel * math.log(layer.factor) for layer in report.layers)
    return math.exp(logs / sum(layer.numel for layer in report.layers))


def scores_of(history: list[Report], model: nn.Module) -> dict[str, Any]:
    """Steps in an epoch, the layers, which have a kernel, and by measure their scores per epoch.

    A layer with a kernel owns a parameter of two dimensions or more; the others are norms.
    "direction" is given as its score, low for steady layers. NaN is null.
    """
    names = [layer.name for layer in history[0].layers]
    modules = dict(model.named_modules())
    found: dict[str, Any] = {
        "steps": history[0].steps,
        "layers": names,
        "kernel": [any(p.ndim > 1 for p in modules[name].parameters(False)) for name in names],
    }
    sign = {"fluctuation": 1.0, "direction": -1.0, "variance": 1.0}
    for measure in MEASURES:
        found[measure] = [
            [_or_null(sign[measure] * getattr(layer, measure)) for layer in report.layers]
            for report in history
        ]
    return found


def _or_null(value: float) -> float | None:
    return rounded(value) if math.isfinite(value) else None


def rounded(value: float) -> float:
    """To four significant digits."""
    return float(f"{value:.4g}")


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)
