"""The rules about whole layers: state update, score, threshold, selection, multiplier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call
from ..model.plan import Plan
from ..options import Rules
from .moments import constant
from .sketch import murmur_finaliser
from .state import LAYER_FIELDS, State


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
        """Where this is not so some element is not finite, or a sum overflowed: bool [layers]."""
        return torch.isfinite(self.squares() + self.power + self.dot.abs() + self.after)

    def squares(self) -> Tensor:
        """Sum of squared elements."""
        return self.m2 + self.numel * self.mean * self.mean


# ---- rounds -------------------------------------------------------------------------


def step_number(state: State, call: Call) -> Tensor:
    """The number of the step under way, from 0, those that nothing measured included: fp64 []."""
    return _measured_number(state, call) + state.scalar("unmeasured_steps")


def _measured_number(state: State, call: Call) -> Tensor:
    return state.scalar("step") - (0 if call.begins_round else 1)


@torch.no_grad()
def end_round(state: State, rules: Rules) -> None:
    """Takes the decision, if one is due, of a round that ended when the next one began."""
    if rules.refresh and state.layers.shape[0]:
        number = state.scalar("step") - state.scalar("skipped_steps")
        due = (state.scalar("round_skipped") == 0) & (number % rules.refresh == 0)
        at = state.scalar("step") - 1
        factor = active_factor(state, rules, Call(begins_round=False))
        decide(state, rules, (number / rules.refresh).floor(), at, factor, due=due)


# ---- state update -------------------------------------------------------------------


def is_measured(member_numel: Tensor, numel: Tensor) -> Tensor:
    """Whether all members of each layer have a gradient in this step: bool [layers].

    By their elements, which are whole numbers even where they were added up of parts.
    """
    whole = (member_numel == 0) | ((numel - member_numel).abs() < 0.5)
    return (numel > 0) & whole


def _updated(rows: Tensor, sums: Sums, amplified: Tensor | int, decay: float) -> Tensor:
    """The layers' state after a step: [layers, fields] -> [layers, fields]."""
    old = dict(zip(LAYER_FIELDS, rows.unbind(1), strict=True))
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
    fresh = old["member_numel"] == 0
    new["member_numel"] = torch.where(fresh, sums.numel, old["member_numel"])
    return torch.stack([new[name] for name in LAYER_FIELDS], dim=1)


# ---- score, threshold, selection ----------------------------------------------------


def scores(layers: Tensor, measure: str) -> Tensor:
    """The measure's value for each row of state: fp64 [layers, fields] -> [layers].

    NaN where there is no score yet. Scores need two steps, "variance" one.
    """
    state = dict(zip(LAYER_FIELDS, layers.unbind(1), strict=True))
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
    stream = murmur_finaliser(murmur_finaliser(torch.full_like(number, seed)) ^ number)
    return (
        murmur_finaliser(stream ^ torch.arange(layers, device=number.device)).double() + 0.5
    ) / 2**32


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
def decide(
    state: State,
    rules: Rules,
    decision: Tensor,
    step: Tensor,
    factor: Tensor,
    *,
    due: Tensor | None = None,
) -> None:
    """Chooses anew, in the step of that number, which layers are amplified; with ``due``
    (bool []), only where it is true.

    ``factor``: ``active_factor`` in that step.
    """
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
    changed_at.copy_(torch.where(chosen != selected, step, changed_at))
    selected.copy_(chosen)
    state.scalar("threshold").copy_(tau)
    if rules.grow:
        _grow(state, rules, ~values.isnan(), due, factor)


# ---- growth -------------------------------------------------------------------------

LOW = 0.1  # of the mean direction: above it the learning rate is low
SURGE = 4.0  # times the least variance
EARLY = 5.0  # the least is kept from a layer's step min_steps / EARLY on


def _grow(state: State, rules: Rules, eligible: Tensor, due: Tensor | None, factor: Tensor) -> None:
    """At a decision: layers grow, or settle for good. ``eligible``: bool [layers]."""
    gated = state.scalar("gated")
    may = (factor != 1) & (state.scalar("rising") == 0) & eligible.any()
    if due is not None:
        may = may & due
    elements = torch.where(eligible, state.column("member_numel"), 0.0)
    direction = (elements * state.column("agreement")).sum() / elements.sum()
    first = gated == 0
    low = ~first | (direction > LOW)

    own, settled = state.column("factor"), state.column("settled")
    least = state.column("least_variance")
    free = may & eligible & (settled == 0)
    grows = low & (state.column("selected") != 0)
    settles = free & ~grows
    # What grew last was too much; before the first decision nothing has grown.
    taken_back = (_grown(state) / torch.where(first, 1.0, factor)).clamp(min=1.0)
    larger = (own * factor).clamp(max=rules.max_factor)
    grown = torch.where(free & grows & ~_surging(state), larger, own)
    own.copy_(torch.where(settles, taken_back, grown))
    settled.copy_(torch.where(settles, 1.0, settled))
    least.copy_(torch.where(settles, _comparable(state), least))
    gated.copy_(torch.where(may, 1.0, gated))


def _keep_least(state: State, rules: Rules, present: Tensor) -> None:
    """After a step: the least variance of each layer. ``present``: bool [layers]."""
    least = state.column("least_variance")
    kept = present & (EARLY * state.column("steps") >= rules.min_steps)
    least.copy_(torch.where(kept, torch.minimum(least, _comparable(state)), least))


