"""The backends, siblings with one interface, and the choice between them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import nn

from .._checks import one_of
from ..model.plan import Plan
from ..options import BackendName, Rules
from ..reference.state import State
from .backward import BackwardSteps
from .compiled import CpuBackend, CudaBackend
from .sharded import ShardedBackend
from .stepping import Backend, Measuring, Stepping
from .torch import TorchBackend
from .triton import TritonBackend

__all__ = ["NAMES", "Backend", "Measuring", "Stepping", "choose", "make", "unavailable"]

_BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend for backend in (CudaBackend, TritonBackend, CpuBackend, TorchBackend)
}
_MEASURING: dict[str, type[Measuring]] = {
    backend.name: backend for backend in (CudaBackend, CpuBackend, TorchBackend)
}
NAMES: Sequence[str] = tuple(_BACKENDS)


def unavailable(name: str, device: torch.device) -> str | None:
    """Why the backend of that name cannot serve the device; None if it can."""
    return _BACKENDS[name].unavailable(device)


def choose(
    name: str, device: torch.device, sharded: bool = False
) -> Callable[[Plan, State, Rules], Stepping]:
    """The backend asked for, or for "auto" the first that can serve the device.

    ``sharded``: gradients are spread over processes. ``GRADAMP_BACKEND`` in the environment
    overrides "auto" unless it is empty. Raises RuntimeError for a backend asked for by name that
    cannot run, ValueError if the variable names none.
    """
    if name == "auto":
        name = os.environ.get("GRADAMP_BACKEND", "")
        name = name if name.strip() else "auto"
        one_of("environment variable GRADAMP_BACKEND", name, get_args(BackendName))
    able: dict[str, Any] = _MEASURING if sharded else _BACKENDS
    if name == "auto":
        chosen = next(b for b in able.values() if b.unavailable(device) is None)
    else:
        reason = unavailable(name, device)
        if reason is None and name not in able:
            reason = f"it cannot serve sharded gradients; {', '.join(able)} can"
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run on {device}: {reason}")
        chosen = able[name]
    return functools.partial(ShardedBackend, chosen) if sharded else chosen


def make(name: str, plan: Plan, state: State, rules: Rules, model: nn.Module | None) -> Stepping:
    """The steps of a plan, by the backend asked for; raises as ``choose`` does."""
    chosen = choose(name, state.device, plan.sharded)
    if rules.backward:
        return BackwardSteps(chosen, plan, state, rules, model)
    return chosen(plan, state, rules)
