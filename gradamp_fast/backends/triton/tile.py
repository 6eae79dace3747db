# Kernels: what looks like Python here is read by triton's compiler, which has rules of its own.
# ruff: noqa: SIM300
# mypy: disable-error-code="no-untyped-def"
"""One program on one tile of one gradient: measured, and written or updated by, in one read.

A program is one warp. It holds a block of elements at a time: loaded in order, looked at as
``[rows, lanes, vector]`` with a 16-byte vector of consecutive elements for each lane, so that
sums over rows and vectors stay in a lane. Element i belongs to the same lane whatever its address.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import (
    LONG,
    ROW,
    ROW_AFTER,
    ROW_BEFORE,
    ROW_COUNT,
    ROW_DOT,
    ROW_M2,
    ROW_MEAN,
    ROW_POWER,
    ROW_SUM,
    SHORT,
    SHORT_LOG2,
)
from .element import LANES, at, block_of, load, product, store, wide_of, widen
from .update import update_elements

TILE = tl.constexpr(4096)  # elements of one tensor that one program measures at a time
WIDTH = tl.constexpr(64)  # rows of sums, or layers, that one program looks at together

# Sums of squares outside this range are taken again, scaled by 2**96 up or down: below it squares
# of fp32 numbers lose digits to underflow, above it their sum may overflow.
SMALL, LARGE = tl.constexpr(1e-28), tl.constexpr(1e34)
UP, DOWN = tl.constexpr(2.0**96), tl.constexpr(2.0**-96)


# ---- moments ----------------------------------------------------------------------------


@triton.jit
def _sum_in_lane(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def _shifted_sums(x, valid, share, scale, MASKED: tl.constexpr):
    """Each lane's mean as its shift, and the sums of d = (x - shift) * scale and of d * d."""
    shift = _sum_in_lane(x) * share
    d = (x - shift[None, :, None]) * scale
    if MASKED:
        d = tl.where(valid, d, 0.0)
    return shift, _sum_in_lane(d), _sum_in_lane(d * d)


@triton.jit
def _lane_moments(x, valid, count, WIDE: tl.constexpr, MASKED: tl.constexpr):
    """Mean and sum of squared deviations of each lane's elements: fp64 [lanes]."""
    share = 1.0 / tl.maximum(count, 1.0)
    shift, d, d2 = _shifted_sums(x, valid, share.to(WIDE), 1.0, MASKED)
    mean = shift.to(tl.float64) + d.to(tl.float64) * share
    m2 = d2.to(tl.float64) - d.to(tl.float64) * d.to(tl.float64) * share
    if WIDE == tl.float32:
        squares = tl.sum(d2, axis=0)
        if not ((squares >= SMALL) & (squares <= LARGE)):
            small = squares < SMALL
            before = tl.where(small, 1.0, DOWN).to(tl.float32)
            after = tl.where(small, UP, 1.0).to(tl.float32)
            shift, d, d2 = _shifted_sums(x * before, valid, share.to(WIDE), after, MASKED)
            undo = 1.0 / (before.to(tl.float64) * after.to(tl.float64))
            mean = shift.to(tl.float64) / before.to(tl.float64) + d.to(tl.float64) * share * undo
            m2 = d2.to(tl.float64) - d.to(tl.float64) * d.to(tl.float64) * share
            m2 = m2 * undo * undo
    return mean, m2


# ---- the sketch -------------------------------------------------------------------------


@triton.jit
def murmur_finaliser(word):
    """MurmurHash3's 32-bit finaliser."""
    word = word ^ (word >> 16)
    word = word * 0x85EBCA6B
    word = word ^ (word >> 13)
    word = word * 0xC2B2AE35
    return word ^ (word >> 16)


