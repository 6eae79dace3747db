# Kernels: what looks like Python here is read by triton's compiler, which has rules of its own.
# mypy: disable-error-code="no-untyped-def"
"""Growth: layers grow at decisions or settle, and a surge takes back what they came to.

The same as in reference/decide.py and csrc/rules/decide.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import reference
from .columns import (
    AGREEMENT,
    CONFIG_MAX_FACTOR,
    FIELDS,
    GATED,
    GLOBALS,
    LAYER_FACTOR,
    LEAST_VARIANCE,
    MEMBER_NUMEL,
    ON_UPDATE,
    SELECTED,
    SETTLED,
    VARIANCE,
)
from .tile import WIDTH

LOW, SURGE, EARLY = (
    tl.constexpr(number) for number in (reference.LOW, reference.SURGE, reference.EARLY)
)


@triton.jit
def grown(own, variance, least):
    """What growth came to, less what a surge takes back."""
    braked = tl.maximum(own * tl.sqrt(least * SURGE / variance), 1.0)
    return tl.where(variance > least * SURGE, braked, own)


@triton.jit
def _comparable(state, variance, mask):
    """The variance, infinite where there is none to compare to: 0, or of an optimizer's update.

    A surge of the gradients does not enlarge such an update.
    """
    on_update = tl.load(state + ON_UPDATE, mask=mask, other=0.0)
    return tl.where((variance > 0) & (on_update == 0), variance, float("inf"))


@triton.jit
def keep_least(state, present, steps, variance, min_steps):
    """After a step: the least variance of each layer that is ``present``."""
    least = tl.load(state + LEAST_VARIANCE, mask=present, other=0.0)
    comparable = _comparable(state, variance, present)
    less = present & (steps * EARLY >= min_steps) & (comparable < least)
    tl.store(state + LEAST_VARIANCE, comparable, mask=less)


@triton.jit
def _is_low(values, scores, layers):
    """Whether the mean direction of the eligible layers, by elements, says so."""
    elements = tl.zeros([WIDTH], tl.float64)
    direction = tl.zeros([WIDTH], tl.float64)
    for begin in range(0, layers, WIDTH):
        index = begin + tl.arange(0, WIDTH)
        score = tl.load(scores + index, mask=index < layers, other=float("nan"))
        eligible = score == score
        state = values + GLOBALS + index * FIELDS
        numel = tl.load(state + MEMBER_NUMEL, mask=eligible, other=0.0)
        elements += numel
        direction += numel * tl.load(state + AGREEMENT, mask=eligible, other=0.0)
    total = tl.sum(elements, axis=0)
    return tl.sum(direction, axis=0) / tl.where(total > 0, total, 1.0) > LOW


@triton.jit
def grow(values, config, scores, layers, factor):
    """Layers grow by ``factor``, or settle for good. Scores that are not NaN are eligible."""
    first = tl.load(values + GATED) == 0
    low = _is_low(values, scores, layers) | (first == 0)
    # What grew last was too much; before the first decision nothing has grown.
    taken_back = tl.where(first, 1.0, factor)
    most = tl.load(config + CONFIG_MAX_FACTOR)
    any_eligible = tl.full([], 0, tl.int32)
    for begin in range(0, layers, WIDTH):
        index = begin + tl.arange(0, WIDTH)
        score = tl.load(scores + index, mask=index < layers, other=float("nan"))
        eligible = score == score
        any_eligible += tl.sum(eligible.to(tl.int32), axis=0)
        state = values + GLOBALS + index * FIELDS
        free = eligible & (tl.load(state + SETTLED, mask=eligible, other=1.0) == 0)
        own = tl.load(state + LAYER_FACTOR, mask=free, other=1.0)
        variance = tl.load(state + VARIANCE, mask=free, other=1.0)
        least = tl.load(state + LEAST_VARIANCE, mask=free, other=1.0)
        selected = tl.load(state + SELECTED, mask=free, other=0.0)
        settles = free & (tl.where(low, selected, 0.0) == 0)
        left = tl.maximum(grown(own, variance, least) / taken_back, 1.0)
        larger = tl.where(variance > least * SURGE, own, tl.minimum(own * factor, most))
        tl.store(state + LAYER_FACTOR, tl.where(settles, left, larger), mask=free)
        tl.store(state + SETTLED, 1.0, mask=settles)
        tl.store(state + LEAST_VARIANCE, _comparable(state, variance, settles), mask=settles)
    if any_eligible > 0:
        tl.store(values + GATED, 1.0)
