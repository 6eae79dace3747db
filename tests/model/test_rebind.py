"""Parameters that freeze, thaw, arrive, are replaced, tied, swapped or gone."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import Place, Stream, bare, put, same_bits
from torch import nn

from gradamp_fast import Amplifier

SHAPES = {"a.w": (40, 3), "b.w": (50,), "b.v": (8,), "c.w": (60,)}
QUICK = {"measure": "variance", "min_steps": 1, "refresh": 1, "threshold": 1e9}


def steps(amplifier: Amplifier) -> dict[str, int]:
    return {layer.name: layer.steps for layer in amplifier.report().layers}


def take(amplifier: Amplifier, model: nn.Module, seed: int = 0) -> dict[str, bool]:
    """One step with fresh gradients; says which parameters it multiplied by 2."""
    stream = Stream(model, seed)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    gradients = {n: g for n, g in stream.next().items() if n in trainable}
    before = {n: g.clone() for n, g in gradients.items()}
    put(model, gradients)
    amplifier.step()
    doubled = {}
    for name, parameter in model.named_parameters():
        if name in before:
            doubled[name] = same_bits(parameter.grad, before[name] * 2)
            assert doubled[name] or same_bits(parameter.grad, before[name])
    return doubled


@pytest.fixture
def running(place: Place) -> tuple[nn.Module, Amplifier]:
    """A model after three steps; everything is selected."""
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **QUICK)
    for seed in range(3):
        take(amplifier, model, seed)
    return model, amplifier


Running = tuple[nn.Module, Amplifier]


def test_freezing_keeps_the_others(running: Running) -> None:
    model, amplifier = running
    model.a.w.requires_grad_(False)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        doubled = take(amplifier, model)
    assert doubled == {"b.w": True, "b.v": True, "c.w": True}
    found = steps(amplifier)
    assert found["b"] == found["c"] == 4


def test_unfreezing_starts_a_layer(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    model.a.w.requires_grad_(False)
    amplifier = place.amplifier(model, **QUICK)
    for seed in range(3):
        take(amplifier, model, seed)
    assert steps(amplifier) == {"b": 3, "c": 3}
    model.a.w.requires_grad_(True)
    assert take(amplifier, model) == {"a.w": False, "b.w": True, "b.v": True, "c.w": True}
    assert steps(amplifier) == {"a": 1, "b": 4, "c": 4}
    assert take(amplifier, model)["a.w"]


def test_replaced_parameter_keeps_its_state(running: Running) -> None:
    model, amplifier = running
    put(model, {})
    model.a.w = nn.Parameter(model.a.w.detach().clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(take(amplifier, model).values())
    assert steps(amplifier) == {"a": 4, "b": 4, "c": 4}


def test_replaced_module_keeps_its_state(running: Running) -> None:
    model, amplifier = running
    put(model, {})
    model.b = bare({"b.w": (50,), "b.v": (8,)}, device=model.a.w.device.type).b
    assert all(take(amplifier, model).values())
    assert steps(amplifier) == {"a": 4, "b": 4, "c": 4}


def test_replaced_by_another_size_starts_anew(running: Running) -> None:
    model, amplifier = running
    put(model, {})
    model.c.w = nn.Parameter(torch.zeros(61, device=model.a.w.device))
    doubled = take(amplifier, model)
    assert doubled["a.w"]
    assert doubled["b.w"]
    assert steps(amplifier) == {"a": 4, "b": 4, "c": 1}


def test_replacement_matches_a_run_that_was_never_replaced(place: Place) -> None:
    """Sketches and averages move along bit for bit."""
    reports = []
    for replace in (False, True):
        model = bare(SHAPES, device=place.device)
        amplifier = place.amplifier(model, min_steps=2, refresh=2)
        stream = Stream(model)
        for step in range(6):
            put(model, {})
            if replace and step == 3:
                model.b.w = nn.Parameter(model.b.w.detach().clone())
                model.a.w = nn.Parameter(model.a.w.detach().clone())
            put(model, stream.next())
            amplifier.step()
        reports.append(repr(amplifier.report()))
    assert reports[0] == reports[1]


def test_a_parameter_replaced_with_its_gradient_in_place_is_found_by_rebind(
    running: Running,
) -> None:
    model, amplifier = running
    model.a.w = nn.Parameter(model.a.w.detach().clone())
    amplifier.rebind()
    assert all(take(amplifier, model).values())
    assert steps(amplifier) == {"a": 4, "b": 4, "c": 4}


def test_late_parameters_are_bound_by_rebind(running: Running) -> None:
    model, amplifier = running
    model.add_module("late", bare({"w": (20,)}, device=model.a.w.device.type))
    amplifier.rebind()
    doubled = take(amplifier, model)
    assert doubled == {"a.w": True, "b.w": True, "b.v": True, "c.w": True, "late.w": False}
    assert steps(amplifier) == {"a": 4, "b": 4, "c": 4, "late": 1}


def test_late_parameters_are_bound_at_set_epoch(running: Running) -> None:
    model, amplifier = running
    model.add_module("late", bare({"w": (20,)}, device=model.a.w.device.type))
    amplifier.set_epoch(1)
    take(amplifier, model)
    assert steps(amplifier)["late"] == 1


def test_vanished_layers_go_with_one_warning(running: Running) -> None:
    model, amplifier = running
    del model.c
    with pytest.warns(UserWarning, match=r"\bc\b") as caught:
        amplifier.rebind()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(take(amplifier, model).values())
        amplifier.rebind()
    assert steps(amplifier) == {"a": 4, "b": 4}


def test_a_vanished_layer_is_noticed_in_a_step(running: Running) -> None:
    """The old parameter has lost its gradient; the tree is walked and the step goes on."""
    model, amplifier = running
    model.c.w.grad = None
    del model.c
    with pytest.warns(UserWarning, match=r"\bc\b"):
        take(amplifier, model)
    assert steps(amplifier) == {"a": 4, "b": 4}


def test_a_gradient_that_stays_away_is_no_change(running: Running) -> None:
    model, amplifier = running
    for _ in range(2):
        put(model, {n: torch.ones_like(p) for n, p in model.named_parameters() if n != "c.w"})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            amplifier.step()
    assert steps(amplifier) == {"a": 5, "b": 5, "c": 3}


def test_tying_later_hands_the_parameter_to_the_first_layer(running: Running) -> None:
    model, amplifier = running
    model.c.w.grad = None
    model.c.w = model.b.w
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        amplifier.rebind()
    take(amplifier, model)
    assert steps(amplifier) == {"a": 4, "b": 4}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("swap", [False, True])
def test_to_another_dtype(running: Running, swap: bool, dtype: torch.dtype) -> None:
    model, amplifier = running
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        put(model, {})
        model.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert all(take(amplifier, model).values())
    assert model.a.w.grad.dtype == dtype
    assert steps(amplifier) == {"a": 4, "b": 4, "c": 4}


def test_swap_tensors(running: Running) -> None:
    model, amplifier = running
    put(model, {})
    other = nn.Parameter(torch.ones(60, device=model.a.w.device))
    torch.utils.swap_tensors(model.c.w, other)
    assert all(take(amplifier, model).values())
    assert steps(amplifier) == {"a": 4, "b": 4, "c": 4}


def test_new_layers_are_owned_too(running: Running) -> None:
    model, amplifier = running
    late = bare({"w": (20,)}, device=model.a.w.device.type)
    model.add_module("late", late)
    amplifier.rebind()
    put(late, {"w": torch.ones(20, device=model.a.w.device)})
    with pytest.raises(ValueError, match="w"):
        Amplifier(late).step()


def test_released_parameters_may_be_owned_by_another(running: Running) -> None:
    model, amplifier = running
    gone = model.c
    del model.c
    with pytest.warns(UserWarning, match=r"\bc\b"):
        amplifier.rebind()
    put(gone, {"w": torch.ones(60, device=model.a.w.device)})
    Amplifier(gone).step()


def test_excluded_names_stay_excluded_after_a_rebind(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, exclude=["b.*"], **QUICK)
    take(amplifier, model)
    model.b.w = nn.Parameter(model.b.w.detach().clone())
    model.add_module("late", bare({"w": (20,)}, device=place.device))
    amplifier.rebind()
    take(amplifier, model)
    assert steps(amplifier) == {"a": 2, "c": 2, "late": 1}


def test_low_rank_adapters_arrive_in_training(running: Running) -> None:
    """Everything frozen, two small parameters added: only these are left."""
    model, amplifier = running
    model.requires_grad_(False)
    put(model, {})
    model.a.down = nn.Parameter(torch.zeros(3, 2, device=model.a.w.device))
    model.a.up = nn.Parameter(torch.zeros(2, 3, device=model.a.w.device))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        doubled = take(amplifier, model)
    assert set(doubled) == {"a.down", "a.up"}
