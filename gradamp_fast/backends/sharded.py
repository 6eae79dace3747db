"""Steps on gradients that are spread over processes: measured here, added up, committed alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference
from ..call import Call, Outcome, Updated
from ..model.gradients import GradientReader
from ..model.members import Members
from ..model.plan import Plan
from ..model.shards import group_of
from ..options import Rules
from ..reference import Sums
from ..reference.state import GLOBAL_FIELDS, LAYER_FIELDS, State
from .stepping import Measuring, Stepping

# A sum of squared deviations below this share of the sum of squares is nothing but the rounding of
# the latter: 1e-13 is 450 times fp64's resolution.
_RESOLUTION = 1e-13
# What backends write has a column more than Sums: csrc/rules/state.h pads its rows.
SUMS_COLUMNS = 8


class ShardedBackend(Stepping):
    """Makes the steps of a plan some of whose parameters are DTensors.

    A backend measures the parts that are here, and multiplies them where that needs no sums. One
    all-reduce over all processes that hold parts adds up every layer; then each process commits
    the same numbers. A part that several processes hold counts in each of them divided by their
    number. So all processes get the same bits, and what one of them alone found to be non-finite
    is known to all. Where nothing waits for the sums the all-reduce runs on until ``settle``.
    """

    def __init__(self, measuring: type[Measuring], plan: Plan, state: State, rules: Rules) -> None:
        self.plan, self.state, self.rules = plan, state, rules
        self.reader = GradientReader(plan, state.device, state.members, rules.needs_norm)
        self.group = group_of(slot.shard for slot in plan.slots if slot.shard is not None)
        self.copies = [
            self.group.size() if slot.shard is None else slot.shard.copies for slot in plan.slots
        ]
        parts = _parts(plan, self.copies)
        owners = {
            part.layer: (slot.layer, copies)
            for part, slot, copies in zip(parts.slots, plan.slots, self.copies, strict=True)
            if slot.layer >= 0
        }
        layers = [layer for layer, _ in owners.values()]
        self.part_layer = torch.tensor(layers, device=state.device)
        self.part_copies = state.values.new_tensor([[copies] for _, copies in owners.values()])
        self.members = _members(layers).to(state.device)
        # What the measuring backend sees of the state: the same sketch, a row for each part.
        self.seen = copy.copy(state)
        self.seen.values = state.values.new_zeros(
            len(GLOBAL_FIELDS) + len(LAYER_FIELDS) * len(layers)
        )
        self.seen.members = Members(parts)  # it is the whole layers' that count
        self.sums = state.values.new_zeros((len(layers) + 1, SUMS_COLUMNS))
        self.measuring = measuring(parts, self.seen, rules)
        self._pending: Callable[[], None] | None = None

    def step(self, call: Call) -> Outcome:
        gradients = self.reader.read(call)
        if isinstance(gradients, Outcome):
            return gradients
        self.settle()
        state, rules = self.state, self.rules
        updated = self.reader.updated(call)
        state.heed_members(self.plan)
        before = reference.standing(state, rules, call)
        self._measure(gradients, call, None if rules.two_phases else updated)
        added_up = self._add_up(gradients, before)
        if rules.two_phases:
            sums, excluded = added_up()
            reference.finish(self.plan, state, rules, gradients, call, before, sums, excluded, None)
        else:
            measured = reference.touched(self.plan, gradients)

            def commit() -> None:
                sums = added_up()[0]
                counted = reference.commit(self.plan, state, rules, sums, measured, before, call)
                reference.mark_found_inf(call.found_inf, counted)

            self._pending = commit
            if call.found_inf is not None:
                self.settle()
        self.reader.write_back(call)
        # A DTensor has a version of its own; which ones were written is known on the device only.
        torch.autograd.graph.increment_version(
            [
                gradient if call.update is None else slot.parameter
                for slot in self.plan.slots
                if slot.shard is not None and (gradient := slot.parameter.grad) is not None
            ]
        )
        return Outcome.DONE

    def settle(self) -> None:
        """Waits for the sums of the last step and commits them."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending()

    def found_anywhere(self, layers: Sequence[int]) -> list[int]:
        """A collective."""
        found = torch.zeros(len(self.plan.layers), device=self.state.device)
        found[list(layers)] = 1.0
        dist.all_reduce(found, group=self.group)
        return found.nonzero().flatten().tolist()

    def _measure(
        self,
        gradients: Sequence[Tensor | None],
        call: Call,
        updated: Sequence[Updated | None] | None,
    ) -> None:
        self.seen.values[: len(GLOBAL_FIELDS)] = self.state.values[: len(GLOBAL_FIELDS)]
        self.seen.layers.copy_(self.state.layers[self.part_layer])
        self.measuring.measure(gradients, call, self.sums, updated)

    def _add_up(
        self, gradients: Sequence[Tensor | None], before: reference.Standing
    ) -> Callable[[], tuple[Sums, Tensor]]:
        """Starts the all-reduce; what is returned waits for it.

        That is every layer's sums, and the sum of squares of excluded gradients.
        """
        rows = additive(self.sums[:-1, : len(Sums._fields)]) / self.part_copies
        last = torch.zeros_like(rows[:1])
        table = torch.cat((rows, last))[self.members].sum(dim=1)
        if self.rules.needs_norm:
            excluded = reference.excluded_squares(self.plan, gradients, before.inverse, self.copies)
            last[:, Sums._fields.index("m2")] = excluded
        table = torch.cat((table, last)).masked_fill_(before.skipped, torch.nan)
        work = dist.all_reduce(table, group=self.group, async_op=True)

        def wait() -> tuple[Sums, Tensor]:
            work.wait()
            return not_additive(table[:-1]), table[-1, Sums._fields.index("m2")]

        return wait


