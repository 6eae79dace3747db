"""State to dictionary and back, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .options import Options
from .plan import Plan
from .state import FIELDS, GLOBALS, State

SCHEMA = 1
_KEYS = ("schema", "options", "fields", "layers", "globals", "state", "sketches")


def save(plan: Plan, state: State, options: Options) -> dict[str, Any]:
    """A snapshot: plain values, and tensors on the CPU.

    Keys: ``schema``; ``options``; ``fields`` and ``globals``, names of the numbers in
    ``state``; ``layers``, name to number of elements; ``state``: fp64 [globals + layers x
    fields]; ``sketches``: parameter name to the running means of its buckets, fp32 [buckets].
    """
    return {
        "schema": SCHEMA,
        "options": options.to_checkpoint(),
        "fields": list(FIELDS),
        "globals": list(GLOBALS),
        "layers": dict(zip(plan.layers, plan.layer_numel, strict=True)),
        "state": state.values.detach().cpu().clone(),
        "sketches": {name: means.cpu() for name, means in state.means(plan).items()},
    }


def load(stored: Mapping[str, Any], plan: Plan, state: State, options: Options) -> int:
    """Writes a snapshot into the state and returns its epoch, -1 if none was set.

    ValueError, and nothing written, if it does not fit.
    """
    if missing := [key for key in _KEYS if key not in stored]:
        raise ValueError(f"not the state dict of an Amplifier: {', '.join(missing)} missing")
    if stored["schema"] != SCHEMA or list(stored["fields"]) != list(FIELDS):
        raise ValueError(
            f"the state dict has schema {stored['schema']!r}, this version of gradamp_fast reads "
            f"schema {SCHEMA}"
        )
    _check_options(stored["options"], options)
    _check_layers(stored, plan)
    values = stored["state"]
    if not isinstance(values, torch.Tensor) or values.shape != state.values.shape:
        raise ValueError("state has the wrong shape for its layers: the state dict is damaged")

    state.values[: len(GLOBALS)] = values[: len(GLOBALS)].to(state.values)
    rows = values[len(GLOBALS) :].view(-1, len(FIELDS))
    order = {name: index for index, name in enumerate(stored["layers"])}
    state.layers.copy_(rows[[order[name] for name in plan.layers]])
    state.take_means(plan, stored["sketches"])
    return int(values[GLOBALS.index("epoch")])


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
    faults["parameters whose sketch does not fit"] = [
        name
        for name in {**means, **slots}
        if name not in slots
        or not isinstance(means.get(name), torch.Tensor)
        or means[name].shape != (slots[name].buckets,)
    ]
    found = [f"{what}: {', '.join(map(repr, names))}" for what, names in faults.items() if names]
    if found:
        raise ValueError(f"the state dict is of another model; {'; '.join(found)}")
