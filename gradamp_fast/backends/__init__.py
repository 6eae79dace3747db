"""The backends, siblings with one interface, and the choice between them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, get_args

import torch
from torch import Tensor

from .._checks import one_of
from ..gradients import Outcome
from ..options import BackendName, Options
from ..plan import Plan
from ..state import State
from .cpu import CpuBackend
from .cuda import CudaBackend
from .sharded import Measuring, ShardedBackend
from .torch import TorchBackend
from .triton import TritonBackend


class Stepping(Protocol):
    """Makes the steps of one plan on the device that holds its state."""

    def step(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        unscale: bool,
        only: bytes | None,
        walked: bool,
    ) -> Outcome:
        """One step; ``only`` has a byte for each slot, 0 for one that is left out."""
        ...


class Backend(Stepping, Protocol):
    """One that may be asked for by name."""

    name: ClassVar[str]

    def __init__(self, plan: Plan, state: State, options: Options) -> None: ...

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        """Why the backend cannot serve the device, with the fix; None if it can."""
        ...


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
) -> Callable[[Plan, State, Options], Stepping]:
    """The backend asked for, or for "auto" the first that can serve the device.

    ``sharded``: gradients are spread over processes. ``GRADAMP_BACKEND`` in the environment
    overrides "auto" unless it is empty. Raises RuntimeError for a backend asked for by name that
    cannot run, ValueError if the variable names none.
    """
    if name == "auto":
        name = os.environ.get("GRADAMP_BACKEND") or "auto"
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
