"""The order of a step: measure, update the state, decide, multiply."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import Call, Updated
from ..model.plan import Plan
from ..options import Rules
from .decide import Standing, Sums, active_factor, commit, multipliers, rescale
from .moments import constant, merge, moments_of, total
from .sketch import bucket_sums
from .state import State
from .update import update


def standing(state: State, rules: Rules, call: Call) -> Standing:
    """Copies, which the step does not change."""
    one = torch.ones_like(state.scalar("factor"))
    scale, found_inf = call.grad_scale, call.found_inf
    factor = active_factor(state, rules, call).clone()
    return Standing(
        one if scale is None else scale.double().reciprocal().float().double().reshape(()),
        one == 0 if found_inf is None else found_inf.reshape(()) != 0,
        factor,
        multipliers(state, rules, factor),
    )


@torch.no_grad()
def step(
    plan: Plan,
    state: State,
    rules: Rules,
    gradients: Sequence[Tensor | None],
    call: Call = Call(),  # noqa: B008  # it is immutable
    updated: Sequence[Updated | None] | None = None,
) -> None:
    """Measure, update the state, decide, multiply.

    ``gradients`` as ``measure`` takes them; they are multiplied in place, or ``updated``, of which
    there is one for each gradient, is updated instead.
    """
    before = standing(state, rules, call)
    sums = measure(plan, state, rules, gradients, before.inverse)
    excluded = torch.zeros_like(before.inverse)
    if rules.needs_norm:
        excluded = excluded_squares(plan, gradients, before.inverse)
    finish(plan, state, rules, gradients, call, before, sums, excluded, updated)


# ---- before the decision ---------------------------------------------------------------


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
    rows = constant((0.0, 1.0), torch.int32, state.device)
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
        moments.setdefault(slot.layer, []).append(moments_of(values))
        sketches.setdefault(slot.layer, []).append(torch.stack([total(p) for p in products]))
    table = weights.new_zeros((len(plan.layers), len(Sums._fields)))
    if moments:
        present = constant(tuple(map(float, moments)), torch.int64, state.device)
        table[present] = torch.stack(
            [
                torch.cat((merge(moments[layer]), torch.stack(sketches[layer]).sum(dim=0)))
                for layer in moments
            ]
        )
    return Sums(*table.unbind(1))


def nonfinite_layers(
    plan: Plan, state: State, rules: Rules, gradients: Sequence[Tensor | None], call: Call
) -> list[int]:
    """The layers whose sums would make a step with these gradients be skipped. Synchronises.

    Nothing is written but the row of the sketch that is not in use.
    """
    inverse = standing(state, rules, call).inverse
    sums = measure(plan, state, rules, gradients, inverse)
    return (~sums.finite()).nonzero().flatten().tolist()


def touched(plan: Plan, gradients: Sequence[Tensor | None]) -> list[int]:
    """Indices of the measured slots that have a gradient with at least one element here."""
    return [
        index
        for index, (slot, gradient) in enumerate(zip(plan.slots, gradients, strict=True))
        if slot.layer >= 0 and gradient is not None and slot.numel > 0
    ]


def excluded_squares(
    plan: Plan,
    gradients: Sequence[Tensor | None],
    inverse: Tensor,
    copies: Sequence[int] | None = None,
) -> Tensor:
    """Sum of the squared elements of the gradients that belong to no layer: fp64 [].

    ``copies``: what each slot's sum is divided by.
    """
    squares = torch.zeros_like(inverse)
    for index, (slot, gradient) in enumerate(zip(plan.slots, gradients, strict=True)):
        if slot.layer < 0 and gradient is not None:
            own = total((gradient.double() * inverse).square())
            squares = squares + (own if copies is None else own / copies[index])
    return squares


# ---- and after it ------------------------------------------------------------------------


def finish(
    plan: Plan,
    state: State,
    rules: Rules,
    gradients: Sequence[Tensor | None],
    call: Call,
    before: Standing,
    sums: Sums,
    excluded: Tensor,
    updated: Sequence[Updated | None] | None,
) -> None:
    """The rest of a step, once its sums are known.

    ``excluded``: sum of squares of what belongs to no layer, where the norm is needed.
    """
    counted = commit(plan, state, rules, sums, touched(plan, gradients), before, call)
    own = multipliers(state, rules, before.factor) if rules.exact else before.multipliers
    common = before.inverse
    if updated is None and not call.unscale:
        common = torch.ones_like(common)
    if rules.needs_norm:
        common = common * rescale(state, rules, sums, own, excluded, counted)
    if updated is None:
        multiply(plan, gradients, own, common, counted)
    else:
        # Under lagged timing nothing waits for what this step measures.
        valid = counted if rules.two_phases else ~before.skipped
        update_all(plan, gradients, updated, own, common, valid)
    mark_found_inf(call.found_inf, counted)


@torch.no_grad()
def update_all(
    plan: Plan,
    gradients: Sequence[Tensor | None],
    updated: Sequence[Updated | None],
    of_layers: Tensor,
    common: Tensor,
    valid: Tensor,
) -> None:
    """What an optimizer does with every tensor that has a gradient, where ``valid`` is true.

    ``of_layers`` multiply as the optimizer's rule says, ``common`` multiplies gradients.
    """
    for slot, gradient, of in zip(plan.slots, gradients, updated, strict=True):
        if gradient is not None:
            assert of is not None
            own = of_layers[slot.layer] if slot.layer >= 0 else torch.ones_like(common)
            update(of, gradient, own, common, valid)


@torch.no_grad()
def multiply(
    plan: Plan,
    gradients: Sequence[Tensor | None],
    of_layers: Tensor,
    coefficient: Tensor,
    counted: Tensor,
) -> None:
    """Gradients by what multiplies their layer, if they have one, and by the coefficient."""
    for slot, gradient in zip(plan.slots, gradients, strict=True):
        if gradient is not None:
            own = of_layers[slot.layer] * coefficient if slot.layer >= 0 else coefficient
            _multiply(gradient, torch.where(counted, own, 1.0))


def _multiply(gradient: Tensor, multiplier: Tensor) -> None:
    precision = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    multiplier = multiplier.to(precision)
    gradient.copy_(torch.where(multiplier == 1, gradient, product(gradient, multiplier)))


def product(gradient: Tensor, multiplier: Tensor) -> Tensor:
    """In the multiplier's precision, rounded once to the gradient's dtype; bit for bit ``mul_``.

    In fp16 what was finite stays so: it stops at the largest number.
    """
    wide = gradient.to(multiplier.dtype)
    out = wide * multiplier
    if gradient.dtype == torch.float16:
        limit = wide.abs().clamp(min=torch.finfo(torch.float16).max)
        out = torch.where(wide.isnan(), wide, out.clamp(-limit, limit))
    return out.to(gradient.dtype)


def mark_found_inf(found_inf: Tensor | None, counted: Tensor) -> None:
    """Sets ``found_inf`` to 1 where the step does not count and it is 0."""
    if found_inf is not None:
        keep = counted | (found_inf != 0)
        found_inf.copy_(torch.where(keep, found_inf, torch.ones_like(found_inf)))
