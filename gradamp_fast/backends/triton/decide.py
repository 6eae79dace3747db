# Kernels: what looks like Python here is read by triton's compiler, which has rules of its own.
# ruff: noqa: SIM102
# mypy: disable-error-code="no-untyped-def"
"""The rules about whole layers: totals, state update, score, threshold, selection, multiplier.

The same as reference/decide.py and csrc/rules/decide.h, in fp64, by one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import (
    AGREEMENT,
    ALWAYS,
    AMPLIFIED_STEPS,
    BELOW,
    BY_EPOCH,
    CHANGED_AT,
    CONFIG_DECAY,
    CONFIG_EXACT,
    CONFIG_MATCH_NORM,
    CONFIG_MAX_NORM,
    CONFIG_MEASURE,
    CONFIG_MIN_STEPS,
    CONFIG_NEEDS_NORM,
    CONFIG_REFRESH,
    CONFIG_SEED,
    CONFIG_SELECT,
    CONFIG_THRESHOLD,
    CONFIG_UNIT,
    CONFIG_VALUE,
    CONFIG_WINDOWS,
    DIRECTION,
    EPOCH,
    FACTOR,
    FIELDS,
    FLUCTUATION,
    GLOBALS,
    LAYER_FACTOR,
    LEAST_VARIANCE,
    MEAN_POWER,
    MEMBER_NUMEL,
    NOISE,
    NUMBER,
    ON_UPDATE,
    POWER,
    QUANTILE,
    RISING,
    ROUND_SKIPPED,
    ROW,
    ROW_AFTER,
    ROW_BEFORE,
    ROW_COUNT,
    ROW_DOT,
    ROW_M2,
    ROW_MEAN,
    ROW_MULTIPLIER,
    ROW_POWER,
    SELECTED,
    SKIPPED_STEPS,
    STD,
    STEP,
    STEPS,
    THRESHOLD,
    TOTAL_NORM,
    VARIANCE,
    VARIANCE_OF_ELEMENTS,
    WEIGHT_SUM,
)
from .grow import grow, grown, keep_least
from .tile import WIDTH, murmur_finaliser

MAX_NUMBER = tl.constexpr(1.7976931348623157e308)


@triton.jit
def is_finite(x):
    return tl.abs(x) <= MAX_NUMBER


# ---- rounds -----------------------------------------------------------------------------


@triton.jit
def step_number(values, begins_round):
    """The number of the step under way, from 0, before its first call or its last is committed."""
    return tl.load(values + STEP) - tl.where(begins_round != 0, 0.0, 1.0)


@triton.jit
def _begin_round(values, begins_round):
    if begins_round != 0:
        tl.store(values + STEP, tl.load(values + STEP) + 1.0)
        tl.store(values + ROUND_SKIPPED, 0.0)


@triton.jit
def skip_call(values, config, begins_round):
    """What a call leaves behind that is skipped: the round is, once."""
    before = tl.load(values + ROUND_SKIPPED)
    first = (begins_round != 0) | (before == 0)
    _begin_round(values, begins_round)
    skipped = tl.load(values + SKIPPED_STEPS)
    tl.store(values + SKIPPED_STEPS, tl.where(first, skipped + 1.0, skipped))
    tl.debug_barrier()
    tl.store(values + ROUND_SKIPPED, 1.0)
    if needs_norm(config):
        tl.store(values + TOTAL_NORM, float("nan"))


# ---- schedule and multiplier ------------------------------------------------------------


@triton.jit
def active_factor(values, config, begins_round):
    """What selected layers are multiplied by in this step, or grow by: 1 outside all windows."""
    factor = tl.load(values + FACTOR)
    unit = tl.load(config + CONFIG_UNIT)
    active = factor
    if unit != ALWAYS:
        now = tl.where(unit == BY_EPOCH, tl.load(values + EPOCH), step_number(values, begins_round))
        active = factor * 0.0 + 1.0
        for i in range(tl.load(config + CONFIG_WINDOWS).to(tl.int32)):
            window = config + CONFIG_WINDOWS + 1 + i * 3
            own = tl.load(window + 2)
            own = tl.where(is_finite(own), own, factor)
            inside = (tl.load(window) <= now) & (now < tl.load(window + 1))
            active = tl.where(inside, own, active)
    return active


@triton.jit
def amplification(values, layer, inside, factor, GROWS: tl.constexpr):
    """What a layer's gradients are multiplied by as its state stands; 1 unless ``inside``."""
    state = values + GLOBALS + layer * FIELDS
    if GROWS:
        own = tl.load(state + LAYER_FACTOR, mask=inside, other=1.0)
        variance = tl.load(state + VARIANCE, mask=inside, other=1.0)
        least = tl.load(state + LEAST_VARIANCE, mask=inside, other=1.0)
        multiplier = tl.where(factor != 1, grown(own, variance, least), 1.0)
    else:
        selected = tl.load(state + SELECTED, mask=inside, other=0.0)
        multiplier = tl.where(selected != 0, factor, 1.0)
    return multiplier


