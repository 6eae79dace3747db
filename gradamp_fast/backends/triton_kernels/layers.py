# Kernels: what looks like Python here is read by triton's compiler, which has rules of its own.
# ruff: noqa: SIM102
# mypy: disable-error-code="no-untyped-def"
"""The rules of a step that concern whole layers: totals, state update, threshold, selection.

The same rules as csrc/rules/decide.h; the state's columns are those of csrc/rules/state.h and of
state.py. All in fp64, by one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import murmur_finaliser

# Columns of a row of sums: count, centre, two sums about it, the sketch's four. In the row of a
# layer the third holds what the layer is multiplied by in this step.
ROW, MULTIPLIER = tl.constexpr(8), tl.constexpr(2)
WIDTH = tl.constexpr(64)  # rows or layers at a time

# Fields of the state: see state.py.
GLOBALS, FIELDS = tl.constexpr(8), tl.constexpr(10)
STEP, SKIPPED, EPOCH, TAU, FACTOR, NORM = (tl.constexpr(i) for i in range(6))
K, WEIGHT_SUM, VARIANCE, POWER, MEAN_POWER = (tl.constexpr(i) for i in range(5))
NOISE, AGREEMENT, SELECTED, AMPLIFIED, CHANGED_AT = (tl.constexpr(i) for i in range(5, 10))

# Entries of the configuration, in the order in which configuration() in triton.py lists them.
MEASURE, THRESHOLD, SELECT, UNIT, EXACT, MATCH_NORM = (tl.constexpr(i) for i in range(6))
MAX_NORM, VALUE, DECAY, MIN_STEPS, REFRESH, SEED, WINDOW_COUNT, WINDOWS = (
    tl.constexpr(i) for i in range(6, 14)
)

MAX_NUMBER = tl.constexpr(1.7976931348623157e308)


@triton.jit
def is_finite(x):
    return tl.abs(x) <= MAX_NUMBER


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
        row_n = tl.load(row, mask=inside, other=0.0, cache_modifier=".cg")
        share = 1.0 / tl.maximum(row_n, 1.0)
        d = tl.load(row + 2, mask=inside, other=0.0, cache_modifier=".cg")
        row_mean = tl.load(row + 1, mask=inside, other=0.0, cache_modifier=".cg") + d * share
        row_m2 = tl.load(row + 3, mask=inside, other=0.0, cache_modifier=".cg") - d * d * share
        delta = row_mean - mean
        part = row_n / tl.maximum(n + row_n, 1.0)
        mean += delta * part
        m2 += tl.where(row_m2 < 0, 0.0, row_m2) + delta * delta * n * part
        n += row_n
        power += tl.load(row + 4, mask=inside, other=0.0, cache_modifier=".cg")
        dot += tl.load(row + 5, mask=inside, other=0.0, cache_modifier=".cg")
        old += tl.load(row + 6, mask=inside, other=0.0, cache_modifier=".cg")
        new += tl.load(row + 7, mask=inside, other=0.0, cache_modifier=".cg")
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
    tl.store(row, n)
    tl.store(row + 1, mean)
    tl.store(row + 2, n * 0.0)
    tl.store(row + 3, m2)
    tl.store(row + 4, power)
    tl.store(row + 5, dot)
    tl.store(row + 6, old)
    tl.store(row + 7, new)


# ---- schedule and multiplier ------------------------------------------------------------


@triton.jit
def active_factor(values, config):
    """What selected layers are multiplied by on this step: 1 outside all windows."""
    factor = tl.load(values + FACTOR)
    unit = tl.load(config + UNIT)
    active = factor
    if unit != 0:
        now = tl.where(unit == 1, tl.load(values + EPOCH), tl.load(values + STEP))
        active = factor * 0.0 + 1.0
        for i in range(tl.load(config + WINDOW_COUNT).to(tl.int32)):
            window = config + WINDOWS + i * 3
            own = tl.load(window + 2)
            own = tl.where(is_finite(own), own, factor)
            inside = (tl.load(window) <= now) & (now < tl.load(window + 1))
            active = tl.where(inside, own, active)
    return active


@triton.jit
def needs_norm(config):
    return (tl.load(config + MATCH_NORM) != 0) | (tl.load(config + MAX_NORM) > 0)


@triton.jit
def next_weight(values, layer, config):
    """Weight of this step in the running means of a layer."""
    weight_sum = tl.load(values + GLOBALS + layer * FIELDS + WEIGHT_SUM)
    return 1.0 / (1.0 + tl.load(config + DECAY) * weight_sum)


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
    measure = tl.load(config + MEASURE)
    min_steps = tl.load(config + MIN_STEPS)
    for begin in range(0, layers, WIDTH):
        index = begin + tl.arange(0, WIDTH)
        inside = index < layers
        state = values + GLOBALS + index * FIELDS
        k = tl.load(state + K, mask=inside, other=0.0)
        if measure == 0:
            noise = tl.load(state + NOISE, mask=inside, other=1.0)
            score = tl.log(noise / tl.load(state + MEAN_POWER, mask=inside, other=1.0))
        elif measure == 1:
            score = -tl.load(state + AGREEMENT, mask=inside, other=0.0)
        elif measure == 2:
            score = tl.log(tl.load(state + VARIANCE, mask=inside, other=1.0))
        else:
            score = _drawn(tl.load(config + SEED).to(tl.int64), decision, index)
        least = tl.maximum(tl.where(measure >= 2, 1.0, 2.0), min_steps)
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
    kind = tl.load(config + THRESHOLD)
    value = tl.load(config + VALUE)
    count = tl.full([], 0, tl.int32)
    sums = tl.zeros([WIDTH], tl.float64)
    for begin in range(0, layers, WIDTH):
        score = _scores_at(scores, begin, layers)
        count += tl.sum((score == score).to(tl.int32), axis=0)
        sums += tl.where(score == score, score, 0.0)
    mean = tl.sum(sums, axis=0) / tl.maximum(count, 1).to(tl.float64)
    tau = mean
    if kind == 1:
        squares = tl.zeros([WIDTH], tl.float64)
        for begin in range(0, layers, WIDTH):
            score = _scores_at(scores, begin, layers)
            squares += tl.where(score == score, (score - mean) * (score - mean), 0.0)
        spread = tl.sqrt(tl.sum(squares, axis=0) / tl.maximum(count, 1).to(tl.float64)) * value
        tau = tl.where(tl.load(config + SELECT) == 0, mean - spread, mean + spread)
    elif kind == 2:
        position = value * tl.maximum(count - 1, 0).to(tl.float64)
        lower = position.to(tl.int32)
        tau = _kth_smallest(scores, layers, lower)
        if lower + 1 < count:
            high = _next_above(scores, layers, tau, lower)
            tau += (position - lower.to(tl.float64)) * (high - tau)
    tau = tl.where(count > 0, tau, float("nan"))
    return tl.where(kind == 3, value, tau)


@triton.jit
def decide(values, config, scores, layers, decision):
    """Chooses anew which layers are amplified; ``decision`` numbers the draws."""
    _store_scores(values, config, scores, layers, decision)
    tl.debug_barrier()
    tau = _threshold(config, scores, layers)
    below = tl.load(config + SELECT) == 0
    step = tl.load(values + STEP)
    for begin in range(0, layers, WIDTH):
        index = begin + tl.arange(0, WIDTH)
        inside = index < layers
        score = _scores_at(scores, begin, layers)
        chosen = tl.where(below, score < tau, score > tau).to(tl.float64)
        state = values + GLOBALS + index * FIELDS
        changed = inside & (chosen != tl.load(state + SELECTED, mask=inside, other=0.0))
        tl.store(state + CHANGED_AT, tl.where(inside, step, 0.0), mask=changed)
        tl.store(state + SELECTED, chosen, mask=changed)
    tl.store(values + TAU, tau)


# ---- commit -----------------------------------------------------------------------------


@triton.jit
def _update_layers(values, config, layer_rows, layers):
    decay = tl.load(config + DECAY)
    for begin in range(0, layers, WIDTH):
        index = begin + tl.arange(0, WIDTH)
        row = layer_rows + index * ROW
        n = tl.load(row, mask=index < layers, other=0.0, cache_modifier=".cg")
        here = n > 0
        state = values + GLOBALS + index * FIELDS
        k = tl.load(state + K, mask=here, other=0.0)
        weight_sum = tl.load(state + WEIGHT_SUM, mask=here, other=0.0)
        weight = 1.0 / (1.0 + decay * weight_sum)
        keep = 1.0 - weight
        tl.store(state + K, k + 1.0, mask=here)
        tl.store(state + WEIGHT_SUM, 1.0 + decay * weight_sum, mask=here)

        power = tl.load(row + 4, mask=here, other=0.0, cache_modifier=".cg")
        dot = tl.load(row + 5, mask=here, other=0.0, cache_modifier=".cg")
        old = tl.load(row + 6, mask=here, other=0.0, cache_modifier=".cg")
        root = tl.sqrt(power) * tl.sqrt(old)
        agreement = tl.load(state + AGREEMENT, mask=here, other=0.0)
        now = tl.where(root > 0, dot / tl.where(root > 0, root, 1.0), 0.0)
        moved = agreement + (now - agreement) / tl.where(k >= 1, weight_sum, 1.0)
        tl.store(state + AGREEMENT, tl.where(k >= 1, moved, agreement), mask=here)

        v = tl.load(row + 3, mask=here, other=0.0, cache_modifier=".cg") / tl.maximum(n, 1.0)
        variance = tl.load(state + VARIANCE, mask=here, other=0.0)
        tl.store(state + VARIANCE, variance + weight * (v - variance), mask=here)
        running = tl.load(state + POWER, mask=here, other=0.0)
        tl.store(state + POWER, running + weight * (power - running), mask=here)
        new = tl.load(row + 7, mask=here, other=0.0, cache_modifier=".cg")
        tl.store(state + MEAN_POWER, new, mask=here)
        noise = tl.load(state + NOISE, mask=here, other=0.0)
        noise = keep * keep * noise + weight * weight * power
        tl.store(state + NOISE, noise, mask=here)


@triton.jit
def _amplify(values, layer_rows, layers, factor):
    """Notes what each layer is multiplied by in this step; row ``layers`` is the excluded's."""
    for begin in range(0, layers + 1, WIDTH):
        index = begin + tl.arange(0, WIDTH)
        state = values + GLOBALS + index * FIELDS
        selected = tl.load(state + SELECTED, mask=index < layers, other=0.0) != 0
        multiplier = tl.where(selected, factor, 1.0)
        row = layer_rows + index * ROW
        tl.store(row + MULTIPLIER, multiplier, mask=index <= layers)
        n = tl.load(row, mask=index < layers, other=0.0, cache_modifier=".cg")
        counts = (n > 0) & (multiplier != 1)
        times = tl.load(state + AMPLIFIED, mask=counts, other=0.0)
        tl.store(state + AMPLIFIED, times + 1.0, mask=counts)


