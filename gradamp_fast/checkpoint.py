"""State to dictionary and back, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import reference
from .model.plan import Plan, Slot
from .model.shards import group_of
from .model.walk import WRAPPERS
from .options import Options
from .reference.state import GLOBAL_FIELDS, LAYER_FIELDS, State

SCHEMA = 3
# What came with schema 3; a state dict of schema 2 is one without growth.
_NEW_OPTIONS = {"grow": False, "max_factor": None}
_NEW_FIELDS = {"member_numel", "factor", "settled", "least_variance"}
# Which optimizer a layer has is the program's to say, not a checkpoint's.
_STORED = [name for name in LAYER_FIELDS if name != "on_update"]
_NEW_GLOBALS = {"round_skipped", "gated", "rising"}
_KEYS = ("schema", "options", "fields", "layers", "globals", "state", "sketches", "cuts")


def save(plan: Plan, state: State, options: Options) -> dict[str, Any]:
    """A snapshot: plain values, and tensors on the CPU.

    Keys: ``schema``; ``options``; ``fields`` and ``globals``, names of the numbers in
    ``state``; ``layers``, name to number of elements; ``state``: fp64 [globals + layers x
    fields]; ``sketches``: parameter name to the running means of its buckets, fp32 [buckets];
    ``cuts``: of each sharded parameter name, how it is cut, where its parts start, and how many
    buckets each has; ``members``: of each parameter that is a member of its layer its name and the
    order of its dimensions in memory, None if that is row-major. With sharded parameters a
    collective.
    """
    members = state.members
    sketches, cuts = _put_together(plan, state.means(plan))
    return {
        "schema": SCHEMA,
        "options": options.to_checkpoint(),
        "fields": _STORED,
        "globals": list(GLOBAL_FIELDS),
        "layers": dict(zip(plan.layers, plan.layer_numel, strict=True)),
        "state": _numbers(state.on_host()),
        "sketches": sketches,
        "cuts": cuts,
        "members": [
            [slot.name, None if order is None else list(order)]
            for slot, flag, order in zip(plan.slots, members.flags, members.orders, strict=False)
            if flag
        ],
    }


def _numbers(state: State) -> Tensor:
    """What is stored of the state's numbers: fp64 [globals + layers x fields]."""
    layers = torch.stack([state.column(name) for name in _STORED], dim=1)
    return torch.cat((state.values[: len(GLOBAL_FIELDS)], layers.flatten()))


def load(stored: Mapping[str, Any], plan: Plan, state: State, options: Options) -> int:
    """Writes a snapshot into the state and returns its epoch, -1 if none was set.

    ValueError, and nothing written, if it does not fit.
    """
    keys = _KEYS if stored.get("schema") == 2 else (*_KEYS, "members")
    if missing := [key for key in keys if key not in stored]:
        raise ValueError(f"not the state dict of an Amplifier: {', '.join(missing)} missing")
    fields, numbers = _fields(stored)
    of_options = (
        stored["options"] if stored["schema"] == SCHEMA else _NEW_OPTIONS | stored["options"]
    )
    _check_options(of_options, options)
    stored = _without_wrappers(stored, plan)
    _check_layers(stored, plan)
    parts = _taken_apart(plan, stored)
    values = stored["state"]
    size = len(numbers) + len(fields) * len(plan.layers)
    if not isinstance(values, torch.Tensor) or values.shape != (size,):
        raise ValueError("state has the wrong shape for its layers: the state dict is damaged")

    values = values.to(state.values)
    rows = values[len(numbers) :].view(-1, len(fields))
    order = {name: index for index, name in enumerate(stored["layers"])}
    rows = rows[[order[name] for name in plan.layers]]
    state.reset()
    for index, name in enumerate(numbers):
        state.scalar(name).copy_(values[index])
    for index, name in enumerate(fields):
        state.column(name).copy_(rows[:, index])
    state.take_means(plan, parts)
    state.members.clear()
    orders = dict(stored.get("members", ()))
    for index, slot in enumerate(plan.slots[: plan.measured]):
        if slot.name in orders:
            order = orders[slot.name]
            state.members.set(index, None if order is None else tuple(order), seen=False)
    return int(state.scalar("epoch"))


