"""Which parameter belongs to which layer, and where its sketch lies. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch.nn import Parameter

BUCKET_ALIGNMENT = 16  # a tensor's buckets begin at a multiple of this in a row of the sketch


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter as a step sees it.

    Attributes:
        name: full parameter name without what wrappers add.
        layer: index into ``Plan.layers``; -1 for an excluded parameter, which is unscaled,
            normed and clipped, but not measured.
        numel: real elements of its gradient; a complex element counts twice.
        bucket_log2: its buckets hold ``2**bucket_log2`` elements.
        first_bucket: where they begin in a row of the sketch.
    """

    name: str
    parameter: Parameter
    layer: int
    numel: int
    bucket_log2: int
    first_bucket: int

    @property
    def buckets(self) -> int:
        return -(-self.numel >> self.bucket_log2)


@dataclass(frozen=True, eq=False)
class Plan:
    """All parameters: measured ones first, grouped by ascending layer, then excluded ones.

    Attributes:
        layers: names of the layers.
        layer_numel: elements of each layer.
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

    def laid_out_like(self, other: Plan) -> bool:
        """Whether a state of one is a state of the other."""
        return self.layers == other.layers and [
            (slot.name, slot.layer, slot.numel) for slot in self.slots
        ] == [(slot.name, slot.layer, slot.numel) for slot in other.slots]

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
    """Buckets hold 1, 16 or 512 elements, by the size of their tensor."""
    return 0 if numel < 4096 else 4 if numel < 131072 else 9


def gradient_numel(parameter: Parameter) -> int:
    """Real elements of the parameter's gradient."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def make_plan(
    members: Sequence[tuple[str, Parameter, str | None]], watched: Iterable[Parameter]
) -> Plan:
    """A plan from (parameter name, parameter, layer name or None if excluded) in model order."""
    layers = list(dict.fromkeys(layer for _, _, layer in members if layer is not None))
    index = {name: number for number, name in enumerate(layers)}
    numbered = [
        (name, parameter, -1 if layer is None else index[layer])
        for name, parameter, layer in members
    ]
    numbered.sort(key=lambda member: member[2] if member[2] >= 0 else len(layers))
    slots: list[Slot] = []
    layer_numel = [0] * len(layers)
    next_bucket = 0
    for name, parameter, layer_index in numbered:
        numel = gradient_numel(parameter)
        measured = layer_index >= 0
        slot = Slot(
            name, parameter, layer_index, numel, bucket_log2(numel), next_bucket if measured else 0
        )
        slots.append(slot)
        if measured:
            layer_numel[layer_index] += numel
            next_bucket += -(-slot.buckets // BUCKET_ALIGNMENT) * BUCKET_ALIGNMENT
    return Plan(
        layers=tuple(layers),
        layer_numel=tuple(layer_numel),
        slots=tuple(slots),
        measured=sum(slot.layer >= 0 for slot in slots),
        buckets=max(next_bucket, BUCKET_ALIGNMENT),
        watched=tuple(watched),
    )
