"""Which parameter belongs to which layer, and where its sketch lies. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn import Parameter

from .shards import Shard, local, shard_of

# A tensor's buckets begin at a multiple of this in a row of the sketch: at 64 bytes, so that the
# widest vectors find them aligned.
BUCKET_ALIGNMENT = 16
Member = tuple[str, Parameter, str | None]  # with its name and its layer's, None if excluded
SIGN_WORD = 32  # elements whose signs are the bits of one hash
SHORT_BUCKET_LOG2, LONG_BUCKET_LOG2 = 4, 9  # buckets of 16 and of 512 elements


@dataclass(eq=False, slots=True)
class Slot:
    """One parameter as a step sees it. Never changed; frozen, it would take three times as long.

    Attributes:
        name: full parameter name without what wrappers add.
        layer: index into ``Plan.layers``; -1 for an excluded parameter, which is unscaled,
            normed and clipped, but not measured.
        numel: real elements of its gradient that are here; a complex element counts twice.
        total: real elements of the whole gradient.
        bucket_log2: its buckets hold ``2**bucket_log2`` elements.
        first_bucket: where they begin in a row of the sketch.
        shard: how it is spread over processes; None for a plain tensor.
    """

    name: str
    parameter: Parameter
    layer: int
    numel: int
    total: int
    bucket_log2: int
    first_bucket: int
    shard: Shard | None

    @property
    def buckets(self) -> int:
        return -(-self.numel >> self.bucket_log2)

    @property
    def cut_unit(self) -> int:
        """Parts of the tensor that begin at its multiples have the buckets of the whole."""
        return max(1 << self.bucket_log2, SIGN_WORD) if self.bucket_log2 else 1

    @property
    def first_word(self) -> int:
        """Index of the first word of signs that is here: of the first element, divided by 32."""
        return 0 if self.shard is None else self.shard.first // SIGN_WORD

    @property
    def seamless(self) -> bool:
        """Whether the parts' buckets, one after another, are those of the whole tensor."""
        return self.shard is None or self.may_be_cut_at(self.shard.starts)

    def may_be_cut_at(self, starts: Sequence[int] | None) -> bool:
        """Whether parts that start there have the buckets and signs of the whole tensor."""
        return starts is not None and all(
            start % self.cut_unit == 0 for start in starts if start < self.total
        )

    def is_like(self, other: Slot) -> bool:
        """Whether the running means of one are those of the other."""
        return self.name == other.name and self.total == other.total and self.shard == other.shard


@dataclass(frozen=True, eq=False)
class Plan:
    """All parameters: measured ones first, grouped by ascending layer, then excluded ones.

    Attributes:
        layers: names of the layers.
        layer_numel: elements of each layer, wherever they are.
        measured: ``slots[:measured]`` belong to a layer.
        buckets: length of a row of the sketch.
        watched: parameters that were frozen when the model was walked.
    """

    layers: tuple[str, ...]
    layer_numel: tuple[int, ...]
    slots: tuple[Slot, ...]
    measured: int
    buckets: int
    watched: tuple[Parameter, ...]

    @cached_property
    def measured_names(self) -> tuple[str, ...]:
        return tuple(slot.name for slot in self.slots[: self.measured])

    @cached_property
    def measured_buckets(self) -> tuple[int, ...]:
        return tuple(slot.buckets for slot in self.slots[: self.measured])

    @cached_property
    def spans(self) -> tuple[int, ...]:
        """Buckets of a row of the sketch from each measured tensor's first to the next one's."""
        return tuple(map(_aligned, self.measured_buckets))

    @cached_property
    def slots_of(self) -> tuple[tuple[int, ...], ...]:
        """Indices of each layer's slots that have elements."""
        out: list[list[int]] = [[] for _ in self.layers]
        for index, slot in enumerate(self.slots[: self.measured]):
            if slot.total > 0:
                out[slot.layer].append(index)
        return tuple(map(tuple, out))

    @property
    def sharded(self) -> bool:
        """Whether gradients are spread over processes."""
        return any(slot.shard is not None for slot in self.slots)

    def without_parameters(self) -> Plan:
        """The same with stand-ins, of no size, for the parameters."""
        nothing = Parameter(torch.empty(0, device="cpu"), requires_grad=False)
        slots = tuple(replace(slot, parameter=nothing) for slot in self.slots)
        return replace(self, slots=slots, watched=())

    def laid_out_like(self, other: Plan) -> bool:
        """Whether a state of one is a state of the other."""
        return (
            self.layers == other.layers
            and len(self.slots) == len(other.slots)
            and all(
                a.layer == b.layer and a.is_like(b)
                for a, b in zip(self.slots, other.slots, strict=True)
            )
        )

    def serves_the_same(self, other: Plan) -> bool:
        """Whether both bind the same parameters in the same way."""
        return (
            self.laid_out_like(other)
            and all(
                a.parameter is b.parameter for a, b in zip(self.slots, other.slots, strict=True)
            )
            and {id(p) for p in self.watched} == {id(p) for p in other.watched}
        )


def bucket_log2(numel: int) -> int:
    """Buckets hold 1, 16 or 512 elements, by the size of their tensor.

    So small tensors have buckets enough for a cosine, and the sketch of a large one is below 1 %
    of its size.
    """
    if numel < 4096:
        return 0
    return SHORT_BUCKET_LOG2 if numel < 131072 else LONG_BUCKET_LOG2


def _aligned(buckets: int) -> int:
    return -(-buckets // BUCKET_ALIGNMENT) * BUCKET_ALIGNMENT


def make_plan(members: Sequence[Member], watched: Iterable[Parameter]) -> Plan:
    """A plan from parameters in model order."""
    layers = list(dict.fromkeys(layer for _, _, layer in members if layer is not None))
    index: dict[str | None, int] = {name: number for number, name in enumerate(layers)}
    slots: list[Slot] = []
    layer_numel = [0] * len(layers)
    measured = next_bucket = 0
    for name, parameter, layer in sorted(members, key=lambda m: index.get(m[2], len(layers))):
        shard = shard_of(name, parameter)
        reals = 2 if parameter.is_complex() else 1
        total = parameter.numel() * reals
        numel = total if shard is None else local(parameter).numel() * reals
        number, log2 = index.get(layer, -1), bucket_log2(total)
        first = next_bucket if number >= 0 else 0
        # By place: by name it would take three times as long.
        slot = Slot(name, parameter, number, numel, total, log2, first, shard)
        slots.append(slot)
        if number < 0:
            continue
        measured += 1
        layer_numel[number] += total
        next_bucket += _aligned(slot.buckets)
    return Plan(
        layers=tuple(layers),
        layer_numel=tuple(layer_numel),
        slots=tuple(slots),
        measured=measured,
        buckets=max(next_bucket, BUCKET_ALIGNMENT),
        watched=tuple(watched),
    )
