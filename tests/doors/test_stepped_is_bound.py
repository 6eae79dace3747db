"""Parameters that enter an attached optimizer, or leave it, and models that grow."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Place
from factors import ALWAYS, LAGGED, backward, factors, network, only, sgd, steps
from torch import nn

from gradamp_fast import Amplifier

Running = tuple[nn.Sequential, torch.optim.SGD, Amplifier]


@pytest.fixture
def running(place: Place) -> Running:
    """Two steps into a training; everything is amplified."""
    model = network(place.device)
    optimizer = sgd(model.parameters())
    amplifier = place.amplifier(model, **ALWAYS)
    amplifier.attach(optimizer)
    for _ in range(2):
        take(model, optimizer)
    return model, optimizer, amplifier


def take(
    model: nn.Module, optimizer: torch.optim.Optimizer, set_to_none: bool = True
) -> dict[str, float]:
    optimizer.zero_grad(set_to_none)
    raw = backward(model)
    optimizer.step()
    return factors(model, raw)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def late(model: nn.Module, size: int = 5) -> nn.Linear:
    return nn.Linear(size, size).to(device_of(model))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_layer_and_a_group_are_added(running: Running, set_to_none: bool) -> None:
    model, optimizer, amplifier = running
    model.append(late(model))
    optimizer.add_param_group({"params": model[5].parameters()})
    assert set(take(model, optimizer, set_to_none).values()) == {2.0}
    assert steps(amplifier) == {"0": 3, "2": 3, "4": 3, "5": 1}


def test_a_layer_and_a_group_are_added_under_lagged_timing(place: Place) -> None:
    model = network(place.device)
    optimizer = sgd(model.parameters())
    amplifier = place.amplifier(model, **LAGGED)
    amplifier.attach(optimizer)
    take(model, optimizer)
    model.append(late(model))
    optimizer.add_param_group({"params": model[5].parameters()})
    first, second = take(model, optimizer), take(model, optimizer)
    assert (first["0.weight"], first["5.weight"]) == (2.0, 1.0)
    assert set(second.values()) == {2.0}
    assert steps(amplifier) == {"0": 3, "2": 3, "4": 3, "5": 2}


def put_in_place(group: dict[str, Any], old: nn.Parameter, new: nn.Parameter) -> None:
    index = next(i for i, p in enumerate(group["params"]) if p is old)
    group["params"][index] = new


def put_in_a_new_list(group: dict[str, Any], old: nn.Parameter, new: nn.Parameter) -> None:
    group["params"] = [new if p is old else p for p in group["params"]]


def remove_and_append(group: dict[str, Any], old: nn.Parameter, new: nn.Parameter) -> None:
    group["params"][:] = [p for p in group["params"] if p is not old] + [new]


Entry = Callable[[dict[str, Any], nn.Parameter, nn.Parameter], None]
ENTRIES: list[Entry] = [put_in_place, put_in_a_new_list, remove_and_append]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("enter", ENTRIES)
def test_densification(running: Running, enter: Entry, set_to_none: bool) -> None:
    """Gaussian splatting: more rows in a parameter, again and again, old ones let go."""
    model, optimizer, amplifier = running
    for step in range(3):
        old = model[2].weight
        grown = torch.cat([old.detach(), old.detach()[:2]])
        model[2].weight = nn.Parameter(grown)
        enter(optimizer.param_groups[0], old, model[2].weight)
        gone = weakref.ref(old)
        del old
        assert set(take(model, optimizer, set_to_none).values()) == {2.0}, step
        gc.collect()
        assert gone() is None
    found = steps(amplifier)
    assert found["0"] == 5
    assert found["2"] == 1  # another set of elements


@pytest.mark.parametrize("enter", ENTRIES)
def test_densification_between_backward_and_step(running: Running, enter: Entry) -> None:
    """The new parameter gets its gradient by hand, as the old one's rows."""
    model, optimizer, _ = running
    optimizer.zero_grad()
    raw = backward(model)
    old = model[2].weight
    model[2].weight = nn.Parameter(old.detach().repeat(2, 1))
    model[2].weight.grad = old.grad.repeat(2, 1)
    raw["2.weight"] = raw["2.weight"].repeat(2, 1)
    enter(optimizer.param_groups[0], old, model[2].weight)
    optimizer.step()
    assert only(model, raw) == 2.0


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("size", ["same", "other"])
def test_a_replaced_head(running: Running, size: str, set_to_none: bool) -> None:
    model, optimizer, amplifier = running
    old = model[4].weight
    model[4] = nn.Linear(5, 3 if size == "same" else 7, bias=False).to(device_of(model))
    put_in_place(optimizer.param_groups[0], old, model[4].weight)
    assert set(take(model, optimizer, set_to_none).values()) == {2.0}
    assert steps(amplifier) == {"0": 3, "2": 3, "4": 3 if size == "same" else 1}