def _comparable(state: State) -> Tensor:
    """The variances, and infinity where there is none to compare to: fp64 [layers].

    A variance of 0 is none. Nor is that of a layer whose optimizer's updates are multiplied,
    which a surge of the gradients does not enlarge.
    """
    variance = state.column("variance")
    return torch.where((variance > 0) & (state.column("on_update") == 0), variance, math.inf)


def _surging(state: State) -> Tensor:
    """Whether a layer's gradients are much larger than at their least: bool [layers]."""
    return state.column("variance") > SURGE * state.column("least_variance")


def _grown(state: State) -> Tensor:
    """What growth came to, less what a surge takes back: fp64 [layers]."""
    own, variance = state.column("factor"), state.column("variance")
    brake = (SURGE * state.column("least_variance") / variance).sqrt()
    return torch.where(_surging(state), (own * brake).clamp(min=1.0), own)


# ---- schedule -----------------------------------------------------------------------


def active_factor(state: State, rules: Rules, call: Call) -> Tensor:
    """What selected layers are multiplied by now, or grow by: fp64 [], 1 outside all windows.

    Where factors compound, as with ``placement="backward"``, no closer to 0 or infinity than
    lets the product over all selected layers stay within ``max_amplification``.
    """
    factor = _scheduled_factor(state, rules, call)
    if rules.max_amplification == math.inf:
        return factor
    selected = state.column("selected").sum().clamp(min=1)
    largest = rules.max_amplification ** (1 / selected)
    return torch.minimum(torch.maximum(factor, 1 / largest), largest)


def _scheduled_factor(state: State, rules: Rules, call: Call) -> Tensor:
    factor = state.scalar("factor")
    if rules.schedule_unit == "always":
        return factor
    now = step_number(state, call) if rules.schedule_unit == "step" else state.scalar("epoch")
    active = torch.ones_like(factor)
    for start, stop, own in rules.windows:
        inside = (now >= start) & (now < stop)
        active = torch.where(inside, factor if math.isnan(own) else own, active)
    return active


def multipliers(state: State, rules: Rules, factor: Tensor) -> Tensor:
    """What each layer's gradients are multiplied by as the state stands: fp64 [layers].

    ``factor``: ``active_factor`` at the beginning of the step.
    """
    if rules.grow:
        return torch.where(factor != 1, _grown(state), 1.0)
    return torch.where(state.column("selected") != 0, factor, 1.0)


# ---- norm ----------------------------------------------------------------------------


def rescale(
    state: State,
    rules: Rules,
    sums: Sums,
    multipliers: Tensor,
    excluded: Tensor,
    counted: Tensor,
) -> Tensor:
    """What every gradient is multiplied by on top: fp64 [].

    Stores the norm before that, NaN if the step does not count. ``excluded``: sum of squares of
    what belongs to no layer. Gradients of layers whose optimizer's updates are multiplied are not
    amplified.
    """
    squares = sums.squares()
    multipliers = torch.where(state.column("on_update") == 0, multipliers, 1.0)
    before = squares.sum() + excluded
    after = (multipliers.square() * squares).sum() + excluded
    norm = (before if rules.match_norm else after).sqrt()
    state.scalar("total_norm").copy_(torch.where(counted, norm, torch.nan))
    if rules.match_norm:
        return torch.where(after > 0, (before / after).sqrt(), 1.0)
    return (rules.max_norm / (norm + 1e-6)).clamp(max=1.0)


# ---- commit --------------------------------------------------------------------------


class Standing(NamedTuple):
    """What holds at a step's beginning."""

    inverse: Tensor  # what gradients are multiplied by before they count: fp64 []
    skipped: Tensor  # whether ``found_inf`` asks for that: bool []
    factor: Tensor  # what selected layers are multiplied by, or grow by: fp64 []
    multipliers: Tensor  # what each layer's gradients are multiplied by: fp64 [layers]


@torch.no_grad()
def commit(
    plan: Plan,
    state: State,
    rules: Rules,
    sums: Sums,
    measured: Sequence[int],
    before: Standing,
    call: Call,
) -> Tensor:
    """Folds one call's sums into the state and decides; whether the call counts: bool [].

    ``measured`` are the slots whose running means ``measure`` has written. A call that is
    skipped on entry does not count, and so does not its round. A layer that lacks a member's
    gradient passes by.
    """
    counted = sums.finite().all() & ~before.skipped
    present = counted & is_measured(state.column("member_numel"), sums.numel)
    amplified = 0 if rules.exact else present & (before.multipliers != 1)
    updated = _updated(state.layers, sums, amplified, rules.decay)
    state.layers.copy_(torch.where(present[:, None], updated, state.layers))
    if rules.grow:
        _keep_least(state, rules, present)
    if measured:
        indices = constant(tuple(map(float, measured)), torch.int64, state.device)
        own = tuple(float(plan.slots[index].layer) for index in measured)
        layers = constant(own, torch.int64, state.device)
        row = state.parity[indices]
        state.parity[indices] = torch.where(present[layers], 1 - row, row)
    step = _measured_number(state, call)
    skipped = state.scalar("round_skipped")
    if call.begins_round:
        skipped.zero_()
    if rules.refresh and call.decides:
        number = step - state.scalar("skipped_steps") + 1
        due = counted & (skipped == 0) & (number % rules.refresh == 0)
        decision = (number / rules.refresh).floor()
        decide(state, rules, decision, step, before.factor, due=due)
    if rules.exact:
        amplified = present & (multipliers(state, rules, before.factor) != 1)
        state.column("amplified_steps").add_(amplified)
    if call.begins_round:
        state.scalar("step").add_(1)
    state.scalar("skipped_steps").add_(~counted & (skipped == 0))
    skipped.copy_((skipped != 0) | ~counted)
    return counted
