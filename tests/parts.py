"""What every backend must make of a process's part of a gradient, without other processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import BASE, bare, same_bits
from oracle import bucket_sums

from gradamp_fast import Options
from gradamp_fast.backends.sharded import SUMS_COLUMNS, additive, not_additive
from gradamp_fast.call import Call
from gradamp_fast.model.plan import Plan
from gradamp_fast.model.shards import Shard
from gradamp_fast.model.walk import find_layers
from gradamp_fast.reference.state import State

# (elements, where it is cut): buckets of one element, of 16 and of 512; parts without elements;
# parts longer than a tile; a cut that is not at a word of signs.
CUTS = (
    (100, (0, 33, 66, 99)),
    (3, (0, 1, 2, 3, 3)),
    (8192, (0, 4096)),
    (40000, (0, 13344, 26688)),
    (300032, (0, 149504, 299008)),
)


def part_of(plan: Plan, starts: tuple[int, ...], index: int) -> Plan:
    """A plan of one parameter, of which only one part is here."""
    [slot] = plan.slots
    ends = (*starts[1:], slot.total)
    shard = Shard("", starts, index, 1, None)  # type: ignore[arg-type]
    return replace(plan, slots=(replace(slot, numel=ends[index] - starts[index], shard=shard),))


def parts(numel: int, starts: tuple[int, ...]) -> Iterator[tuple[Plan, slice]]:
    plan = find_layers(bare({"layer.w": (numel,)}), Options())
    for index, start in enumerate(starts):
        part = part_of(plan, starts, index)
        yield part, slice(start, start + part.slots[0].numel)


def check_parts(make: Callable[..., Any], numel: int, starts: tuple[int, ...], dtype: Any) -> None:
    """Sums of the parts are those of the whole; means are set aside; nothing is committed."""
    generator = torch.Generator().manual_seed(numel)
    whole = (torch.randn(numel, generator=generator, dtype=torch.float64) + 0.3).to(dtype)
    before = torch.randn(numel, generator=generator)  # running means, as many as there may be
    s = torch.from_numpy(bucket_sums(whole.double().numpy()))
    h = before[: s.numel()].double()
    weight = 1 / (1 + 0.99 * 3.0)
    after = (h + weight * (s - h)).float()
    total, seen, next_means = torch.zeros(1, 7, dtype=torch.float64), 0, []
    for plan, here in parts(numel, starts):
        slot, gradient = plan.slots[0], whole[here].clone()
        state = State(plan, 2.0, torch.device("cpu"))
        state.column("weight_sum").fill_(3.0)
        state.column("selected").fill_(1.0)
        state.parity.fill_(1)
        state.sketch[1, : slot.buckets] = before[seen : seen + slot.buckets]
        values = state.values.clone()
        sums = torch.full((2, SUMS_COLUMNS), torch.nan, dtype=torch.float64)
        make(plan, state, Options().rules()).measure([gradient], Call(), sums)
        total += additive(sums[:1, :7])
        assert same_bits(gradient, whole[here].clone().mul_(2.0))
        assert torch.equal(state.values.nan_to_num(), values.nan_to_num())
        assert state.parity == 1
        next_means.append(state.sketch[0, : slot.buckets].clone())
        seen += slot.buckets
    assert seen == s.numel()
    found, exact = not_additive(total), whole.double()
    v = exact.var(unbiased=False).item()
    assert found.numel.item() == numel
    assert found.mean.item() == pytest.approx(exact.mean().item(), rel=1e-6)
    assert found.m2.item() / numel == pytest.approx(v, rel=BASE.variance)
    if all(start % 32 == 0 for start in starts):
        torch.testing.assert_close(torch.cat(next_means), after, rtol=1e-5, atol=1e-5)
        dot = (s * h).sum().item()
        assert found.dot.item() == pytest.approx(dot, rel=BASE.sketch, abs=1e-4)
    for name, value in (("power", s), ("before", h)):
        expected = value.square().sum().item()
        assert getattr(found, name).item() == pytest.approx(expected, rel=BASE.sketch)


def check_left_alone(make: Callable[..., Any]) -> None:
    """A marked step writes nothing; one that needs its sums to multiply does not multiply."""
    plan = part_of(find_layers(bare({"layer.w": (9000,)}), Options()), (0, 4096), 1)
    for options, marked in (
        ({}, 1.0), ({"timing": "exact"}, 0.0), ({"max_norm": 0.1}, 0.0), ({"match_norm": True}, 1.0)
    ):  # fmt: skip
        state = State(plan, 2.0, torch.device("cpu"))
        state.column("selected").fill_(1.0)
        gradient, sums = torch.ones(4904), torch.zeros((2, SUMS_COLUMNS), dtype=torch.float64)
        scale, found_inf = torch.tensor([4.0]), torch.tensor([marked])
        before = [t.clone() for t in (state.values, state.parity)]
        make(plan, state, Options(**options).rules()).measure(
            [gradient], Call(scale, found_inf), sums
        )
        assert (gradient == 1).all()
        assert found_inf == marked
        assert torch.equal(before[0].nan_to_num(), state.values.nan_to_num())
        assert torch.equal(before[1], state.parity)
        if not marked:
            assert sums[0, :2].tolist() == [4904, 0.25]
