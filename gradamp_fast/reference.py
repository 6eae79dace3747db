"""The definition of a step, in plain PyTorch and fp64.

Every other backend computes what this file says. It runs on any device with fp64, never
synchronises with the host, and also serves as the ``torch`` backend.

The measures are this project's own reading of S. Basodi, K. Pusuluri, X. Xiao, Y. Pan,
*Intelligent gradient amplification for deep neural networks* (arXiv 2305.18445), whose
formulas are not public.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .call import Call
from .options import Rules
from .plan import Plan
from .state import FIELDS, State

# ---- the sketch ---------------------------------------------------------------------


def signs(numel: int, device: torch.device, first_word: int = 0) -> Tensor:
    """Signs of ``numel`` elements of a tensor in memory order, +1 or -1: int8 [numel].

    The first of them is element ``32 * first_word``.
    """
    first = 32 * first_word
    capacity = 1 << max(first + numel - 1, 31).bit_length()
    return _signs(capacity, device)[first : first + numel]


@functools.lru_cache(maxsize=4)
def _signs(capacity: int, device: torch.device) -> Tensor:
    """Bit i % 32 of the hash of i // 32 set means minus."""
    word = _hash(torch.arange(capacity // 32, device=device))
    bits = (word[:, None] >> torch.arange(32, device=device)) & 1
    return (1 - 2 * bits).to(torch.int8).flatten()


def _hash(word: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser of int64 values below 2**32."""
    word = word ^ (word >> 16)
    word = (word * 0x85EBCA6B) & 0xFFFFFFFF
    word = word ^ (word >> 13)
    word = (word * 0xC2B2AE35) & 0xFFFFFFFF
    return word ^ (word >> 16)


def bucket_sums(values: Tensor, bucket_log2: int, first_word: int = 0) -> Tensor:
    """Signed sums of runs of ``2**bucket_log2`` elements: [n] -> [buckets].

    The last run may be short.
    """
    signed = values * signs(values.numel(), values.device, first_word)
    length = 1 << bucket_log2
    padding = -values.numel() % length
    return torch.nn.functional.pad(signed, (0, padding)).view(-1, length).sum(dim=1)


# ---- statistics ---------------------------------------------------------------------


_ROW = 4096


class Sums(NamedTuple):
    """One step's statistics, one entry for each layer: fp64 [layers]."""

    numel: Tensor  # 0: no gradient, and the rest is 0 as well
    mean: Tensor
    m2: Tensor  # sum of squared deviations from the mean
    power: Tensor  # sum of s^2 over the buckets s
    dot: Tensor  # sum of s * h, h being the bucket's running mean before this step
    before: Tensor  # sum of h^2
    after: Tensor  # sum of h^2 after this step

    def finite(self) -> Tensor:
        total = self.m2 + self.numel * self.mean**2 + self.power + self.dot.abs() + self.after
        return torch.isfinite(total).all()

    def squares(self) -> Tensor:
        """Sum of squared elements."""
        return self.m2 + self.numel * self.mean**2


@functools.lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A device tensor that is copied from the host once, not once a step."""
    return torch.tensor(values, dtype=dtype, device=device)


def _sum(values: Tensor) -> Tensor:
    """Sum of a vector: rows first, so that its order does not depend on the threads at work."""
    while values.numel() > _ROW:
        rows = torch.nn.functional.pad(values, (0, -values.numel() % _ROW)).view(-1, _ROW)
        values = rows.sum(dim=1)
    return values.sum()


def _moments(values: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations of an fp64 tensor: [3]."""
    count = _constant((float(values.numel()),), torch.float64, values.device).squeeze()
    mean = _sum(values) / count
    return torch.stack((count, mean, _sum((values - mean).square())))


def _merge(moments: Sequence[Tensor]) -> Tensor:
    """Moments of several sets together (Chan, Golub and LeVeque): k of [3] -> [3]."""
    count, mean, m2 = torch.stack(tuple(moments)).unbind(1)
    total = count.sum()
    centre = (count * mean).sum() / total
    return torch.stack((total, centre, m2.sum() + (count * (mean - centre).square()).sum()))


@torch.no_grad()
def measure(
    plan: Plan,
    state: State,
    rules: Rules,
    gradients: Sequence[Tensor | None],
    inverse: Tensor | float,
) -> Sums:
    """Statistics of all layers, of gradients times ``inverse``.

    ``gradients`` holds a flat real tensor in memory order, or None, for each of ``plan.slots``.
    A tensor's new running means go to the row of the sketch that is not in use.
    """
    weights = 1 / (1 + rules.decay * state.column("weight_sum"))
    rows = _constant((0.0, 1.0), torch.int32, state.device)
    moments: dict[int, list[Tensor]] = {}
    sketches: dict[int, list[Tensor]] = {}
    for index in touched(plan, gradients):
        slot, gradient, parity = plan.slots[index], gradients[index], state.parity[index]
        assert gradient is not None
        both = state.sketch[:, slot.first_bucket :][:, : slot.buckets]
        h = both.index_select(0, parity.view(1))[0].double()
        values = gradient.double() * inverse
        s = bucket_sums(values, slot.bucket_log2, slot.first_word).float().double()
        after = (h + weights[slot.layer] * (s - h)).float()
        both.copy_(torch.where((rows == parity)[:, None], both, after))
        products = (s.square(), s * h, h.square(), after.double().square())
        moments.setdefault(slot.layer, []).append(_moments(values))
        sketches.setdefault(slot.layer, []).append(torch.stack([_sum(p) for p in products]))
    table = weights.new_zeros((len(plan.layers), len(Sums._fields)))
    if moments:
        present = _constant(tuple(map(float, moments)), torch.int64, state.device)
        table[present] = torch.stack(
            [
                torch.cat((_merge(moments[layer]), torch.stack(sketches[layer]).sum(dim=0)))
                for layer in moments
            ]
        )
    return Sums(*table.unbind(1))


def touched(plan: Plan, gradients: Sequence[Tensor | None]) -> list[int]:
    """Indices of the measured slots that have a gradient with at least one element here."""
    return [
        index
        for index, (slot, gradient) in enumerate(zip(plan.slots, gradients, strict=True))
        if slot.layer >= 0 and gradient is not None and slot.numel > 0
    ]


# ---- state update -------------------------------------------------------------------


def _updated(rows: Tensor, sums: Sums, amplified: Tensor | int, decay: float) -> Tensor:
    """The layers' state after a step: [layers, fields] -> [layers, fields]."""
    old = dict(zip(FIELDS, rows.unbind(1), strict=True))
    new = dict(old)
    new["steps"] = old["steps"] + 1
    new["weight_sum"] = 1 + decay * old["weight_sum"]
    w = 1 / new["weight_sum"]

    root = sums.power.sqrt() * sums.before.sqrt()
    agreement = torch.where(root > 0, sums.dot / root, 0.0)
    step_of_agreement = (agreement - old["agreement"]) / old["weight_sum"]
    new["agreement"] = old["agreement"] + torch.where(old["steps"] >= 1, step_of_agreement, 0.0)

    new["variance"] = old["variance"] + w * (sums.m2 / sums.numel - old["variance"])
    new["power"] = old["power"] + w * (sums.power - old["power"])
    new["mean_power"] = sums.after
    new["noise"] = (1 - w) ** 2 * old["noise"] + w**2 * sums.power
    new["amplified_steps"] = old["amplified_steps"] + amplified
    return torch.stack([new[name] for name in FIELDS], dim=1)


# ---- score, threshold, selection ----------------------------------------------------


def scores(layers: Tensor, measure: str) -> Tensor:
    """The measure's value for each row of state: fp64 [layers, fields] -> [layers].

    NaN where there is no score yet. Scores need two steps, "variance" one.
    """
    state = dict(zip(FIELDS, layers.unbind(1), strict=True))
    if measure == "variance":
        return torch.where(state["steps"] >= 1, state["variance"].log(), torch.nan)
    if measure == "direction":
        value = -state["agreement"]
    else:
        value = (state["noise"] / state["mean_power"]).log()
    return torch.where(state["steps"] >= 2, value, torch.nan)


def draws(layers: int, seed: int, decision: Tensor) -> Tensor:
    """A number in (0, 1) for each layer, other ones for each decision: fp64 [layers]."""
    number = decision.long() & 0xFFFFFFFF
    stream = _hash(_hash(torch.full_like(number, seed)) ^ number)
    return (_hash(stream ^ torch.arange(layers, device=number.device)).double() + 0.5) / 2**32


def last_decision(state: State, rules: Rules) -> Tensor:
    """Number of the decision taken last: [], the epoch's or counted from 1."""
    if rules.refresh == 0:
        return state.scalar("epoch")
    counted = state.scalar("step") - state.scalar("skipped_steps")
    return (counted / rules.refresh).floor()


def chosen_scores(state: State, rules: Rules, decision: Tensor) -> Tensor:
    """What the decision of that number goes by: fp64 [layers]; NaN where there is no score yet."""
    if rules.measure == "random":
        drawn = draws(state.layers.shape[0], rules.seed, decision)
        return torch.where(state.column("steps") >= 1, drawn, torch.nan)
    return scores(state.layers, rules.measure)


def threshold(values: Tensor, rules: Rules) -> Tensor:
    """tau over the scores that are not NaN: [layers] -> []; NaN if there are none."""
    if rules.threshold == "number":
        return torch.full_like(values.sum(), rules.threshold_value)
    eligible = ~values.isnan()
    count = eligible.sum()
    if rules.threshold == "quantile":
        ordered = torch.where(eligible, values, torch.inf).sort().values
        position = rules.threshold_value * (count - 1).clamp(min=0).double()
        lower = position.floor().long()
        upper = torch.minimum(lower + 1, (count - 1).clamp(min=0))
        low, high = ordered.take(lower), ordered.take(upper)
        tau = low + (position - lower) * (high - low)
        return torch.where(count > 0, tau, torch.nan)
    mean = torch.where(eligible, values, 0.0).sum() / count
    if rules.threshold == "mean":
        return mean
    spread = (torch.where(eligible, values - mean, 0.0).square().sum() / count).sqrt()
    distance = rules.threshold_value * spread
    return mean - distance if rules.select == "below" else mean + distance


@torch.no_grad()
def decide(state: State, rules: Rules, decision: Tensor, *, due: Tensor | None = None) -> None:
    """Chooses anew which layers are amplified; with ``due`` (bool []), only where it is true."""
    if state.layers.shape[0] == 0:
        return
    values = chosen_scores(state, rules, decision)
    steps, selected = state.column("steps"), state.column("selected")
    values = torch.where((steps >= rules.min_steps) & values.isfinite(), values, torch.nan)
    tau = threshold(values, rules)
    chosen = (values < tau if rules.select == "below" else values > tau).double()
    if due is not None:
        chosen = torch.where(due, chosen, selected)
        tau = torch.where(due, tau, state.scalar("threshold"))
    changed_at = state.column("changed_at")
    changed_at.copy_(torch.where(chosen != selected, state.scalar("step"), changed_at))
    selected.copy_(chosen)
    state.scalar("threshold").copy_(tau)


# ---- schedule -----------------------------------------------------------------------


def active_factor(state: State, rules: Rules) -> Tensor:
    """What selected layers are multiplied by now: fp64 [], 1 outside all windows.

    Where factors compound, as with ``placement="backward"``, no closer to 0 or infinity than
    lets the product over all selected layers stay within ``max_amplification``.
    """
    factor = _scheduled_factor(state, rules)
    if rules.max_amplification == math.inf:
        return factor
    selected = state.column("selected").sum().clamp(min=1)
    largest = rules.max_amplification ** (1 / selected)
    return torch.minimum(torch.maximum(factor, 1 / largest), largest)


def _scheduled_factor(state: State, rules: Rules) -> Tensor:
    factor = state.scalar("factor")
    if rules.schedule == "always":
        return factor
    now = step_number(state) if rules.schedule == "step" else state.scalar("epoch")
    active = torch.ones_like(factor)
    for start, stop, own in rules.windows:
        inside = (now >= start) & (now < stop)
        active = torch.where(inside, factor if math.isnan(own) else own, active)
    return active


def step_number(state: State) -> Tensor:
    """Steps so far, those that nothing measured included: fp64 []."""
    return state.scalar("step") + state.scalar("unmeasured_steps")


# ---- commit -------------------------------------------------------------------------


@torch.no_grad()
def commit(
    state: State, rules: Rules, sums: Sums, measured: Sequence[int], before: Standing
) -> Tensor:
    """Folds one step's sums into the state and decides; whether the step counts: bool [].

    ``measured`` are the slots whose running means ``measure`` has written. A halted step does
    not count.
    """
    factor = before.factor
    counted = sums.finite() & ~before.halted
    present = counted & (sums.numel > 0)
    amplified = present & (state.column("selected") != 0) & (factor != 1)
    updated = _updated(state.layers, sums, 0 if rules.exact else amplified, rules.decay)
    state.layers.copy_(torch.where(present[:, None], updated, state.layers))
    if measured:
        indices = _constant(tuple(map(float, measured)), torch.int64, state.device)
        row = state.parity[indices]
        state.parity[indices] = torch.where(counted, 1 - row, row)
    if rules.refresh:
        number = state.scalar("step") - state.scalar("skipped_steps") + 1
        due = counted & (number % rules.refresh == 0)
        decide(state, rules, (number / rules.refresh).floor(), due=due)
    if rules.exact:
        amplified = present & (state.column("selected") != 0) & (factor != 1)
        state.column("amplified_steps").add_(amplified)
    state.scalar("step").add_(1)
    state.scalar("skipped_steps").add_(~counted)
    return counted


# ---- the step -----------------------------------------------------------------------


class Standing(NamedTuple):
    """What holds at a step's beginning."""

    inverse: Tensor  # what gradients are multiplied by before they count: fp64 []
    halted: Tensor  # whether the step is to be skipped: bool []
    factor: Tensor  # what selected layers are multiplied by: fp64 []
    selected: Tensor  # fp64 [layers], 0 or 1


def standing(state: State, rules: Rules, call: Call) -> Standing:
    """Copies, which the step does not change."""
    one = torch.ones_like(state.scalar("factor"))
    scale, found_inf = call.grad_scale, call.found_inf
    return Standing(
        one if scale is None else 1 / scale.double().reshape(()),
        one == 0 if found_inf is None else found_inf.reshape(()) != 0,
        active_factor(state, rules).clone(),
        state.column("selected").clone(),
    )


@torch.no_grad()
def step(
    plan: Plan,
    state: State,
    rules: Rules,
    gradients: Sequence[Tensor | None],
    call: Call = Call(),  # noqa: B008  # it is immutable
) -> None:
    """Measure, update the state, decide, multiply.

    ``gradients`` as ``measure`` takes them; they are multiplied in place.
    """
    before = standing(state, rules, call)
    sums = measure(plan, state, rules, gradients, before.inverse)
    excluded = torch.zeros_like(before.inverse)
    if rules.needs_norm:
        excluded = excluded_squares(plan, gradients, before.inverse)
    finish(plan, state, rules, gradients, call, before, sums, excluded)


def finish(
    plan: Plan,
    state: State,
    rules: Rules,
    gradients: Sequence[Tensor | None],
    call: Call,
    before: Standing,
    sums: Sums,
    excluded: Tensor,
) -> None:
    """The rest of a step, once its sums are known.

    ``excluded``: sum of squares of what belongs to no layer, where the norm is needed.
    """
    counted = commit(state, rules, sums, touched(plan, gradients), before)
    selected = state.column("selected") if rules.exact else before.selected
    coefficient = before.inverse if call.unscale else torch.ones_like(before.inverse)
    if rules.needs_norm:
        coefficient = coefficient * rescale(
            state, rules, sums, selected, before.factor, excluded, counted
        )
    multiply(plan, gradients, selected, before.factor, coefficient, counted)
    mark(call.found_inf, counted)


def mark(found_inf: Tensor | None, counted: Tensor) -> None:
    """Sets ``found_inf`` to 1 where the step does not count and it is 0."""
    if found_inf is not None:
        keep = counted | (found_inf != 0)
        found_inf.copy_(torch.where(keep, found_inf, torch.ones_like(found_inf)))


# ---- norm, multiplication -----------------------------------------------------------


def excluded_squares(
    plan: Plan,
    gradients: Sequence[Tensor | None],
    inverse: Tensor,
    copies: Sequence[int] | None = None,
) -> Tensor:
    """Sum of the squared elements of the gradients that belong to no layer: fp64 [].

    ``copies``: what each slot's sum is divided by.
    """
    total = torch.zeros_like(inverse)
    for index, (slot, gradient) in enumerate(zip(plan.slots, gradients, strict=True)):
        if slot.layer < 0 and gradient is not None:
            squares = _sum((gradient.double() * inverse).square())
            total = total + (squares if copies is None else squares / copies[index])
    return total


def rescale(
    state: State,
    rules: Rules,
    sums: Sums,
    selected: Tensor,
    factor: Tensor,
    excluded: Tensor,
    counted: Tensor,
) -> Tensor:
    """What every gradient is multiplied by on top: fp64 []. Stores the norm before that.

    ``excluded``: sum of squares of what belongs to no layer.
    """
    squares = sums.squares()
    multipliers = torch.where(selected != 0, factor, 1.0)
    before = squares.sum() + excluded
    after = (multipliers.square() * squares).sum() + excluded
    norm = (before if rules.match_norm else after).sqrt()
    total_norm = state.scalar("total_norm")
    total_norm.copy_(torch.where(counted, norm, total_norm))
    if rules.match_norm:
        return torch.where(after > 0, (before / after).sqrt(), 1.0)
    return (rules.max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def multiply(
    plan: Plan,
    gradients: Sequence[Tensor | None],
    selected: Tensor,
    factor: Tensor,
    coefficient: Tensor,
    counted: Tensor,
) -> None:
    """Selected layers' gradients by factor and coefficient, the others by the coefficient."""
    multipliers = torch.where(selected != 0, factor, 1.0)
    for slot, gradient in zip(plan.slots, gradients, strict=True):
        if gradient is not None:
            own = multipliers[slot.layer] * coefficient if slot.layer >= 0 else coefficient
            _multiply(gradient, torch.where(counted, own, 1.0))


def _multiply(gradient: Tensor, multiplier: Tensor) -> None:
    """Multiplies in place, rounding once to the gradient's dtype; bit for bit ``mul_``."""
    precision = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    multiplier = multiplier.to(precision)
    product = (gradient.to(precision) * multiplier).to(gradient.dtype)
    gradient.copy_(torch.where(multiplier == 1, gradient, product))