def _fields(stored: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the numbers of a layer, and of those of all. ValueError for another schema."""
    new = {2: (_NEW_FIELDS, _NEW_GLOBALS), SCHEMA: (set[str](), set[str]())}.get(stored["schema"])
    if new is not None:
        fields = [name for name in _STORED if name not in new[0]]
        numbers = [name for name in GLOBAL_FIELDS if name not in new[1]]
        if list(stored["fields"]) == fields and list(stored["globals"]) == numbers:
            return fields, numbers
    raise ValueError(
        f"the state dict has schema {stored['schema']!r}, this version of gradamp_fast reads "
        f"schema {SCHEMA}, and 2"
    )


def _without_wrappers(stored: Mapping[str, Any], plan: Plan) -> Mapping[str, Any]:
    """The snapshot with names as they are without the wrapper that it was taken under."""
    for prefix in sorted(set(WRAPPERS.values())):
        ours = any(name == prefix or name.startswith(f"{prefix}.") for name in plan.layers)
        if not ours and all(f"{name}.".startswith(f"{prefix}.") for name in stored["layers"]):
            cut = len(prefix) + 1
            return {
                **stored,
                "layers": {name[cut:]: numel for name, numel in stored["layers"].items()},
                "sketches": {name[cut:]: means for name, means in stored["sketches"].items()},
                "cuts": [[name[cut:], *rest] for name, *rest in stored["cuts"]],
                "members": [[name[cut:], order] for name, order in stored.get("members", ())],
            }
    return stored


def _check_options(stored: Mapping[str, Any], options: Options) -> None:
    ours = options.to_checkpoint()
    differing = [
        f"{name} was {stored.get(name, 'not there')!r} and is {ours.get(name, 'not there')!r}"
        for name in {**stored, **ours}
        if name not in stored or name not in ours or stored[name] != ours[name]
    ]
    if differing:
        raise ValueError(f"the state dict was made with other options: {'; '.join(differing)}")


def _check_layers(stored: Mapping[str, Any], plan: Plan) -> None:
    theirs: Mapping[str, int] = stored["layers"]
    ours = dict(zip(plan.layers, plan.layer_numel, strict=True))
    faults = {
        "missing layers": [name for name in ours if name not in theirs],
        "unexpected layers": [name for name in theirs if name not in ours],
        "layers of another size": [n for n in ours if theirs.get(n, ours[n]) != ours[n]],
    }
    means: Mapping[str, Any] = stored["sketches"]
    slots = {slot.name: slot for slot in plan.slots[: plan.measured]}
    cuts = _cuts(stored)
    faults["parameters whose sketch does not fit"] = [
        name
        for name in {**means, **slots}
        if name not in slots
        or not isinstance(means.get(name), torch.Tensor)
        or means[name].shape != (_stored_buckets(slots[name], cuts.get(name)),)
    ]
    found = [f"{what}: {', '.join(map(repr, names))}" for what, names in faults.items() if names]
    if found:
        raise ValueError(f"the state dict is of another model; {'; '.join(found)}")


# ---- sharded parameters -------------------------------------------------------------


class Cut(NamedTuple):
    """How a parameter was cut; the same on all processes."""

    name: str
    how: str  # Shard.how
    starts: list[int] | None  # Shard.starts
    buckets: list[int]  # of each part


def _cuts(stored: Mapping[str, Any]) -> dict[str, Cut]:
    return {cut[0]: Cut(*cut) for cut in stored["cuts"]}


def _put_together(
    plan: Plan, means: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[list[Any]]]:
    """Every tensor's running means, whole, and where they were cut; ``means`` on the CPU."""
    together = dict(means)
    slots = [s for s in plan.slots[: plan.measured] if s.shard is not None]
    if not slots:
        return together, []
    mine = {
        slot.name: (slot.shard.index, _with_signs_of_the_whole(slot, together[slot.name]))
        for slot in slots
        if slot.shard is not None and slot.shard.index >= 0
    }
    group = group_of(slot.shard for slot in plan.slots if slot.shard is not None)
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    cuts: list[list[Any]] = []
    for slot in slots:
        assert slot.shard is not None
        of = dict(parts[slot.name] for parts in everyone if slot.name in parts)
        parts = [of[index] for index in sorted(of)]
        together[slot.name] = torch.cat(parts)
        starts = None if slot.shard.starts is None else list(slot.shard.starts)
        cuts.append(list(Cut(slot.name, slot.shard.how, starts, [p.numel() for p in parts])))
    return together, cuts


def _taken_apart(plan: Plan, stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """This process's part of each tensor's running means. ValueError if they were cut amiss."""
    cuts = _cuts(stored)
    parts = {}
    for slot in plan.slots[: plan.measured]:
        cut, whole = cuts.get(slot.name), stored["sketches"][slot.name]
        if cut is None and slot.shard is None:
            parts[slot.name] = whole
            continue
        how = None if slot.shard is None else slot.shard.how
        if how == (cut and cut.how):
            before = sum(cut.buckets[: slot.shard.index]) if cut and slot.shard else 0
        elif slot.seamless and (cut is None or slot.may_be_cut_at(cut.starts)):
            before = (0 if slot.shard is None else slot.shard.first) >> slot.bucket_log2
        else:
            raise ValueError(
                f"the sketch of parameter {slot.name!r} was cut as {cut.how if cut else 'whole'} "
                f"and cannot be cut as {how or 'whole'}: both would have to cut dimension 0 alone, "
                f"at multiples of {slot.cut_unit} elements; load it with the processes and "
                "placements that it was saved with"
            )
        parts[slot.name] = _with_signs_of_the_whole(slot, whole[before:][: slot.buckets])
    return parts


def _stored_buckets(slot: Slot, cut: Cut | None) -> int:
    return -(-slot.total >> slot.bucket_log2) if cut is None else sum(cut.buckets)


def _with_signs_of_the_whole(slot: Slot, means: Tensor) -> Tensor:
    """Buckets of one element, between the signs of this part and those of the whole tensor.

    A part's signs begin with a word of 32, wherever it begins.
    """
    if slot.bucket_log2 > 0 or slot.shard is None or slot.shard.starts is None:
        return means
    skipped = slot.shard.first - 32 * slot.first_word
    signs = reference.signs(skipped + slot.numel, means.device, slot.first_word)
    return means * (signs[skipped:] * signs[: slot.numel])
