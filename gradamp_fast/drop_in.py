"""One line between ``backward()`` and ``optimizer.step()``."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .amplifier import Amplifier
from .attach import warn_if_scale_invariant
from .layers import unwrap
from .options import Options

_AMPLIFIERS: weakref.WeakKeyDictionary[nn.Module, Amplifier] = weakref.WeakKeyDictionary()
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
        optimizer: given only to be warned if a constant factor does not move it.
        grad_scale, found_inf, unscale: as ``Amplifier.step`` takes them.
        **options: those of ``Options``.

    Raises ValueError for options that differ from the first call's, and if an optimizer already
    calls the model's Amplifier; else as ``Amplifier`` and ``Amplifier.step``.
    """
    model = unwrap(model)
    amplifier = _AMPLIFIERS.get(model)
    if amplifier is None:
        amplifier = _AMPLIFIERS[model] = Amplifier(model, **options)
    elif options:
        _compare(amplifier.options, options)
    if amplifier._attachments and amplifier.attached:
        raise ValueError(
            "the model's Amplifier is attached to an optimizer, which calls it by itself: remove "
            "this call, or the handle that attach() returned"
        )
    if optimizer is not None and optimizer not in _WARNED:
        _WARNED.add(optimizer)
        warn_if_scale_invariant(optimizer)
    amplifier.step(grad_scale, found_inf, unscale)
    return amplifier


def reset(model: nn.Module) -> None:
    """Forgets the Amplifier that ``fused_amplify`` keeps for a model, with its options."""
    _AMPLIFIERS.pop(unwrap(model), None)


def _compare(first: Options, given: dict[str, Any]) -> None:
    later = Options.make({**first.to_dict(), "schedule": first.schedule, **given})
    for name in given:
        was, is_now = getattr(first, name), getattr(later, name)
        if was != is_now:
            raise ValueError(
                f"{name}={given[name]!r} differs from the first call's {was!r}; call "
                "gradamp_fast.reset(model) to begin anew with other options"
            )
