"""The step as an operator, which ``torch.compile`` keeps in its graphs."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .call import Call

if TYPE_CHECKING:
    from .amplifier import Amplifier

_AMPLIFIERS: weakref.WeakValueDictionary[int, Amplifier] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


def register(amplifier: Amplifier) -> int:
    """A number that names the amplifier in a graph for as long as it lives."""
    handle = next(_HANDLES)
    _AMPLIFIERS[handle] = amplifier
    return handle


def traced_step(amplifier: Amplifier, call: Call) -> None:
    """The call that stands in the graph."""
    only = call.only
    if amplifier._plan.sharded:
        raise RuntimeError(
            "a step over DTensor gradients waits for other processes and cannot be compiled: call "
            "it outside of the compiled function"
        )
    state, present, left_out, gradients = amplifier._state, [], [], []
    for index, slot in enumerate(amplifier._plan.slots):
        gradient = slot.parameter.grad
        if only is not None and only[index] == 0:
            left_out.append(index)
        elif gradient is not None:
            present.append(index)
            gradients.append(gradient)
    step(
        amplifier._handle, present, left_out, gradients, state.values, state.sketch, state.parity,
        call.grad_scale, call.found_inf, call.unscale,
    )  # fmt: skip


@torch.library.custom_op(
    "gradamp_fast::step",
    mutates_args=("gradients", "values", "sketch", "parity", "found_inf"),
)
def step(
    handle: int,
    present: list[int],
    left_out: list[int],
    gradients: list[Tensor],
    values: Tensor,
    sketch: Tensor,
    parity: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    unscale: bool,
) -> None:
    """``Amplifier.step`` on what the graph holds: ``gradients`` of the slots in ``present``.

    A graph may give other tensors than the parameters' ``.grad`` and than the state's, with the
    same contents, and expects its own to be changed.
    """
    amplifier = _AMPLIFIERS.get(handle)
    if amplifier is None:
        raise RuntimeError("a compiled step outlived its Amplifier: keep a reference to it")
    state = amplifier._state
    given = (values, sketch, parity)
    own = (state.values, state.sketch, state.parity)
    copied = [(g, o) for g, o in zip(given, own, strict=True) if g.data_ptr() != o.data_ptr()]
    for theirs, ours in copied:
        ours.copy_(theirs)
    slots = amplifier._plan.slots
    parameters = [slots[index].parameter for index in present]
    before = [parameter.grad for parameter in parameters]
    mask = bytes(index not in left_out for index in range(len(slots))) if left_out else None
    try:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        amplifier._step(
            Call(grad_scale, found_inf, unscale),
            lambda plan: mask if plan.slots is slots else None,
        )
    finally:
        for parameter, own_gradient in zip(parameters, before, strict=True):
            parameter.grad = own_gradient
    for theirs, ours in copied:
        theirs.copy_(ours)


@step.register_fake
def _(*arguments: object) -> None:
    return None
