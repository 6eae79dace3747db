"""What a door did to the gradients: their factor over gradients that are known without it.

Losses here are linear in the parameters, so that raw gradients are the slopes, whatever became
of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Every layer is selected from its first step on, in that step.
ALWAYS: dict[str, Any] = {
    "measure": "random",
    "threshold": 2.0,
    "min_steps": 1,
    "refresh": 1,
    "timing": "exact",
    "factor": 2.0,
}
# The same, by the selection that stood before: a layer's first step is plain.
LAGGED = {**ALWAYS, "timing": "lagged"}


def network(device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Three layers, two of them with a bias."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)]
    return nn.Sequential(*layers).to(device, dtype)


def slopes(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Gradients by parameter name, of all that can have one; none is near 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (1 + torch.rand(p.shape, generator=generator)).to(p.device, p.dtype)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def linear(model: nn.Module, gradients: Mapping[str, Tensor]) -> Tensor:
    """A loss whose gradients are these."""
    parameters = dict(model.named_parameters())
    return torch.stack([(parameters[n] * g).sum() for n, g in gradients.items()]).sum()


def backward(
    model: nn.Module, scale: float = 1.0, seed: int = 0, leave_out: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Adds the slopes to the gradients by backpropagation, and returns them."""
    given = {n: g for n, g in slopes(model, seed).items() if n not in set(leave_out)}
    (linear(model, given) * scale).backward()
    return given


def factor(gradient: Tensor | None, raw: Tensor) -> float:
    """What turned the raw gradient into this one: NaN unless one number did."""
    if gradient is None or gradient.shape != raw.shape:
        return math.nan
    ratio = gradient.detach().double() / raw.double()
    first = float(ratio.flatten()[0])
    return round(first, 6) if bool((ratio - first).abs().max() < 1e-6 * abs(first)) else math.nan


def factors(model: nn.Module, raw: Mapping[str, Tensor]) -> dict[str, float]:
    """By parameter name."""
    return {n: factor(p.grad, raw[n]) for n, p in model.named_parameters() if n in raw}


def only(model: nn.Module, raw: Mapping[str, Tensor]) -> float:
    """The factor of all gradients; NaN unless they share one."""
    found = set(factors(model, raw).values())
    return found.pop() if len(found) == 1 else math.nan


def steps(amplifier: Any) -> dict[str, int]:
    """Steps that each layer was measured in."""
    return {layer.name: layer.steps for layer in amplifier.report().layers}


def sgd(parameters: Any, **options: Any) -> torch.optim.SGD:
    """An optimizer that moves nothing."""
    return torch.optim.SGD(parameters, **{"lr": 0.0, **options})


def closure_of(
    optimizer: torch.optim.Optimizer, model: nn.Module, gradients: Mapping[str, Tensor]
) -> Callable[..., Tensor]:
    """A closure that makes new gradients unless told ``backward=False``."""

    def closure(backward: bool = True) -> Tensor:
        if not backward:
            with torch.no_grad():
                return linear(model, gradients)
        optimizer.zero_grad()
        loss = linear(model, gradients)
        loss.backward()
        return loss.detach()

    return closure
