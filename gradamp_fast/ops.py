"""The step, or the operator that stands for it in the graphs of ``torch.compile``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import bound_model
from .bound_model import BoundModel, Mask
from .call import Call
from .model.optimizers import Holding

# Whether the code that runs is being compiled. A function around it would be compiled by itself
# where a graph breaks, and then say so ever after.
compiling = torch.compiler.is_compiling


def step(
    bound: BoundModel, call: Call, holding: Holding | None = None, mask: Mask | None = None
) -> None:
    """One step of a bound model, or the call that stands for it in a graph.

    ``holding`` and ``mask`` as ``BoundModel.step`` takes them.
    """
    if compiling():
        only = holding.only if mask is None and holding is not None else mask
        call = call if only is None else call._replace(only=only(bound.plan))
        traced_step(bound, call, None if holding is None else holding.number)
    else:
        bound.step(call, holding, mask)


def traced_step(bound: BoundModel, call: Call, holding: int | None = None) -> None:
    """The call that stands in the graph; ``holding``: its number."""
    if bound.plan.sharded:
        raise RuntimeError(
            "a step over DTensor gradients waits for other processes and cannot be compiled: call "
            "it outside of the compiled function"
        )
    state, present, left_out, gradients = bound.settled_state(), [], [], []
    for index, slot in enumerate(bound.plan.slots):
        gradient = slot.parameter.grad
        if call.only is not None and call.only[index] == 0:
            left_out.append(index)
        elif gradient is not None:
            present.append(index)
            gradients.append(gradient)
    operator(
        bound.handle, present, left_out, gradients, state.values, state.sketch, state.parity,
        call.grad_scale, call.found_inf, call.unscale, holding,
    )  # fmt: skip


@torch.library.custom_op(
    "gradamp_fast::step",
    mutates_args=("gradients", "values", "sketch", "parity", "found_inf"),
)
def operator(
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
    holding: int | None = None,
) -> None:
    """A step on what the graph holds: ``gradients`` of the slots in ``present``.

    A graph may give other tensors than the parameters' ``.grad`` and than the state's, with the
    same contents, and expects its own to be changed.
    """
    bound = bound_model.find(handle)
    if bound is None:
        raise RuntimeError("a compiled step outlived its Amplifier: keep a reference to it")
    state = bound.settled_state()
    given = (values, sketch, parity)
    own = (state.values, state.sketch, state.parity)
    copied = [(g, o) for g, o in zip(given, own, strict=True) if g.data_ptr() != o.data_ptr()]
    for theirs, ours in copied:
        ours.copy_(theirs)
    slots = bound.plan.slots
    parameters = [slots[index].parameter for index in present]
    before = [parameter.grad for parameter in parameters]
    only = bytes(index not in left_out for index in range(len(slots))) if left_out else None
    try:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        bound.step(
            Call(grad_scale, found_inf, unscale),
            next((h for h in bound.holdings if h.number == holding), None),
            lambda plan: only if plan.slots is slots else None,
        )
    finally:
        for parameter, own_gradient in zip(parameters, before, strict=True):
            parameter.grad = own_gradient
    for theirs, ours in copied:
        theirs.copy_(ours)


@operator.register_fake
def _(*arguments: object) -> None:
    return None
