"""One line between ``backward()`` and ``optimizer.step()``."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .amplifier import Amplifier
from .attach import innermost, refuse_growth, warn_if_scale_invariant
from .model.walk import unwrap

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
        optimizer: given only to be warned if a constant factor does not move it; with
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


def reset(model: nn.Module) -> None:
    """Forgets the Amplifier that ``fused_amplify`` keeps for a model, with its options."""
    _KEPT.pop(unwrap(model), None)


def _compare(amplifier: Amplifier, given: dict[str, Any]) -> None:
    for name in amplifier.options.differing(given):
        raise ValueError(
            f"{name}={given[name]!r} differs from the first call's "
            f"{getattr(amplifier.options, name)!r}; call gradamp_fast.reset(model) to begin anew "
            "with other options"
        )
