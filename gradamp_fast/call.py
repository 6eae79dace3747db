"""What one step is given, and what comes of it."""

from __future__ import annotations

import enum
from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """What one step is given.

    Attributes:
        grad_scale: what the loss was multiplied by: one fp32 element on the gradients' device.
        found_inf: one fp32 element there; not 0 skips the step, which sets it to 1 itself where
            it finds a gradient that is not finite.
        unscale: whether gradients are divided by ``grad_scale``, too; else an optimizer does it.
        only: a byte for each slot of the plan, 0 for one that is left out; None leaves none out.
        walked: whether the model is known to be as it is bound, so that a gradient that went
            missing is no news.
        begins_round: whether this is the first call of its round. A step is a round of calls, one
            for each optimizer that is attached.
        decides: whether a decision that is due in this round is taken in this call.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    unscale: bool = True
    only: bytes | None = None
    walked: bool = False
    begins_round: bool = True
    decides: bool = True


class Outcome(enum.IntEnum):
    """What a backend made of a step."""

    DONE = 0
    EMPTY = 1  # no parameter has a gradient: nothing changed
    REBIND = 2  # the model has changed: walk it, then step again
    MISSING = 3  # a gradient that was there is not, for the model may have changed