def test_a_replaced_head_and_a_new_optimizer(running: Running) -> None:
    model, _, amplifier = running
    model[4] = nn.Linear(5, 7, bias=False).to(device_of(model))
    optimizer = sgd(model.parameters())
    amplifier.attach(optimizer)
    assert set(take(model, optimizer).values()) == {2.0}


def test_a_parameter_that_left_the_optimizer(running: Running) -> None:
    """It is no longer measured, multiplied or held."""
    model, optimizer, amplifier = running
    optimizer.param_groups[0]["params"].pop()
    model.zero_grad()  # the optimizer's no longer covers it
    assert take(model, optimizer)["4.weight"] == 1.0
    assert steps(amplifier).get("4", 2) == 2
    gone = weakref.ref(model[4].weight)
    model[4] = nn.Identity()
    with pytest.warns(UserWarning, match="no longer in the model"):
        amplifier.rebind()
    gc.collect()
    assert gone() is None


def test_a_group_is_switched_off_and_on_in_mid_run(running: Running) -> None:
    model, optimizer, _ = running
    optimizer.param_groups[0]["amplify"] = False
    optimizer.add_param_group({"params": []})
    moved = [optimizer.param_groups[0]["params"].pop() for _ in range(2)]
    optimizer.param_groups[1]["params"] = moved
    found = take(model, optimizer)
    ours = {id(p) for p in moved}
    assert found == {n: 2.0 if id(p) in ours else 1.0 for n, p in model.named_parameters()}
    optimizer.param_groups[0]["amplify"] = True
    assert set(take(model, optimizer).values()) == {2.0}


def test_replaced_with_gradients_in_place_is_bound_within_100_steps(place: Place) -> None:
    """Stepped by hand: no optimizer tells, and the old parameter keeps its gradient."""
    model = network(place.device)
    amplifier = place.amplifier(model, **ALWAYS)
    backward(model)
    amplifier.step()
    held = model[2].weight
    model[2].weight = nn.Parameter(held.detach().clone())
    model.append(late(model))
    for _ in range(100):
        model.zero_grad()
        raw = backward(model)
        amplifier.step()
        if only(model, raw) == 2.0:
            break
    assert only(model, raw) == 2.0
    assert held.grad is not None


@pytest.mark.parametrize("door", ["step", "attach"])
def test_after_a_step_before_any_backward(place: Place, door: str) -> None:
    """Said once; new parameters are found all the same."""
    model = network(place.device)
    amplifier = place.amplifier(model, **ALWAYS)
    with pytest.warns(UserWarning, match="before backward"):
        amplifier.step()
    model.load_state_dict({n: p.clone() for n, p in model.state_dict().items()}, assign=True)
    optimizer = sgd(model.parameters())
    if door == "attach":
        amplifier.attach(optimizer)
    raw = backward(model)
    if door == "step":
        amplifier.step()
    optimizer.step()
    assert only(model, raw) == 2.0


@pytest.mark.parametrize("how", ["module", "all parameters", "to"])
def test_after_a_step_before_any_backward_the_model_changes(place: Place, how: str) -> None:
    model = network(place.device)
    amplifier = place.amplifier(model, **ALWAYS)
    with pytest.warns(UserWarning, match="before backward"):
        amplifier.step()
    amplifier.step()
    if how == "module":
        model[2] = late(model)
    elif how == "all parameters":
        for module in (model[0], model[2], model[4]):
            module.weight = nn.Parameter(module.weight.detach().clone())
    else:
        model.to(torch.float64)
    raw = backward(model)
    amplifier.step()
    assert only(model, raw) == 2.0
