"""A kernel that decides and does nothing else; to be imported in the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

from gradamp_fast.backends.triton.decide import active_factor, decide


@triton.jit
def decide_kernel(values, config, scores, layers, decision, step, GROWS: tl.constexpr):
    decide(values, config, scores, layers, decision, step, active_factor(values, config, 1), GROWS)
