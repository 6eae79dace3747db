"""One line between ``backward()`` and ``optimizer.step()``."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .amplifier import Amplifier
from .attach import Attachment, innermost, refuse_growth, updates_itself, warn_if_scale_invariant
from .bound_model import BoundModel
from .call import Call
from .model.walk import unwrap
from .optim import Fused

# Each model's Amplifier, and the options as they were given last.
_Kept = tuple[Amplifier, dict[str, Any]]
_KEPT: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
_WARNED: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def fused_amplify(
    model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    unscale: bool = True,
    **options: Any,
) -> Amplifier:
    """Amplifies the gradients of the layers that the options select, in place.

    Makes an ``Amplifier`` on first use, keeps it for as long as the model lives, steps it and
    returns it. A compiled or data-parallel wrapper is the same model. Options given later must
    equal those of the first call; ``gradamp_fast.reset(model)`` forgets them.

    Args:
        model: whose gradients ``backward()`` has just made.
        optimizer: one of ``gradamp_fast.optim`` amplifies in its next ``step()``, in the pass
            that updates, and gradients stay as they are; it has to hold all of the model. Another
            one is given only to be warned if a constant factor does not move it; with
            ``grow=True`` that is a ValueError.
        grad_scale, found_inf, unscale: as ``Amplifier.step`` takes them.
        **options: those of ``Options``.

    Raises ValueError for options that differ from the first call's, and if an optimizer already
    calls the model's Amplifier; else as ``Amplifier`` and ``Amplifier.step``.
    """
    model = unwrap(model)
    kept = _KEPT.get(model)
    # Asked directly: an answer that came through a call of ours would outlive a break of the graph.
    if kept is None and torch.compiler.is_compiling():
        raise RuntimeError(
            "fused_amplify cannot make its Amplifier inside torch.compile(fullgraph=True): call "
            "it once before, or make an Amplifier and call its step()"
        )
    amplifier = Amplifier(model, **options) if kept is None else kept[0]
    if kept is not None and options and options != kept[1]:
        _compare(amplifier, options)
    if optimizer is not None and updates_itself(amplifier.bound, innermost(optimizer)):
        _arm(amplifier, innermost(optimizer), Call(grad_scale, found_inf, unscale))
        _KEPT[model] = amplifier, options if kept is None else kept[1]
        return amplifier
    if amplifier.attached:
        raise ValueError(
            "the model's Amplifier is attached to an optimizer, which calls it by itself: remove "
            "this call, or the handle that attach() returned"
        )
    if optimizer is not None and amplifier.options.grow:
        refuse_growth(innermost(optimizer))
    elif optimizer is not None and optimizer not in _WARNED:
        _WARNED.add(optimizer)
        warn_if_scale_invariant(innermost(optimizer))
    amplifier.step(grad_scale, found_inf, unscale)
    if kept is None:  # only now: a first call that failed binds nobody to its options
        _KEPT[model] = amplifier, options
    return amplifier


def _attachments(bound: BoundModel, optimizer: Optimizer | None) -> list[Attachment]:
    """Those that take part in the steps of an optimizer of ``gradamp_fast.optim``."""
    given = optimizer.amplifiers if isinstance(optimizer, Fused) else ()
    return [a for a in given if isinstance(a, Attachment) and a.amplifies_for(bound)]


def _arm(amplifier: Amplifier, optimizer: Optimizer, call: Call) -> None:
    """The optimizer's next step amplifies."""
    found = _attachments(amplifier.bound, optimizer)
    attachment = found[0] if found else Attachment(amplifier.bound, optimizer, always=False)
    attachment.arm(call)


def reset(model: nn.Module) -> None:
    """Forgets the Amplifier that ``fused_amplify`` keeps for a model, with its options."""
    kept = _KEPT.pop(unwrap(model), None)
    if kept is None:
        return
    bound = kept[0].bound
    for holding in list(bound.holdings):
        for attachment in _attachments(bound, holding.optimizer):
            if not attachment.always:
                attachment.remove()


def _compare(amplifier: Amplifier, given: dict[str, Any]) -> None:
    for name in amplifier.options.differing(given):
        raise ValueError(
            f"{name}={given[name]!r} differs from the first call's "
            f"{getattr(amplifier.options, name)!r}; call gradamp_fast.reset(model) to begin anew "
            "with other options"
        )