@triton.jit
def commit(values, config, layer_rows, scores, layers, factor):
    """Folds a step's sums, all finite, into the state, and decides where that is due."""
    exact = tl.load(config + EXACT) != 0
    if not exact:
        _amplify(values, layer_rows, layers, factor)
    _update_layers(values, config, layer_rows, layers)
    tl.debug_barrier()
    refresh = tl.load(config + REFRESH).to(tl.int64)
    step = tl.load(values + STEP)
    counted = (step - tl.load(values + SKIPPED)).to(tl.int64) + 1
    if refresh > 0:
        if counted % refresh == 0:
            decide(values, config, scores, layers, counted // refresh)
            tl.debug_barrier()
    if exact:
        _amplify(values, layer_rows, layers, factor)
    tl.store(values + STEP, step + 1.0)


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
        n = tl.load(row, mask=inside, other=0.0, cache_modifier=".cg")
        mean = tl.load(row + 1, mask=inside, other=0.0, cache_modifier=".cg")
        m2 = tl.load(row + 3, mask=inside, other=0.0, cache_modifier=".cg")
        multiplier = tl.load(row + MULTIPLIER, mask=inside, other=1.0)
        squares = m2 + n * mean * mean
        before += squares
        after += multiplier * multiplier * squares
    power_before, power_after = tl.sum(before, axis=0), tl.sum(after, axis=0)
    max_norm = tl.load(config + MAX_NORM)
    if tl.load(config + MATCH_NORM) != 0:
        tl.store(values + NORM, tl.sqrt(power_before))
        some = power_after > 0
        coefficient = tl.where(some, tl.sqrt(power_before / tl.where(some, power_after, 1.0)), 1.0)
    else:
        norm = tl.sqrt(power_after)
        tl.store(values + NORM, norm)
        coefficient = max_norm / (norm + 1e-6)
        coefficient = tl.where(coefficient > 1.0, 1.0, coefficient)
    return coefficient
