"""Several optimizers make one round; a layer is measured when all its members have gradients."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from cases import Place, Stream, bare, put, same_bits
from factors import ALWAYS, network, sgd, slopes, steps
from torch import nn
from torch.nn.utils import parametrize, prune

import gradamp_fast
from gradamp_fast import Amplifier

SHAPES = {"a.w": (40, 3), "a.b": (40,), "b.w": (50, 2), "b.b": (50,), "c.w": (60,)}
SCORED: dict[str, Any] = {
    "measure": "direction", "min_steps": 2, "refresh": 2, "threshold": "mean", "decay": 0.9,
}  # fmt: skip


def rows(amplifier: Amplifier) -> dict[str, tuple[Any, ...]]:
    """Everything that the layers' state tells, by layer; None where there is no number yet."""
    out = {}
    for r in amplifier.report().layers:
        numbers = (r.variance, r.temporal_variance, r.fluctuation, r.direction)
        known = [None if math.isnan(number) else number for number in numbers]
        out[r.name] = (r.steps, *known, r.selected)
    return out


def split(model: nn.Module, how: str) -> list[torch.optim.SGD]:
    named = dict(model.named_parameters())
    if how == "by kind":
        parts = [[p for n, p in named.items() if n.endswith(e)] for e in (".w", ".b")]
    elif how == "by module":
        parts = [[p for n, p in named.items() if n.startswith(m)] for m in ("a", "b", "c")]
    else:
        parts = [[p] for p in named.values()]
    return [sgd(part) for part in parts]


def share(name: str) -> str:
    """The layer of each parameter where weights and biases are shared out, in that order."""
    return f"{name[0]}#2" if name.endswith(".b") else name[0]


@pytest.mark.parametrize("how", ["by kind", "by module", "one each"])
def test_a_round_is_a_step(place: Place, how: str) -> None:
    """Bit for bit what one step by hand over the same layers makes of the same gradients."""
    model, twin = (bare(SHAPES, device=place.device) for _ in range(2))
    amplifier = place.amplifier(model, **SCORED)
    optimizers = split(model, how)
    for optimizer in optimizers:
        amplifier.attach(optimizer)
    grouping = {} if how == "by module" else {"group_by": share}
    expected = place.amplifier(twin, **SCORED, **grouping)
    stream = Stream(model)
    for step in range(9):
        gradients = stream.next()
        put(model, {n: g.clone() for n, g in gradients.items()})
        put(twin, gradients)
        expected.step()
        for optimizer in optimizers:
            optimizer.step()
        assert amplifier.report().steps == step + 1
        assert rows(amplifier) == rows(expected)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert same_bits(p.grad, q.grad)


@pytest.mark.parametrize("how", ["by kind", "one each"])
def test_schedules_count_rounds(place: Place, how: str) -> None:
    model = bare(SHAPES, device=place.device)
    schedule = gradamp_fast.Schedule([(1, 3)], unit="step")
    amplifier = place.amplifier(model, **ALWAYS, schedule=schedule)
    optimizers = split(model, how)
    for optimizer in optimizers:
        amplifier.attach(optimizer)
    for step in range(5):
        raw = slopes(model)
        put(model, {n: g.clone() for n, g in raw.items()})
        for optimizer in optimizers:
            optimizer.step()
        wanted = 2.0 if 1 <= step < 3 else 1.0
        for name, p in model.named_parameters():
            assert same_bits(p.grad, raw[name] * wanted), (step, name)


def test_one_that_steps_more_often_begins_rounds(place: Place) -> None:
    """As a discriminator that steps five times for each step of the generator."""
    model = network(place.device)
    often, seldom = sgd(model[0].parameters()), sgd(model[2].parameters())
    amplifier = place.amplifier(model, **ALWAYS)
    for optimizer in (often, seldom):
        amplifier.attach(optimizer)
    for _ in range(3):
        for number in range(5):
            put(model, slopes(model))
            often.step()
            if number == 4:
                seldom.step()
    assert amplifier.report().steps == 15
    assert {n: k for n, k in steps(amplifier).items() if n != "4"} == {"0": 15, "2": 3}


def test_stepped_in_backward(place: Place) -> None:
    """One optimizer for each parameter, stepped as soon as its gradient is there."""
    torch.manual_seed(0)
    model = network(place.device)
    amplifier = place.amplifier(model, **ALWAYS)
    seen: dict[int, torch.Tensor] = {}
    for p in model.parameters():
        optimizer = sgd([p])
        amplifier.attach(optimizer)

        def now(p: nn.Parameter, optimizer: torch.optim.SGD = optimizer) -> None:
            optimizer.step()
            seen[id(p)] = p.grad.clone()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(now)
    for step in range(1, 4):
        x = torch.randn(7, 6).to(place.device)
        raw = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
        model(x).square().mean().backward()
        assert amplifier.report().steps == step
        for p, g in zip(model.parameters(), raw, strict=True):
            torch.testing.assert_close(seen[id(p)], 2 * g, rtol=1e-5, atol=1e-7)
    assert set(steps(amplifier).values()) == {3}


# ---- members ------------------------------------------------------------------------


