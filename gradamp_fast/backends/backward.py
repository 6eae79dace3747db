"""Amplification during backpropagation: what flows out of a selected layer, towards its inputs.

``placement="backward"`` alone; this project's reading of arXiv 2006.10560. All of a layer's
gradient that goes on to earlier layers is multiplied, at every use of its module, so that the
factors of the layers on a path compound. The scores of such a step would be those of amplified
gradients, and on a graph with branches no division gives back the plain ones. So every
``measure_every``-th step is plain: measured, counted, decided by. The steps between are
amplified, and pass by the state.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import reference
from ..call import Call, Outcome
from ..model.plan import Plan
from ..options import Rules
from ..reference.state import GLOBAL_FIELDS, State
from .stepping import Stepping

# The gradients themselves are not multiplied: no step has a number of 2**53, from which on fp64,
# which counts them, does not hold every integer.
_NEVER: dict[str, Any] = {
    "schedule_unit": "step",
    "windows": ((2.0**53, math.inf, math.nan),),
    "max_amplification": math.inf,
}
_FIRST = GLOBAL_FIELDS.index("unmeasured_steps")
_UNMEASURED = slice(_FIRST, _FIRST + 2)  # and how many of them were skipped
_COUNTERS = slice(0, 2)  # the same of measured steps


class BackwardSteps(Stepping):
    """Steps of one plan: a backend that measures, one that passes by, and hooks on the model.

    Attributes:
        multipliers: by dtype, fp32 and fp64 [layers]: what flows out of each layer is multiplied
            by. Written in place after each step, read on the device while gradients flow.
    """

    acts_between_steps: ClassVar[bool] = True

    def __init__(
        self,
        make: Callable[[Plan, State, Rules], Stepping],
        plan: Plan,
        state: State,
        rules: Rules,
        model: nn.Module | None,
    ) -> None:
        if plan.sharded:
            raise ValueError('placement="backward" does not serve sharded gradients')
        self._state, self._rules = state, rules
        self._measuring = make(plan, state, replace(rules, **_NEVER))
        self._aside = State(plan, rules.factor, state.device)
        self._passing = make(plan, self._aside, replace(rules, **_NEVER, refresh=0))
        self.multipliers = {
            dtype: torch.ones(len(plan.layers), dtype=dtype, device=state.device)
            for dtype in (torch.float32, torch.float64)
        }
        # Layers whose modules were called since the last measured step, and before that one: what
        # is never called is never amplified, and must not be selected.
        self.called: set[int] = set()
        self._reached: Tensor | None = None
        self._fresh = True  # the coming step's forward pass may have been without hooks
        handles = [] if model is None else _hook(model, plan, self)
        weakref.finalize(self, _remove, handles)
        self.follow(restored=True)

    @torch.no_grad()
    def follow(self, restored: bool = False) -> None:
        """Sets the multipliers for the coming backpropagation."""
        if restored:
            self._calls = int(reference.step_number(self._state, Call()))
        if self._reached is not None:
            self._state.column("selected").mul_(self._reached)
        factor = torch.ones_like(self._state.scalar("factor"))
        if self._calls % self._rules.measure_every:
            factor = reference.active_factor(self._state, self._rules, Call())
        selected = self._state.column("selected") != 0
        for multipliers in self.multipliers.values():
            multipliers.copy_(torch.where(selected, factor, 1.0))

    def step(self, call: Call) -> Outcome:
        if call.only is not None:
            raise ValueError(
                'placement="backward" needs one optimizer that holds all trainable parameters: '
                "its steps are those of the whole model"
            )
        if self._state.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                'a step with placement="backward" cannot be captured, since not every step '
                "measures: capture forward and backward, and step outside of the graph"
            )
        measured = self._calls % self._rules.measure_every == 0
        outcome = self._measure(call) if measured else self._pass(call)
        if outcome is Outcome.DONE:
            self._calls += 1
            self._fresh = False
            self.follow()
        return outcome

    @torch.no_grad()
    def _measure(self, call: Call) -> Outcome:
        selected, changed_at = self._state.column("selected"), self._state.column("changed_at")
        selected_before, changed_before = selected.clone(), changed_at.clone()
        outcome = self._measuring.step(call)
        if outcome is Outcome.DONE and (self.called or not self._fresh):
            reached = [layer in self.called for layer in range(len(selected))]
            self._reached = torch.tensor(reached, dtype=selected.dtype, device=selected.device)
            self.called.clear()
            kept = (self._reached == 0) & (selected_before == 0)  # it was not selected, and is not
            changed_at.copy_(torch.where(kept, changed_before, changed_at))
        return outcome

    @torch.no_grad()
    def _pass(self, call: Call) -> Outcome:
        """Unscales, clips and looks for NaN as any step does, on a state that nobody reads."""
        aside, counters = self._aside, self._state.values[_UNMEASURED]
        aside.values[_COUNTERS] = counters
        outcome = self._passing.step(call)
        if outcome is Outcome.DONE:
            counted = aside.scalar("skipped_steps") == counters[1]
            amplified = counted & (self.multipliers[torch.float64] != 1)
            self._state.column("amplified_steps").add_(amplified)
            counters.copy_(aside.values[_COUNTERS])
            self._state.scalar("total_norm").copy_(aside.scalar("total_norm"))
        return outcome


class _Hook:
    """Before a module's forward: its inputs are passed on as views that multiply what flows back.

    Holds neither amplifier nor model. A copy of the model, or one from a pickle, has hooks that
    do nothing.
    """

    __name__ = "gradamp_fast.placement"

    def __init__(self, steps: BackwardSteps | None = None, layer: int = 0) -> None:
        self._steps = (lambda: None) if steps is None else weakref.ref(steps)
        self._layer = layer

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()

    @property
    def __globals__(self) -> dict[str, Any]:
        """Of a function, as ``torch.jit.script`` takes a hook to be."""
        raise RuntimeError(
            "torch.jit.script cannot compile the hooks of an Amplifier with placement='backward': "
            "script the model before the Amplifier's first step, or after it is gone"
        )

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        steps = self._steps()
        if steps is None or steps.suspended or not torch.is_grad_enabled():
            return None
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            steps.called.add(self._layer)
        return self._viewed(args), {name: self._viewed(value) for name, value in kwargs.items()}

    def _viewed(self, value: Any) -> Any:
        # A module that overwrites its input leaves the view behind: its gradient goes unmultiplied.
        if type(value) is tuple:
            return tuple(self._viewed(item) for item in value)
        if isinstance(value, Tensor) and value.requires_grad and value.layout == torch.strided:
            value = value.view_as(value)
            value.register_hook(self._multiplied)
        return value

    def _multiplied(self, gradient: Tensor) -> Tensor | None:
        steps = self._steps()
        if steps is None or steps.suspended:
            return None
        wide = gradient.dtype in (torch.float64, torch.complex128)
        multiplier = steps.multipliers[torch.float64 if wide else torch.float32][self._layer]
        if multiplier.device != gradient.device:
            return None  # the model has moved; the next step follows it
        return reference.product(gradient, multiplier)


def _hook(model: nn.Module, plan: Plan, steps: BackwardSteps) -> list[RemovableHandle]:
    """A hook on the module of each layer, the first that owns its parameters."""
    layer_of = {id(slot.parameter): slot.layer for slot in plan.slots[: plan.measured]}
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if id(parameter) in layer_of:
                owners.setdefault(layer_of[id(parameter)], module)
    return [
        module.register_forward_pre_hook(_Hook(steps, layer), with_kwargs=True)
        for layer, module in owners.items()
        if not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
    ]


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
