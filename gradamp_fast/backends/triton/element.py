# Kernels: what looks like Python here is read by triton's compiler, which has rules of its own.
# ruff: noqa: RET505, SIM300
# mypy: disable-error-code="no-untyped-def"
"""A gradient's elements: loaded, widened, rounded, stored. No fp64 for fp32, fp16 and bf16."""

from __future__ import annotations

import triton
import triton.language as tl

LANES = tl.constexpr(32)


@triton.constexpr_function
def block_of(element):
    """Elements that a program holds at a time: 32 registers for each lane of a warp."""
    return 512 if element == tl.float64 else 1024


@triton.constexpr_function
def wide_of(element):
    """What is computed in."""
    return tl.float64 if element == tl.float64 else tl.float32


@triton.jit
def widen(x, WIDE: tl.constexpr, BY_BITS: tl.constexpr):
    if BY_BITS and x.dtype == tl.bfloat16:
        word = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return word.to(tl.float32, bitcast=True)
    else:
        return x.to(WIDE)


@triton.jit
def narrow(x, ELEMENT: tl.constexpr, BY_BITS: tl.constexpr):
    """Rounds once, to nearest even. The interpreter truncates to bf16: there it is done by bits."""
    if BY_BITS and ELEMENT == tl.bfloat16:
        word = x.to(tl.uint32, bitcast=True)
        rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        half = tl.where(x == x, rounded, 0x7FC0).to(tl.uint16)
        return half.to(tl.bfloat16, bitcast=True)
    else:
        return x.to(ELEMENT)


@triton.jit
def product(x, factor, ELEMENT: tl.constexpr, BY_BITS: tl.constexpr):
    """Rounded once. In fp16 what was finite stays so: it stops at the largest number."""
    y = x * factor
    if ELEMENT == tl.float16:
        limit = tl.maximum(tl.abs(x), 65504.0)
        y = tl.where(y > limit, limit, tl.where(y < -limit, -limit, y))
    return narrow(y, ELEMENT, BY_BITS)


@triton.jit
def at(address, alignment: tl.constexpr, ELEMENT: tl.constexpr):
    """A pointer from an integer, which knows nothing of its alignment unless told."""
    return tl.multiple_of(address.to(tl.pointer_type(ELEMENT)), alignment)


@triton.jit
def load(address, offsets, aligned, ELEMENT: tl.constexpr, VECTOR: tl.constexpr):
    if aligned:
        x = tl.load(at(address, 16, ELEMENT) + offsets)
    else:
        x = tl.load(at(address, 16 // VECTOR, ELEMENT) + offsets)
    return x


@triton.jit
def store(address, offsets, x, aligned, ELEMENT: tl.constexpr, VECTOR: tl.constexpr):
    if aligned:
        tl.store(at(address, 16, ELEMENT) + offsets, x)
    else:
        tl.store(at(address, 16 // VECTOR, ELEMENT) + offsets, x)
