"""What an optimizer does with its parameters, in the pass that reads their gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..call import Hyper, Updated
from ..model.members import is_dense
from ..model.optimizers import Holding
from ..model.shards import is_dtensor, local


class UpdatesOf:
    """``Updates`` of one optimizer, whose state is where torch's optimizers have it.

    What counts the updates of SGD, whose first one takes the gradient for momentum, is kept here.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        hyper: Callable[[dict[str, Any]], Hyper],
        multiplies_update: bool,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.hyper = hyper
        self.multiplies_update = multiplies_update
        self.version = 0
        self.counts: dict[Parameter, Tensor] | None = None if multiplies_update else {}
        self._holding = Holding(optimizer)
        self._groups: dict[int, int] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []

    @property
    def optimizer(self) -> Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    @property
    def state(self) -> dict[Any, Any]:
        return self.optimizer.state

    def hypers(self) -> list[Hyper]:
        return [self.hyper(group) for group in self.optimizer.param_groups]

    def groups(self, parameters: Iterable[Parameter]) -> list[int]:
        self.look()
        return [self._groups.get(id(parameter), -1) for parameter in parameters]

    def look(self) -> None:
        if self._holding.changed() or not self.version:
            self.version += 1
            self._groups = {
                id(parameter): index
                for index, group in enumerate(self.optimizer.param_groups)
                for parameter in group["params"]
            }

    def make_state(self) -> None:
        for hyper, group in zip(self.hypers(), self.optimizer.param_groups, strict=True):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._make_state_of(parameter, hyper)

    def _make_state_of(self, parameter: Parameter, hyper: Hyper) -> None:
        state, fresh = self.state[parameter], False
        for key in hyper.states:
            if not isinstance(state.get(key), Tensor):
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                fresh = True
        device = _here(parameter).device
        if self.counts is None:
            steps = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device=device)
            if state.get("step") is not steps:
                state["step"] = steps.clone()
        elif fresh or parameter not in self.counts:
            first = fresh or not hyper.states
            self.counts[parameter] = torch.full((), float(not first), device=device)

    def tensors(
        self, names: Sequence[str], parameters: Sequence[Parameter], dense: Sequence[Tensor | None]
    ) -> list[Updated | None]:
        self._copies.clear()
        self.make_state()
        hypers, groups = self.hypers(), self.groups(parameters)
        return [
            None if gradient is None else self._updated(name, parameter, gradient, hypers[group])
            for name, parameter, gradient, group in zip(
                names, parameters, dense, groups, strict=True
            )
        ]

    def _updated(self, name: str, parameter: Parameter, gradient: Tensor, hyper: Hyper) -> Updated:
        state = self.state[parameter]
        tensors = {"the parameter": _here(parameter)}
        tensors |= {f"its {key!r}": _here(state[key]) for key in hyper.states}
        for what, tensor in tensors.items():
            if tensor.shape != gradient.shape:
                raise ValueError(
                    f"the gradient of {name!r} has shape {tuple(gradient.shape)}, {what} "
                    f"{tuple(tensor.shape)}"
                )
            if (tensor.dtype, tensor.device) != (gradient.dtype, gradient.device):
                raise TypeError(
                    f"the gradient of {name!r} is {gradient.dtype} on {gradient.device}, {what} "
                    f"{tensor.dtype} on {tensor.device}: a fused optimizer needs them alike"
                )
        own, *states = (self._flat(tensor.detach(), gradient) for tensor in tensors.values())
        steps = state["step"] if self.counts is None else self.counts[parameter]
        return Updated(hyper, own, tuple(states), steps)

    def _flat(self, tensor: Tensor, gradient: Tensor) -> Tensor:
        if not is_dense(tensor) or tensor.stride() != gradient.stride() or tensor.is_conj():
            copy = torch.empty_like(gradient).copy_(tensor)
            self._copies.append((tensor, copy))
            tensor = copy
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return real.as_strided((real.numel(),), (1,))

    @torch.no_grad()
    def write_back(self) -> None:
        for tensor, copy in self._copies:
            tensor.copy_(copy)
        self._copies.clear()


def _here(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is here, or the tensor itself."""
    return local(tensor) if is_dtensor(tensor) else tensor
