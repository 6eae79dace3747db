# Kernels: what looks like Python here is read by triton's compiler, which has rules of its own.
# ruff: noqa: RET505
# mypy: disable-error-code="no-untyped-def"
"""What an optimizer does with an element once its multiplier is known.

The same as reference/update.py and csrc/rules/update.h: an element is computed in fp32 (fp64 for
fp64) and rounded once, what is the same for all elements of a tensor in fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import (
    ADDRESS_BITS,
    AMSGRAD,
    BETA1,
    BETA2,
    COUNT,
    DECOUPLED,
    DTYPE_SHIFT,
    EPS,
    FIRST_STATE,
    FLOAT64,
    HYPER,
    LR,
    NESTEROV,
    PARAMETER,
    RATE,
    SECOND_STATE,
    SGD,
    SIGN,
    THIRD_STATE,
    UPDATE_WORDS,
    WEIGHT_DECAY,
)
from .element import at, load, narrow, wide_of, widen

# Tensors whose updates one program counts together.
COUNTED = tl.constexpr(256)


@triton.constexpr_function
def _run_of(element, update):
    """Elements that are updated together: of all their tensors, they have to fit in registers."""
    return (256 if element == tl.float64 else 512) // (2 if update == AMSGRAD else 1)


# ---- of a tensor ------------------------------------------------------------------------


@triton.jit
def _number(hyper, PLACE: tl.constexpr):
    return tl.load(hyper + PLACE).to(tl.float64, bitcast=True)


@triton.jit
def _learning_rate(hyper):
    rate = _number(hyper, LR)
    tagged = tl.load(hyper + RATE)
    address = tagged & ADDRESS_BITS
    if address != 0:
        if (tagged >> DTYPE_SHIFT) == FLOAT64:
            rate = tl.load(address.to(tl.pointer_type(tl.float64)))
        else:
            rate = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return rate


@triton.jit
def policy_for(table, tensor, own, common, acts, UPDATE: tl.constexpr):
    """What is done with the elements of a tensor: they are left, multiplied, or an update's.

    ``own``: what the layer is multiplied by; ``common``: what all gradients are. An update tells
    these apart; without one ``own`` is all of it. ``acts``: whether anything is updated now.
    """
    if UPDATE == 0:
        return (own,)
    else:
        row = table + tensor * UPDATE_WORDS
        hyper = table + tl.load(row + HYPER)
        steps = tl.load(tl.load(row + COUNT).to(tl.pointer_type(tl.float32))).to(tl.float64)
        if UPDATE == SGD:
            terms = _sgd_terms(hyper, own, common, steps)
        else:
            terms = _adam_terms(hyper, own, common, steps)
        places = (
            tl.load(row + PARAMETER), tl.load(row + FIRST_STATE),
            tl.load(row + SECOND_STATE), tl.load(row + THIRD_STATE),
        )  # fmt: skip
        return acts, places, tl.load(hyper + SIGN), terms


@triton.jit
def _sgd_terms(hyper, own, common, steps):
    momentum = _number(hyper, BETA1)
    return (
        common * own, _number(hyper, WEIGHT_DECAY), _learning_rate(hyper),
        momentum, 1.0 - _number(hyper, BETA2), steps == 0, tl.load(hyper + NESTEROV) != 0,
    )  # fmt: skip


@triton.jit
def _adam_terms(hyper, own, common, steps):
    beta1, beta2 = _number(hyper, BETA1), _number(hyper, BETA2)
    decay, lr = _number(hyper, WEIGHT_DECAY), _learning_rate(hyper)
    decoupled = tl.load(hyper + DECOUPLED) != 0
    corrected1 = 1.0 - tl.exp((steps + 1.0) * tl.log(beta1))
    corrected2 = tl.sqrt(1.0 - tl.exp((steps + 1.0) * tl.log(beta2)))
    return (
        common, tl.where(decoupled, 0.0, decay), tl.where(decoupled, lr * decay, 0.0),
        beta1, 1.0 - beta1, beta2, 1.0 - beta2,
        lr * own * corrected2 / corrected1, _number(hyper, EPS) * corrected2,
    )  # fmt: skip


@triton.jit
def count_updates(table, tensors):
    """Adds 1 to the count of every tensor that has one in the table, when all have read it."""
    for begin in range(0, tensors, COUNTED):
        index = begin + tl.arange(0, COUNTED)
        word = tl.load(table + index * UPDATE_WORDS + COUNT, mask=index < tensors, other=0)
        count = word.to(tl.pointer_type(tl.float32))
        tl.store(count, tl.load(count, mask=word != 0, other=0.0) + 1.0, mask=word != 0)


# ---- of an element ----------------------------------------------------------------------


@triton.jit
def _product(g, factor, sign):
    """The product, or its opposite, rounded before anything is added to it.

    So SGD equals, bit for bit, SGD on gradients that were multiplied before. The sign is a bit
    that the compiler does not know: it cannot make one operation of the product and a sum.
    """
    if g.dtype == tl.float64:
        flipped = (g * factor).to(tl.uint64, bitcast=True) ^ sign.to(tl.uint64)
    else:
        flipped = (g * factor).to(tl.uint32, bitcast=True) ^ (sign >> 32).to(tl.uint32)
    return flipped.to(g.dtype, bitcast=True)


@triton.jit
def _root(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _ratio(x, y):
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _sgd(p, g, momentum, has_momentum, sign, terms, WIDE: tl.constexpr):
    factor, decay, lr, keep, add, first, nesterov = terms
    g = _product(g, factor.to(WIDE), sign) + decay.to(WIDE) * p
    moved = keep.to(WIDE) * momentum + add.to(WIDE) * g
    momentum = tl.where(first, g, moved)
    ahead = tl.where(nesterov, g + keep.to(WIDE) * momentum, momentum)
    return p - lr.to(WIDE) * tl.where(has_momentum, ahead, g), momentum


@triton.jit
def _adam_moments(p, g, mean, square, sign, terms, WIDE: tl.constexpr):
    common, coupled, _, keep1, add1, keep2, add2, _, _ = terms
    g = _product(g, common.to(WIDE), sign) + coupled.to(WIDE) * p
    mean = keep1.to(WIDE) * mean + add1.to(WIDE) * g
    return mean, keep2.to(WIDE) * square + add2.to(WIDE) * g * g


@triton.jit
def _adam(p, mean, square, terms, WIDE: tl.constexpr):
    _, _, faded, _, _, _, _, rate, eps = terms
    p = p - faded.to(WIDE) * p
    return p - _ratio(rate.to(WIDE) * mean, _root(square) + eps.to(WIDE))


# ---- of a run of elements ---------------------------------------------------------------


@triton.jit
def _fetch(
    place, shift, offsets, mask, aligned,
    ELEMENT: tl.constexpr, BY_BITS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Past the first-level cache, which keeps the gradient; 0 where there is no such tensor."""
    mask = mask & (place != 0)
    pointer = at(place + shift, ELEMENT.primitive_bitwidth // 8, ELEMENT) + offsets
    if WHOLE:
        if aligned:
            vectors = at(place + shift, 16, ELEMENT) + offsets
            x = tl.load(vectors, mask, 0.0, cache_modifier=".cg")
        else:
            x = tl.load(pointer, mask, 0.0, cache_modifier=".cg")
    else:
        x = tl.load(pointer, mask, 0.0, cache_modifier=".cg")
    return widen(x, wide_of(ELEMENT), BY_BITS)


@triton.jit
def _put(
    place, shift, offsets, x, mask, aligned,
    ELEMENT: tl.constexpr, BY_BITS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    x, mask = narrow(x, ELEMENT, BY_BITS), mask & (place != 0)
    pointer = at(place + shift, ELEMENT.primitive_bitwidth // 8, ELEMENT) + offsets
    if WHOLE:
        if aligned:
            tl.store(at(place + shift, 16, ELEMENT) + offsets, x, mask)
        else:
            tl.store(pointer, x, mask)
    else:
        tl.store(pointer, x, mask)


@triton.jit
def update_elements(
    policy, gradient, first, begin, end,
    ELEMENT: tl.constexpr, BY_BITS: tl.constexpr, UPDATE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Updates by elements ``begin`` to ``end`` of a tile, if the policy acts.

    ``gradient``: the tile's address. ``first``: its first element in the tensor. ``WHOLE``: from
    begin to end there are whole runs.
    """
    WIDE: tl.constexpr = wide_of(ELEMENT)
    RUN: tl.constexpr = _run_of(ELEMENT, UPDATE)
    BYTES: tl.constexpr = ELEMENT.primitive_bitwidth // 8
    acts, places, sign, terms = policy
    parameter, one, two, three = places
    aligned = (parameter | one | two | three) % 16 == 0
    offsets = tl.arange(0, RUN)
    for run in range(begin, tl.where(acts, end, begin), RUN):
        here, shift = gradient + run * BYTES, (first + run) * BYTES
        if WHOLE:
            mask = parameter != 0
            g = load(here, offsets, here % 16 == 0, ELEMENT, 16 // BYTES)
        else:
            mask = offsets < end - run
            g = tl.load(at(here, BYTES, ELEMENT) + offsets, mask=mask, other=0.0)
        g = widen(g, WIDE, BY_BITS)
        p = _fetch(parameter, shift, offsets, mask, aligned, ELEMENT, BY_BITS, WHOLE)
        x = _fetch(one, shift, offsets, mask, aligned, ELEMENT, BY_BITS, WHOLE)
        if UPDATE == SGD:
            p, x = _sgd(p, g, x, one != 0, sign, terms, WIDE)
        else:
            y = _fetch(two, shift, offsets, mask, aligned, ELEMENT, BY_BITS, WHOLE)
            x, y = _adam_moments(p, g, x, y, sign, terms, WIDE)
            _put(two, shift, offsets, y, mask, aligned, ELEMENT, BY_BITS, WHOLE)
            if UPDATE == AMSGRAD:
                z = _fetch(three, shift, offsets, mask, aligned, ELEMENT, BY_BITS, WHOLE)
                z = tl.maximum(z, y, propagate_nan=tl.PropagateNan.ALL)
                _put(three, shift, offsets, z, mask, aligned, ELEMENT, BY_BITS, WHOLE)
                y = tl.where(three != 0, z, y)
            p = _adam(p, x, y, terms, WIDE)
        _put(one, shift, offsets, x, mask, aligned, ELEMENT, BY_BITS, WHOLE)
        _put(parameter, shift, offsets, p, mask, aligned, ELEMENT, BY_BITS, WHOLE)