@triton.jit
def _signed(x, first, WIDE: tl.constexpr):
    """x with its signs; ``first`` is the block's first element in the tensor."""
    ROWS: tl.constexpr = x.shape[0]
    VECTOR: tl.constexpr = x.shape[2]
    offset = (tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]) * VECTOR
    within = tl.arange(0, VECTOR)[None, None, :]
    words = (first >> 5).to(tl.uint32) + (offset >> 5).to(tl.uint32)
    bits = murmur_finaliser(words) >> (offset & 31).to(tl.uint32)
    minus = (bits[:, :, None] << (31 - within).to(tl.uint32)) & 0x80000000
    if WIDE == tl.float64:
        flipped = x.to(tl.uint64, bitcast=True) ^ (minus.to(tl.uint64) << 32)
    else:
        flipped = x.to(tl.uint32, bitcast=True) ^ minus
    return flipped.to(WIDE, bitcast=True)


@triton.jit
def _store_buckets(signed, buckets, bucket_log2, left):
    """Signed sums of the block's runs; ``left`` are the tile's elements from the block on."""
    VECTOR: tl.constexpr = signed.shape[2]
    BLOCK: tl.constexpr = signed.shape[0] * LANES * VECTOR
    RUNS: tl.constexpr = BLOCK // SHORT
    LONG_RUNS: tl.constexpr = BLOCK // LONG
    if bucket_log2 > 0:
        parts = tl.reshape(tl.sum(signed, axis=2), [RUNS, SHORT // VECTOR])
        runs = tl.sum(parts, axis=1)
        if bucket_log2 == SHORT_LOG2:
            run = tl.arange(0, RUNS)
            tl.store(buckets + run, runs.to(tl.float32), mask=run * SHORT < left)
        else:
            long_run = tl.arange(0, LONG_RUNS)
            long_runs = tl.sum(tl.reshape(runs, [LONG_RUNS, RUNS // LONG_RUNS]), axis=1)
            tl.store(buckets + long_run, long_runs.to(tl.float32), mask=long_run * LONG < left)
    else:
        offsets = tl.arange(0, BLOCK)
        single = tl.reshape(signed, [BLOCK]).to(tl.float32)
        tl.store(buckets + offsets, single, mask=offsets < left)


# ---- a tile -----------------------------------------------------------------------------


@triton.jit
def measure_elements(
    tensor_address, first, count, policy, buckets, bucket_log2, row,
    ELEMENT: tl.constexpr, BY_BITS: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """Sums of a tile's elements to ``row``, the sums of its runs to ``buckets``.

    ``first`` is the index of the tile's first element in the tensor; ``policy`` is what
    ``policy_for`` says. ``bucket_log2`` -1: no sketch. ``row`` gets the count, the tile's first
    element c, and the sums of x - c and (x - c)^2.
    """
    WIDE: tl.constexpr = wide_of(ELEMENT)
    BLOCK: tl.constexpr = block_of(ELEMENT)
    BYTES: tl.constexpr = ELEMENT.primitive_bitwidth // 8
    address = tensor_address + first * BYTES
    VECTOR: tl.constexpr = 16 // BYTES
    ROWS: tl.constexpr = BLOCK // (LANES * VECTOR)
    offsets = tl.arange(0, BLOCK)
    aligned = address % 16 == 0
    centre = widen(tl.load(at(address, BYTES, ELEMENT)), WIDE, BY_BITS).to(tl.float64)
    sums = tl.zeros([LANES], tl.float64)
    squares = tl.zeros([LANES], tl.float64)

    full = count // BLOCK * BLOCK
    for begin in range(0, full, BLOCK):
        part = address + begin * BYTES
        x = widen(load(part, offsets, aligned, ELEMENT, VECTOR), WIDE, BY_BITS)
        x = tl.reshape(x, [ROWS, LANES, VECTOR])
        lane_count = tl.full([LANES], BLOCK // LANES, tl.float64)
        mean, m2 = _lane_moments(x, x, lane_count, WIDE, False)
        sums += lane_count * (mean - centre)
        squares += m2 + lane_count * (mean - centre) * (mean - centre)
        if bucket_log2 >= 0:
            signed = _signed(x, first + begin, WIDE)
            runs = buckets + (begin >> bucket_log2)
            _store_buckets(signed, runs, bucket_log2, count - begin)
        if UPDATE == 0:
            factor = policy[0].to(WIDE)
            if factor != 1:
                y = tl.reshape(product(x, factor, ELEMENT, BY_BITS), [BLOCK])
                store(part, offsets, y, aligned, ELEMENT, VECTOR)
        else:
            update_elements(
                policy, address, first, begin, begin + BLOCK, ELEMENT, BY_BITS, UPDATE, True
            )
    if full < count:
        left = count - full
        valid = offsets < left
        pointer = at(address + full * BYTES, BYTES, ELEMENT)
        x = widen(tl.load(pointer + offsets, mask=valid, other=0.0), WIDE, BY_BITS)
        x = tl.reshape(x, [ROWS, LANES, VECTOR])
        inside = tl.reshape(valid, [ROWS, LANES, VECTOR])
        lane_count = _sum_in_lane(inside.to(tl.int32)).to(tl.float64)
        mean, m2 = _lane_moments(x, inside, lane_count, WIDE, True)
        sums += lane_count * (mean - centre)
        squares += m2 + lane_count * (mean - centre) * (mean - centre)
        if bucket_log2 >= 0:
            signed = _signed(x, first + full, WIDE)
            runs = buckets + (full >> bucket_log2)
            _store_buckets(signed, runs, bucket_log2, left)
        if UPDATE == 0:
            factor = policy[0].to(WIDE)
            if factor != 1:
                y = tl.reshape(product(x, factor, ELEMENT, BY_BITS), [BLOCK])
                tl.store(pointer + offsets, y, mask=valid)
        else:
            update_elements(policy, address, first, full, count, ELEMENT, BY_BITS, UPDATE, False)

    tl.store(row + ROW_COUNT, count.to(tl.float64))
    tl.store(row + ROW_MEAN, centre)
    tl.store(row + ROW_SUM, tl.sum(sums, axis=0))
    tl.store(row + ROW_M2, tl.sum(squares, axis=0))


@triton.jit
def write_elements(
    tensor_address, first, count, policy,
    ELEMENT: tl.constexpr, BY_BITS: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """Does with a tile's elements what the policy says, without measuring them."""
    WIDE: tl.constexpr = wide_of(ELEMENT)
    BLOCK: tl.constexpr = block_of(ELEMENT)
    BYTES: tl.constexpr = ELEMENT.primitive_bitwidth // 8
    address = tensor_address + first * BYTES
    VECTOR: tl.constexpr = 16 // BYTES
    full = count // BLOCK * BLOCK
    if UPDATE == 0:
        offsets = tl.arange(0, BLOCK)
        aligned = address % 16 == 0
        factor = policy[0].to(WIDE)
        if factor != 1:
            for begin in range(0, full, BLOCK):
                part = address + begin * BYTES
                x = widen(load(part, offsets, aligned, ELEMENT, VECTOR), WIDE, BY_BITS)
                y = product(x, factor, ELEMENT, BY_BITS)
                store(part, offsets, y, aligned, ELEMENT, VECTOR)
            if full < count:
                valid = offsets < count - full
                pointer = at(address + full * BYTES, BYTES, ELEMENT)
                x = widen(tl.load(pointer + offsets, mask=valid, other=0.0), WIDE, BY_BITS)
                tl.store(pointer + offsets, product(x, factor, ELEMENT, BY_BITS), mask=valid)
    else:
        update_elements(policy, address, first, 0, full, ELEMENT, BY_BITS, UPDATE, True)
        update_elements(policy, address, first, full, count, ELEMENT, BY_BITS, UPDATE, False)


@triton.jit
def fold_buckets(before, after, count, inverse, weight, row, WIDTH: tl.constexpr):
    """Folds this step's bucket sums into the running means, in place of the sums.

    ``after`` holds the sums s, before ``inverse``, and gets the means h + weight * (s - h), h
    being those in ``before``. ``row`` gets the sums of s^2, s h, h^2 and of the squared new means.
    """
    power = tl.full([], 0.0, tl.float64)
    dot = tl.full([], 0.0, tl.float64)
    old = tl.full([], 0.0, tl.float64)
    new = tl.full([], 0.0, tl.float64)
    for begin in range(0, count, WIDTH):
        index = begin + tl.arange(0, WIDTH)
        mask = index < count
        s = tl.load(after + index, mask=mask, other=0.0).to(tl.float64) * inverse
        s = s.to(tl.float32).to(tl.float64)
        h = tl.load(before + index, mask=mask, other=0.0).to(tl.float64)
        mean = (h + weight * (s - h)).to(tl.float32)
        tl.store(after + index, mean, mask=mask)
        mean = mean.to(tl.float64)
        power += tl.sum(s * s, axis=0)
        dot += tl.sum(s * h, axis=0)
        old += tl.sum(h * h, axis=0)
        new += tl.sum(mean * mean, axis=0)
    tl.store(row + ROW_POWER, power)
    tl.store(row + ROW_DOT, dot)
    tl.store(row + ROW_BEFORE, old)
    tl.store(row + ROW_AFTER, new)


# ---- several tiles ----------------------------------------------------------------------


@triton.jit
def total(rows, count):
    """Moments and sketch sums of ``count`` rows, in a fixed order; a row of count 0 is none.

    Rows were written by other programs: they are read past the first-level cache.
    """
    n = tl.zeros([WIDTH], tl.float64)
    mean = tl.zeros([WIDTH], tl.float64)
    m2 = tl.zeros([WIDTH], tl.float64)
    power = tl.zeros([WIDTH], tl.float64)
    dot = tl.zeros([WIDTH], tl.float64)
    old = tl.zeros([WIDTH], tl.float64)
    new = tl.zeros([WIDTH], tl.float64)
    for begin in range(0, count, WIDTH):
        index = begin + tl.arange(0, WIDTH)
        inside = index < count
        row = rows + index * ROW
        row_n = tl.load(row + ROW_COUNT, mask=inside, other=0.0, cache_modifier=".cg")
        share = 1.0 / tl.maximum(row_n, 1.0)
        d = tl.load(row + ROW_SUM, mask=inside, other=0.0, cache_modifier=".cg")
        row_mean = tl.load(row + ROW_MEAN, mask=inside, other=0.0, cache_modifier=".cg") + d * share
        row_m2 = tl.load(row + ROW_M2, mask=inside, other=0.0, cache_modifier=".cg") - d * d * share
        delta = row_mean - mean
        part = row_n / tl.maximum(n + row_n, 1.0)
        mean += delta * part
        m2 += tl.where(row_m2 < 0, 0.0, row_m2) + delta * delta * n * part
        n += row_n
        power += tl.load(row + ROW_POWER, mask=inside, other=0.0, cache_modifier=".cg")
        dot += tl.load(row + ROW_DOT, mask=inside, other=0.0, cache_modifier=".cg")
        old += tl.load(row + ROW_BEFORE, mask=inside, other=0.0, cache_modifier=".cg")
        new += tl.load(row + ROW_AFTER, mask=inside, other=0.0, cache_modifier=".cg")
    count_of_all = tl.sum(n, axis=0)
    mean_of_all = tl.sum(n * mean, axis=0) / tl.maximum(count_of_all, 1.0)
    delta = mean - mean_of_all
    m2_of_all = tl.sum(m2 + n * delta * delta, axis=0)
    return (
        count_of_all, mean_of_all, m2_of_all,
        tl.sum(power, axis=0), tl.sum(dot, axis=0), tl.sum(old, axis=0), tl.sum(new, axis=0),
    )  # fmt: skip


@triton.jit
def store_total(row, n, mean, m2, power, dot, old, new):
    tl.store(row + ROW_COUNT, n)
    tl.store(row + ROW_MEAN, mean)
    tl.store(row + ROW_SUM, n * 0.0)
    tl.store(row + ROW_M2, m2)
    tl.store(row + ROW_POWER, power)
    tl.store(row + ROW_DOT, dot)
    tl.store(row + ROW_BEFORE, old)
    tl.store(row + ROW_AFTER, new)
