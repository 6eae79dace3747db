"""What the steps so far left behind, in three tensors on the gradients' device.

The lists of the state's fields and of the options' values stand here once. The compiled extension
has its own, in csrc/rules/state.h, which are compared with these before it is used; the constants
of the Triton kernels are made of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import get_args

import torch
from torch import Tensor

from ..model.members import Members
from ..model.plan import Plan
from ..options import Measure, ScheduleUnit, Select, Threshold

GLOBAL_FIELDS = (
    "step",  # calls so far, skipped ones included
    "skipped_steps",  # of these
    "epoch",  # -1: never set
    "threshold",  # of the last decision; NaN before the first
    "factor",
    "total_norm",  # before clipping
    "unmeasured_steps",  # with placement="backward": calls on top of "step", amplified ones
    "unmeasured_skipped",  # of these
    "round_skipped",  # 1: a call of the round under way, or of the last one, was skipped
    "gated",  # 0: no decision yet at which anything could grow, since the start or a release
    "rising",  # 1: the learning rate rises, so nothing grows or settles
)
LAYER_FIELDS = (
    "steps",  # k
    "weight_sum",  # W_k = 1 + decay W_{k-1}; the newest step weighs 1 / W_k
    "variance",  # V
    "power",  # Q: running mean of the sum of squared buckets
    "mean_power",  # R: sum of the squared running means
    "noise",  # F: what R would be if the steps were uncorrelated
    "agreement",  # D
    "selected",  # 0 or 1: the standing selection
    "amplified_steps",  # counted steps on which the layer was multiplied
    "changed_at",  # step number at which "selected" last changed
    "member_numel",  # elements of its members; 0: those of the first step that is measured
    "factor",  # what growth came to: a
    "settled",  # 0 or 1: it grows no more
    "least_variance",  # V_min; infinite before there is one, and where updates are multiplied
    "on_update",  # 1: an optimizer's update is multiplied, not the gradient
)
# A kernel is told a value by its place here.
ENUMS: dict[str, tuple[str, ...]] = {
    "measure": get_args(Measure),
    "threshold": get_args(Threshold),
    "select": get_args(Select),
    "schedule_unit": get_args(ScheduleUnit),
}
_AVERAGES = LAYER_FIELDS[: LAYER_FIELDS.index("selected")]
# What a layer begins with, where that is not 0.
FIRST = {"factor": 1.0, "least_variance": math.inf}


class State:
    """State of one plan; the tensors' addresses stay for life, everything writes in place.

    Attributes:
        values: fp64 [globals + layers x fields]: the globals, then each layer's fields.
        sketch: fp32 [2, buckets]: running means of the buckets, double-buffered.
        parity: int32 [measured tensors]: the row of ``sketch`` that holds a tensor's means.
        members: what the host knows of the layers' members.
    """

    def __init__(self, plan: Plan, factor: float, device: torch.device) -> None:
        self.factor = factor
        self.members = Members(plan)
        numbers = len(GLOBAL_FIELDS) + len(LAYER_FIELDS) * len(plan.layers)
        with torch.inference_mode(False):  # what is made under it could not be written outside
            self.values = torch.zeros(numbers, dtype=torch.float64, device=device)
            self.sketch = torch.zeros((2, plan.buckets), dtype=torch.float32, device=device)
            self.parity = torch.zeros(plan.measured, dtype=torch.int32, device=device)
        self._begin()

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def layers(self) -> Tensor:
        """View of the layers' fields: fp64 [layers, fields]."""
        return self.values[len(GLOBAL_FIELDS) :].view(-1, len(LAYER_FIELDS))

    def scalar(self, name: str) -> Tensor:
        """View of a global: fp64 []."""
        return self.values[GLOBAL_FIELDS.index(name)]

    def column(self, name: str) -> Tensor:
        """View of one field of all layers: fp64 [layers]."""
        return self.layers[:, LAYER_FIELDS.index(name)]

    def on_host(self) -> State:
        """A copy of the numbers on the CPU, without the sketch: one transfer."""
        host = State.__new__(State)
        host.factor, host.values = self.factor, self.values.to("cpu", copy=True)
        return host

    def reset(self) -> None:
        """Back to before the first step; which optimizers there are stands."""
        on_update = self.column("on_update").clone()
        for tensor in (self.values, self.sketch, self.parity):
            tensor.zero_()
        self.column("on_update").copy_(on_update)
        self.members.clear()
        self._begin()

    def _begin(self) -> None:
        """What is not 0 before the first step."""
        self.scalar("epoch").fill_(-1.0)
        self.scalar("threshold").fill_(float("nan"))
        self.scalar("factor").fill_(self.factor)
        for name, value in FIRST.items():
            self.column(name).fill_(value)

    def restart(self) -> None:
        """Averages and sketches begin anew; the selection, factors and the counters stand."""
        for name in _AVERAGES:
            self.column(name).zero_()
        self.column("least_variance").fill_(FIRST["least_variance"])
        self.sketch.zero_()

    def heed_members(self, plan: Plan) -> None:
        """Follows what came of the last look at the layers' members."""
        members = self.members
        anew, untold, members.anew, members.untold = members.anew, members.untold, [], []
        for layer in untold:
            numel = members.numel(plan, layer)
            self.layers[layer, LAYER_FIELDS.index("member_numel")].fill_(numel)
        self.begin_anew(plan, anew)

    def begin_anew(self, plan: Plan, layers: Sequence[int]) -> None:
        """These layers are as before their first step, with the members that they have now."""
        if layers and self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the step to be captured is the first in which other parameters than before have a "
                "gradient, or have it in another memory format: take one such step eagerly first"
            )
        for layer in layers:
            row = self.layers[layer]
            row[: LAYER_FIELDS.index("on_update")].zero_()
            first = {**FIRST, "member_numel": self.members.numel(plan, layer)}
            for name, value in first.items():
                row[LAYER_FIELDS.index(name)].fill_(value)
            for index in plan.slots_of[layer]:
                slot = plan.slots[index]
                self.sketch[:, slot.first_bucket :][:, : slot.buckets].zero_()

    def tell_updates(self, layers: Sequence[bool]) -> None:
        """Of which layers an optimizer's updates are multiplied, not the gradients.

        A layer of which that changes has no least variance.
        """
        on_update = torch.tensor(layers, dtype=torch.float64, device=self.device)
        changed = on_update != self.column("on_update")
        least = self.column("least_variance")
        least.copy_(torch.where(changed, FIRST["least_variance"], least))
        self.column("on_update").copy_(on_update)

    def release(self) -> None:
        """Every layer may grow again, from where it is, after a new look at the whole model."""
        self.scalar("gated").zero_()
        self.column("settled").zero_()
        self.column("least_variance").fill_(FIRST["least_variance"])

    def means(self, plan: Plan) -> dict[str, Tensor]:
        """Each measured tensor's running means by parameter name: views of one copy on the CPU."""
        means = self._newest_means(plan).cpu()
        used = means[_places(plan, [True] * plan.measured)]
        return dict(zip(plan.measured_names, used.split(plan.measured_buckets), strict=True))

    def take_means(self, plan: Plan, means: Mapping[str, Tensor]) -> None:
        """Writes running means, where given, into both rows, and 0 elsewhere."""
        given = [name in means for name in plan.measured_names]
        row = torch.zeros(self.sketch.shape[1], device="cpu")
        if any(given):
            places = _places(plan, given)
            parts = [means[name].cpu() for name in compress(plan.measured_names, given)]
            row[: len(places)][places] = torch.cat(parts).to(row)
        self.parity.zero_()
        self.sketch.copy_(row)

    def _newest_means(self, plan: Plan) -> Tensor:
        """The valid one of the two rows, tensor by tensor: fp32 [sum of the spans]."""
        spans = torch.tensor(plan.spans, device=self.device)
        newest = self.parity.repeat_interleave(spans, output_size=sum(plan.spans)).bool()
        sketch = self.sketch[:, : len(newest)]
        return sketch[1].where(newest, sketch[0])

    def inherit(self, plan: Plan, old: State, old_plan: Plan) -> None:
        """Takes over what another plan's state knows of this plan's layers, by name.

        A layer that lost a member, or one whose member has another size or is cut in another way,
        begins anew.
        """
        self.values[: len(GLOBAL_FIELDS)] = old.values[: len(GLOBAL_FIELDS)]
        inherited, changed = self._inherit_members(plan, old, old_plan)
        rows = {name: index for index, name in enumerate(old_plan.layers)}
        kept = [i for i, name in enumerate(plan.layers) if name in rows and i not in changed]
        theirs = [rows[plan.layers[index]] for index in kept]
        self.layers[kept] = old.layers[theirs].to(self.device)
        means = old._newest_means(old_plan).to(self.device)
        for (first, was), count in _runs(inherited):
            here, there = plan.slots[first].first_bucket, old_plan.slots[was].first_bucket
            length = sum(plan.spans[first : first + count])
            self.sketch[:, here : here + length] = means[there : there + length]
        self.begin_anew(plan, sorted(changed))

    def _inherit_members(
        self, plan: Plan, old: State, old_plan: Plan
    ) -> tuple[list[tuple[int, int]], set[int]]:
        """Takes over who is a member of which layer.

        Returns the slots that are, here and there, and the layers that lost one.
        """
        members = zip(old_plan.measured_names, old.members.flags, strict=True)
        lost = {name: index for index, (name, flag) in enumerate(members) if flag}
        inherited: list[tuple[int, int]] = []
        for index, slot in enumerate(plan.slots[: plan.measured]):
            was = lost.get(slot.name)
            if was is None:
                continue
            there = old_plan.slots[was]
            if slot.is_like(there) and plan.layers[slot.layer] == old_plan.layers[there.layer]:
                self.members.set(index, old.members.orders[was])
                inherited.append((index, was))
                del lost[slot.name]
        lacking = {old_plan.layers[old_plan.slots[was].layer] for was in lost.values()}
        return inherited, {index for index, name in enumerate(plan.layers) if name in lacking}


def _runs(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], int]]:
    """Pairs of which both numbers grow by one: the first pair, and how many there are."""
    begin = 0
    for end in range(1, len(pairs) + 1):
        here, there = pairs[end - 1]
        if end == len(pairs) or pairs[end] != (here + 1, there + 1):
            yield pairs[begin], end - begin
            begin = end


def _places(plan: Plan, wanted: Sequence[bool]) -> Tensor:
    """Where the buckets of the measured tensors that are wanted are in a row of the sketch.

    bool [sum of the spans], on the CPU; the gaps between tensors are nobody's.
    """
    buckets, spans, flags = (
        torch.tensor(of, device="cpu") for of in (plan.measured_buckets, plan.spans, wanted)
    )
    sizes = torch.stack((buckets, spans - buckets), dim=1).flatten()
    flags = torch.stack((flags, torch.zeros_like(flags)), dim=1).flatten()
    return flags.repeat_interleave(sizes, output_size=sum(plan.spans))