@triton.jit
def needs_norm(config):
    return tl.load(config + CONFIG_NEEDS_NORM) != 0


@triton.jit
def next_weight(values, layer, config):
    """Weight of this step in the running means of a layer."""
    weight_sum = tl.load(values + GLOBALS + layer * FIELDS + WEIGHT_SUM)
    return 1.0 / (1.0 + tl.load(config + CONFIG_DECAY) * weight_sum)


# ---- score and threshold ----------------------------------------------------------------


@triton.jit
def _drawn(seed, decision, layer):
    """A number in (0, 1) for each decision and layer, from counters alone."""
    stream = murmur_finaliser(murmur_finaliser(seed.to(tl.uint32)) ^ decision.to(tl.uint32))
    bits = murmur_finaliser(stream ^ layer.to(tl.uint32))
    return (bits.to(tl.float64) + 0.5) / 4294967296.0


@triton.jit
def _store_scores(values, config, scores, layers, decision):
    """Scores of eligible layers, NaN elsewhere."""
    measure = tl.load(config + CONFIG_MEASURE)
    min_steps = tl.load(config + CONFIG_MIN_STEPS)
    for begin in range(0, layers, WIDTH):
        index = begin + tl.arange(0, WIDTH)
        inside = index < layers
        state = values + GLOBALS + index * FIELDS
        k = tl.load(state + STEPS, mask=inside, other=0.0)
        if measure == FLUCTUATION:
            noise = tl.load(state + NOISE, mask=inside, other=1.0)
            score = tl.log(noise / tl.load(state + MEAN_POWER, mask=inside, other=1.0))
        elif measure == DIRECTION:
            score = -tl.load(state + AGREEMENT, mask=inside, other=0.0)
        elif measure == VARIANCE_OF_ELEMENTS:
            score = tl.log(tl.load(state + VARIANCE, mask=inside, other=1.0))
        else:
            score = _drawn(tl.load(config + CONFIG_SEED).to(tl.int64), decision, index)
        of_two_steps = (measure == FLUCTUATION) | (measure == DIRECTION)
        least = tl.maximum(tl.where(of_two_steps, 2.0, 1.0), min_steps)
        score = tl.where((k >= least) & is_finite(score), score, float("nan"))
        tl.store(scores + index, score, mask=inside)


@triton.jit
def _scores_at(scores, begin, layers):
    index = begin + tl.arange(0, WIDTH)
    return tl.load(scores + index, mask=index < layers, other=float("nan"))


