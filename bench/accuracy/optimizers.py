"""Optimizers by name: the plain one, and peers that find a learning rate by themselves.

The peers come from packages of their own, which nothing else here needs, and run at their defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn

# Package on the registry, module, and how to make it of the module and the parameters.
PEERS: dict[str, tuple[str, str, Callable[[Any, Any], torch.optim.Optimizer]]] = {
    "prodigy": ("prodigyopt", "prodigyopt", lambda package, params: package.Prodigy(params)),
    "d-adapt sgd": (
        "dadaptation", "dadaptation", lambda package, params: package.DAdaptSGD(params)
    ),
    "d-adapt adam": (
        "dadaptation", "dadaptation", lambda package, params: package.DAdaptAdam(params)
    ),
    "mechanic": (
        "mechanic-pytorch",
        "mechanic_pytorch",
        lambda package, params: package.mechanize(torch.optim.SGD)(
            params, lr=1.0, momentum=0.9, nesterov=True, weight_decay=5e-4
        ),
    ),
}  # fmt: skip


class OptimizerMissing(Exception):
    """A peer's package is not installed; the message is one line that says how to get it."""


def peer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """One of `PEERS` over the model's parameters. Its learning rate of 1 is a multiple of what it
    finds."""
    package, module, make = PEERS[name]
    try:
        return make(import_module(module), model.parameters())
    except ModuleNotFoundError:
        raise OptimizerMissing(f"{name}: pip install {package}") from None