def follow(
    amplifier: Amplifier, model: nn.Module, count: int, absent: Any = (), seed: int = 0
) -> None:
    """Steps in which the named parameters have no gradient."""
    stream = Stream(model, seed)
    for step in range(count):
        gradients = stream.next()
        left_out = absent(step) if callable(absent) else absent
        put(model, {n: g for n, g in gradients.items() if n not in left_out})
        amplifier.step()


def test_steps_without_a_member_change_nothing_but_the_gradient(place: Place) -> None:
    """Scores are those of a run in which the incomplete steps never were."""
    model, twin = (bare(SHAPES, device=place.device) for _ in range(2))
    options = {**SCORED, "refresh": 1, "threshold": 2.0}
    amplifier, expected = place.amplifier(model, **options), place.amplifier(twin, **options)
    stream = Stream(model)
    for step in range(12):
        raw = stream.next()
        partly = step % 3 == 2
        put(model, {n: g.clone() for n, g in raw.items() if not (partly and n == "a.b")})
        amplifier.step()
        if step > 2:
            assert same_bits(model.a.w.grad, raw["a.w"] * 2)
        if not partly:
            put(twin, raw)
            expected.step()
        assert rows(amplifier)["a"] == rows(expected)["a"]
    assert steps(amplifier) == {"a": 8, "b": 12, "c": 12}


def test_a_member_joins(place: Place) -> None:
    """Its first gradient, late: the layer begins anew with all of it."""
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **SCORED)
    follow(amplifier, model, 4, absent=["a.b"])
    assert steps(amplifier) == {"a": 4, "b": 4, "c": 4}
    follow(amplifier, model, 1)
    assert steps(amplifier) == {"a": 1, "b": 5, "c": 5}


def test_scores_after_a_change_are_those_of_a_fresh_layer(place: Place) -> None:
    model, twin = (bare(SHAPES, device=place.device) for _ in range(2))
    amplifier, fresh = place.amplifier(model, **SCORED), place.amplifier(twin, **SCORED)
    follow(amplifier, model, 5, absent=["a.b"])
    follow(amplifier, model, 3, seed=7)
    follow(fresh, twin, 3, seed=7)
    assert rows(amplifier)["a"][:5] == rows(fresh)["a"][:5]


@pytest.mark.parametrize("change", ["frozen", "unfrozen", "pruned", "parametrized", "resized"])
def test_a_member_leaves_or_comes(place: Place, change: str) -> None:
    model = network(place.device)
    amplifier = place.amplifier(model, **SCORED)
    if change == "unfrozen":
        model[0].bias.requires_grad_(False)
    follow(amplifier, model, 4)
    model.zero_grad()
    if change in ("frozen", "unfrozen"):
        model[0].bias.requires_grad_(change == "unfrozen")
    elif change == "pruned":
        prune.random_unstructured(model[0], "weight", 0.5)
    elif change == "parametrized":
        parametrize.register_parametrization(model[0], "weight", nn.Identity())
    else:
        model[0].bias = nn.Parameter(torch.zeros(9, device=place.device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if change in ("pruned", "parametrized"):  # the same parameter under another name
            amplifier.rebind()
        follow(amplifier, model, 1)
    found = steps(amplifier)
    assert (found["0"], found["2"], found["4"]) == (1, 5, 5)


@pytest.mark.parametrize("how", ["frozen", "absent"])
def test_a_layer_that_rests_as_a_whole_keeps_its_state(place: Place, how: str) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **SCORED)
    follow(amplifier, model, 4)
    before = rows(amplifier)["a"]
    if how == "frozen":
        model.a.requires_grad_(False)
    follow(amplifier, model, 2, absent=["a.w", "a.b"])
    assert rows(amplifier)["a"][:5] == before[:5]
    model.a.requires_grad_(True)
    follow(amplifier, model, 1)
    assert steps(amplifier) == {"a": 5, "b": 7, "c": 7}


def test_a_layer_that_is_never_whole_is_named_once() -> None:
    model = bare({"a.w": (3,), "a.b": (2,), "c.w": (3,)})
    amplifier = Amplifier(model, backend="torch", **SCORED)
    ones = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    put(model, ones)
    amplifier.step()
    model.a.b.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(998):
            amplifier.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(1100):
            amplifier.step()
    assert len(caught) == 1
    assert "'a'" in str(caught[0].message)
    assert "'a.b'" in str(caught[0].message)


def test_other_strides_begin_anew(place: Place) -> None:
    """Channels-last in mid-run permutes the memory order that the sketch goes by."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).to(place.device)
    amplifier = place.amplifier(model, **SCORED)

    def step(seed: int) -> None:
        for name, p in model.named_parameters():
            gradient = slopes(model, seed)[name]
            p.grad = torch.empty_like(p).copy_(gradient)
        amplifier.step()

    for seed in range(4):
        step(seed)
    model.to(memory_format=torch.channels_last)
    stored = amplifier.state_dict()
    step(4)
    assert steps(amplifier) == {"0": 1, "1": 1}
    step(5)
    assert steps(amplifier) == {"0": 2, "1": 2}
    amplifier.load_state_dict(stored)  # of the other memory order
    step(6)
    assert steps(amplifier) == {"0": 1, "1": 1}