@triton.jit
def _kth_smallest(scores, layers, k):
    """The k-th smallest (from 0) finite score: binary search over the bits of the answer."""
    answer = tl.full([], -(2**63), tl.int64)
    for i in range(64):
        candidate = answer + (tl.full([], 1, tl.int64) << (63 - i))
        below = tl.full([], 0, tl.int32)
        for begin in range(0, layers, WIDTH):
            score = _scores_at(scores, begin, layers)
            bits = score.to(tl.int64, bitcast=True)
            key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)  # of the same order as the scores
            below += tl.sum(((score == score) & (key < candidate)).to(tl.int32), axis=0)
        answer = tl.where(below <= k, candidate, answer)
    return (answer ^ ((answer >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)


@triton.jit
def _next_above(scores, layers, low, k):
    """The (k + 1)-th smallest score, ``low`` being the k-th."""
    up_to_low = tl.full([], 0, tl.int32)
    above = tl.full([WIDTH], MAX_NUMBER, tl.float64)
    for begin in range(0, layers, WIDTH):
        score = _scores_at(scores, begin, layers)
        up_to_low += tl.sum((score <= low).to(tl.int32), axis=0)
        above = tl.where(score > low, tl.minimum(above, score), above)
    return tl.where(up_to_low > k + 1, low, tl.min(above, axis=0))


@triton.jit
def _threshold(config, scores, layers):
    """tau over the scores that are not NaN; NaN if there are none."""
    kind = tl.load(config + CONFIG_THRESHOLD)
    value = tl.load(config + CONFIG_VALUE)
    count = tl.full([], 0, tl.int32)
    sums = tl.zeros([WIDTH], tl.float64)
    for begin in range(0, layers, WIDTH):
        score = _scores_at(scores, begin, layers)
        count += tl.sum((score == score).to(tl.int32), axis=0)
        sums += tl.where(score == score, score, 0.0)
    mean = tl.sum(sums, axis=0) / tl.maximum(count, 1).to(tl.float64)
    tau = mean
    if kind == STD:
        squares = tl.zeros([WIDTH], tl.float64)
        for begin in range(0, layers, WIDTH):
            score = _scores_at(scores, begin, layers)
            squares += tl.where(score == score, (score - mean) * (score - mean), 0.0)
        spread = tl.sqrt(tl.sum(squares, axis=0) / tl.maximum(count, 1).to(tl.float64)) * value
        tau = tl.where(tl.load(config + CONFIG_SELECT) == BELOW, mean - spread, mean + spread)
    elif kind == QUANTILE:
        position = value * tl.maximum(count - 1, 0).to(tl.float64)
        lower = position.to(tl.int32)
        tau = _kth_smallest(scores, layers, lower)
        if lower + 1 < count:
            high = _next_above(scores, layers, tau, lower)
            tau += (position - lower.to(tl.float64)) * (high - tau)
    tau = tl.where(count > 0, tau, float("nan"))
    return tl.where(kind == NUMBER, value, tau)


@triton.jit
def decide(values, config, scores, layers, decision, step, factor, GROWS: tl.constexpr):
    """Chooses anew, in ``step``, which layers are amplified; ``decision`` numbers the draws.

    With growth also by how much; ``factor`` is ``active_factor``.
    """
    _store_scores(values, config, scores, layers, decision)
    tl.debug_barrier()
    tau = _threshold(config, scores, layers)
    below = tl.load(config + CONFIG_SELECT) == BELOW
    for begin in range(0, layers, WIDTH):
        index = begin + tl.arange(0, WIDTH)
        inside = index < layers
        score = _scores_at(scores, begin, layers)
        chosen = tl.where(below, score < tau, score > tau).to(tl.float64)
        state = values + GLOBALS + index * FIELDS
        changed = inside & (chosen != tl.load(state + SELECTED, mask=inside, other=0.0))
        tl.store(state + CHANGED_AT, tl.where(inside, step, 0.0), mask=changed)
        tl.store(state + SELECTED, chosen, mask=changed)
    tl.store(values + THRESHOLD, tau)
    if GROWS:
        if (factor != 1) & (tl.load(values + RISING) == 0):
            tl.debug_barrier()
            grow(values, config, scores, layers, factor)


# ---- commit -----------------------------------------------------------------------------


@triton.jit
def is_measured(values, layer_rows, layer, inside):
    """Whether all members of a layer have a gradient in this step: by their elements."""
    n = tl.load(layer_rows + layer * ROW + ROW_COUNT, mask=inside, other=0.0, cache_modifier=".cg")
    state = values + GLOBALS + layer * FIELDS
    members = tl.load(state + MEMBER_NUMEL, mask=inside, other=0.0)
    return (n > 0) & ((members == 0) | (tl.abs(n - members) < 0.5))


@triton.jit
def _update_layers(values, config, layer_rows, layers, GROWS: tl.constexpr):
    decay = tl.load(config + CONFIG_DECAY)
    min_steps = tl.load(config + CONFIG_MIN_STEPS)
    for begin in range(0, layers, WIDTH):
        index = begin + tl.arange(0, WIDTH)
        row = layer_rows + index * ROW
        here = is_measured(values, layer_rows, index, index < layers)
        n = tl.load(row + ROW_COUNT, mask=here, other=0.0, cache_modifier=".cg")
        state = values + GLOBALS + index * FIELDS
        k = tl.load(state + STEPS, mask=here, other=0.0)
        weight_sum = tl.load(state + WEIGHT_SUM, mask=here, other=0.0)
        weight = 1.0 / (1.0 + decay * weight_sum)
        keep = 1.0 - weight
        tl.store(state + STEPS, k + 1.0, mask=here)
        tl.store(state + WEIGHT_SUM, 1.0 + decay * weight_sum, mask=here)

        power = tl.load(row + ROW_POWER, mask=here, other=0.0, cache_modifier=".cg")
        dot = tl.load(row + ROW_DOT, mask=here, other=0.0, cache_modifier=".cg")
        old = tl.load(row + ROW_BEFORE, mask=here, other=0.0, cache_modifier=".cg")
        root = tl.sqrt(power) * tl.sqrt(old)
        agreement = tl.load(state + AGREEMENT, mask=here, other=0.0)
        now = tl.where(root > 0, dot / tl.where(root > 0, root, 1.0), 0.0)
        moved = agreement + (now - agreement) / tl.where(k >= 1, weight_sum, 1.0)
        tl.store(state + AGREEMENT, tl.where(k >= 1, moved, agreement), mask=here)

        v = tl.load(row + ROW_M2, mask=here, other=0.0, cache_modifier=".cg") / tl.maximum(n, 1.0)
        variance = tl.load(state + VARIANCE, mask=here, other=0.0)
        variance += weight * (v - variance)
        tl.store(state + VARIANCE, variance, mask=here)
        if GROWS:
            keep_least(state, here, k + 1.0, variance, min_steps)
        running = tl.load(state + POWER, mask=here, other=0.0)
        tl.store(state + POWER, running + weight * (power - running), mask=here)
        new = tl.load(row + ROW_AFTER, mask=here, other=0.0, cache_modifier=".cg")
        tl.store(state + MEAN_POWER, new, mask=here)
        noise = tl.load(state + NOISE, mask=here, other=0.0)
        noise = keep * keep * noise + weight * weight * power
        tl.store(state + NOISE, noise, mask=here)
        fresh = here & (tl.load(state + MEMBER_NUMEL, mask=here, other=1.0) == 0)
        tl.store(state + MEMBER_NUMEL, n, mask=fresh)


@triton.jit
def _amplify(values, layer_rows, layers, factor, GROWS: tl.constexpr):
    """Notes what each layer is multiplied by in this step; row ``layers`` is the excluded's."""
    for begin in range(0, layers + 1, WIDTH):
        index = begin + tl.arange(0, WIDTH)
        state = values + GLOBALS + index * FIELDS
        multiplier = amplification(values, index, index < layers, factor, GROWS)
        row = layer_rows + index * ROW
        tl.store(row + ROW_MULTIPLIER, multiplier, mask=index <= layers)
        counts = is_measured(values, layer_rows, index, index < layers) & (multiplier != 1)
        times = tl.load(state + AMPLIFIED_STEPS, mask=counts, other=0.0)
        tl.store(state + AMPLIFIED_STEPS, times + 1.0, mask=counts)


@triton.jit
def commit(
    values, config, layer_rows, scores, layers, factor, begins_round, decides, GROWS: tl.constexpr
):
    """Folds a call's sums, all finite, into the state, and decides where that is due.

    A layer that lacks a member's gradient passes by.
    """
    exact = tl.load(config + CONFIG_EXACT) != 0
    if not exact:
        _amplify(values, layer_rows, layers, factor, GROWS)
    _update_layers(values, config, layer_rows, layers, GROWS)
    tl.debug_barrier()
    refresh = tl.load(config + CONFIG_REFRESH).to(tl.int64)
    step = step_number(values, begins_round)
    counted = (step - tl.load(values + SKIPPED_STEPS)).to(tl.int64) + 1
    skipped = (begins_round == 0) & (tl.load(values + ROUND_SKIPPED) != 0)
    if (refresh > 0) & (decides != 0) & (not skipped):
        if counted % refresh == 0:
            decide(values, config, scores, layers, counted // refresh, step, factor, GROWS)
            tl.debug_barrier()
    if exact:
        _amplify(values, layer_rows, layers, factor, GROWS)
    _begin_round(values, begins_round)


@triton.jit
def apply_norm(values, config, layer_rows, layers):
    """Stores the global norm; returns what every gradient is multiplied by on top.

    Row ``layers`` holds the excluded parameters. A NaN norm gives NaN, as
    ``torch.nn.utils.clip_grad_norm_`` does.
    """
    before = tl.zeros([WIDTH], tl.float64)
    after = tl.zeros([WIDTH], tl.float64)
    for begin in range(0, layers + 1, WIDTH):
        index = begin + tl.arange(0, WIDTH)
        inside = index <= layers
        row = layer_rows + index * ROW
        n = tl.load(row + ROW_COUNT, mask=inside, other=0.0, cache_modifier=".cg")
        mean = tl.load(row + ROW_MEAN, mask=inside, other=0.0, cache_modifier=".cg")
        m2 = tl.load(row + ROW_M2, mask=inside, other=0.0, cache_modifier=".cg")
        multiplier = tl.load(row + ROW_MULTIPLIER, mask=inside, other=1.0)
        # Gradients of layers whose optimizer's updates are multiplied are not amplified.
        on_update = tl.load(
            values + GLOBALS + index * FIELDS + ON_UPDATE, mask=index < layers, other=0.0
        )
        multiplier = tl.where(on_update != 0, 1.0, multiplier)
        squares = m2 + n * mean * mean
        before += squares
        after += multiplier * multiplier * squares
    power_before, power_after = tl.sum(before, axis=0), tl.sum(after, axis=0)
    max_norm = tl.load(config + CONFIG_MAX_NORM)
    if tl.load(config + CONFIG_MATCH_NORM) != 0:
        tl.store(values + TOTAL_NORM, tl.sqrt(power_before))
        some = power_after > 0
        coefficient = tl.where(some, tl.sqrt(power_before / tl.where(some, power_after, 1.0)), 1.0)
    else:
        norm = tl.sqrt(power_after)
        tl.store(values + TOTAL_NORM, norm)
        coefficient = max_norm / (norm + 1e-6)
        coefficient = tl.where(coefficient > 1.0, 1.0, coefficient)
    return coefficient