# ---- sums that can be added ---------------------------------------------------------


def additive(rows: Tensor) -> Tensor:
    """Count, mean and squared deviations as count, sum and sum of squares: [n, 7] -> [n, 7]."""
    numel, mean, m2, *sketch = rows.unbind(1)
    return torch.stack((numel, numel * mean, m2 + numel * mean.square(), *sketch), dim=1)


def not_additive(table: Tensor) -> Sums:
    """The reverse, of sums over processes. fp64 keeps ten digits of m2 where |mean| is 1000 times
    the deviation; what is less than all digits of the squares resolve is none."""
    numel, total, squares, *sketch = table.unbind(1)
    mean = torch.where(numel == 0, 0.0, total / numel)
    m2 = squares - numel * mean.square()
    return Sums(numel, mean, torch.where(m2 < _RESOLUTION * squares, 0.0, m2), *sketch)


# ---- parts of layers ----------------------------------------------------------------


def _parts(plan: Plan, copies: Sequence[int]) -> Plan:
    """The same slots in finer layers: neighbours that as many processes hold."""
    numbers: list[int] = []
    for index, slot in enumerate(plan.slots[: plan.measured]):
        like_last = index > 0 and (slot.layer, copies[index]) == (
            plan.slots[index - 1].layer,
            copies[index - 1],
        )
        numbers.append(numbers[-1] + (not like_last) if numbers else 0)
    numbers += [-1] * (len(plan.slots) - plan.measured)
    count = max(numbers) + 1
    return replace(
        plan,
        layers=tuple(map(str, range(count))),
        layer_numel=(0,) * count,
        slots=tuple(replace(s, layer=n) for s, n in zip(plan.slots, numbers, strict=True)),
    )


def _members(layers: Sequence[int]) -> Tensor:
    """Indices of each layer's parts, filled up with the number of parts: int64 [layers, most]."""
    of = [[p for p, own in enumerate(layers) if own == layer] for layer in range(layers[-1] + 1)]
    most = max(map(len, of))
    return torch.tensor(
        [members + [len(layers)] * (most - len(members)) for members in of], device="cpu"
    )
