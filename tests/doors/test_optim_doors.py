"""The fused optimizers behind loss scalers, and with the one line."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from cases import Place, same_bits, same_state
from factors import ALWAYS, backward, network, only, steps
from pairs import Pair, same
from torch import nn

import gradamp_fast
from gradamp_fast import optim

pytestmark = pytest.mark.usefixtures("alone_too")

# ---- scalers ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
@pytest.mark.parametrize("door", ["torch", "ours", "one line"])
@pytest.mark.parametrize("clipped", [False, True], ids=["", "clipped"])
def test_scalers(place: Place, kind: Any, door: str, clipped: bool) -> None:
    """Two overflows on the way, which change nothing but the counters."""
    pair = Pair(place, torch.float32)
    amplifier = place.amplifier(pair.a, **ALWAYS)
    ours, others = (kind(m.parameters(), 0.01, weight_decay=0.0) for m in (pair.a, pair.b))
    others.param_groups[0]["lr"] = 0.02
    if door == "ours":
        scaler: Any = gradamp_fast.GradScaler(amplifier, place.device, init_scale=64.0)
    else:
        scaler = torch.amp.GradScaler(place.device, init_scale=64.0)
    if door == "torch":
        amplifier.attach(ours)
    elif door == "one line":
        amplifier = gradamp_fast.fused_amplify(
            pair.a, optimizer=ours, **ALWAYS, backend=place.backend
        )
    scaler.scale(torch.ones((), device=place.device))
    for step in range(6):
        overflows = step in (0, 3)
        pair.give()
        scale = scaler.get_scale()
        before = copy.deepcopy(pair.a), copy.deepcopy(ours.state_dict())
        for p in pair.a.parameters():
            p.grad.mul_(scale)
        if overflows:
            pair.a.stem.bias.grad[0] = torch.inf
        if clipped:
            scaler.unscale_(ours)
            nn.utils.clip_grad_norm_(pair.a.parameters(), 1e9 if overflows else 0.5)
        if door == "one line":
            gradamp_fast.fused_amplify(pair.a, optimizer=ours)
        kept = [p.grad.clone() for p in pair.a.parameters()]
        scaler.step(ours)
        scaler.update()
        assert all(same_bits(p.grad, g) for p, g in zip(pair.a.parameters(), kept, strict=True))
        if overflows:
            assert same(pair.a, before[0])
            if step:
                assert same_state(before[1], ours.state_dict())
            continue
        if clipped:
            nn.utils.clip_grad_norm_(pair.b.parameters(), 0.5)
        others.step()
        for p, q in zip(pair.a.parameters(), pair.b.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    assert scaler.get_scale() == 16.0
    report = amplifier.report()
    assert (report.steps, report.skipped_steps) == (6, 2)
    gradamp_fast.reset(pair.a)


def test_a_scaler_that_is_off_and_one_of_another_model(place: Place) -> None:
    """Or of no gradients at all; two networks of which one is amplified."""
    model, other = network(place.device), network(place.device)
    amplifier = place.amplifier(model, **ALWAYS)
    for enabled in (False, True):
        scaler = gradamp_fast.GradScaler(amplifier, place.device, enabled=enabled, init_scale=2.0)
        optimizers = [optim.SGD(m.parameters(), 0.1) for m in (model, other)]
        before = copy.deepcopy(model), copy.deepcopy(other)
        scaler.scale(torch.ones((), device=place.device))
        raw = backward(model, scaler.get_scale())
        backward(other, scaler.get_scale())
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for name, p in model.named_parameters():
            moved = before[0].get_parameter(name) - p
            torch.testing.assert_close(moved, 0.2 * raw[name], rtol=1e-4, atol=1e-5)
            moved = before[1].get_parameter(name) - other.get_parameter(name)
            torch.testing.assert_close(moved, 0.1 * raw[name], rtol=1e-4, atol=1e-5)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for attached in list(optimizers[0].amplifiers):
            attached.remove()
    assert amplifier.report().steps == 2


def test_a_scaler_without_gradients(place: Place) -> None:
    """As torch's fused optimizers: nothing happens, or the same error."""

    def outcome(kind: Any, attach: bool) -> str:
        model = network(place.device)
        optimizer = kind(model.parameters(), 0.1)
        if attach:
            amplifier = place.amplifier(model, **ALWAYS)
            amplifier.attach(optimizer)
        scaler = torch.amp.GradScaler(place.device, init_scale=2.0)
        scaler.scale(torch.ones((), device=place.device))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scaler.step(optimizer)
                scaler.update()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    expected = outcome(lambda ps, lr: torch.optim.AdamW(ps, lr, fused=True), False)
    assert outcome(optim.AdamW, False) == expected
    assert outcome(optim.AdamW, True) == expected


# ---- one line ----------------------------------------------------------------------------


def test_one_line_arms_the_next_step(place: Place) -> None:
    """That one alone; as often as it is said before it."""
    model = network(place.device, torch.float64)
    options: dict[str, Any] = {**ALWAYS, "backend": place.backend}
    optimizer = optim.SGD(model.parameters(), 0.1)
    for step, calls in enumerate((1, 2, 0, 1)):
        optimizer.zero_grad()
        raw = backward(model, seed=step)
        before = copy.deepcopy(model)
        for _ in range(calls):
            amplifier = gradamp_fast.fused_amplify(model, optimizer=optimizer, **options)
        assert only(model, raw) == 1.0
        optimizer.step()
        for name, p in model.named_parameters():
            moved = before.get_parameter(name) - p
            torch.testing.assert_close(moved, (0.2 if calls else 0.1) * raw[name])
        assert amplifier.report().steps == (1, 2, 2, 3)[step]
    with pytest.raises(ValueError, match=r"factor=3\.0 differs"):
        gradamp_fast.fused_amplify(model, optimizer=optimizer, factor=3.0)
    gradamp_fast.reset(model)
    assert not optimizer.amplifiers
    assert not amplifier.attached


def test_one_line_without_the_optimizer_again(place: Place) -> None:
    """From then on gradients are multiplied; what was armed and not stepped is forgotten."""
    model = network(place.device)
    options: dict[str, Any] = {**ALWAYS, "backend": place.backend}
    optimizer = optim.SGD(model.parameters(), 0.0)
    raw = backward(model)
    gradamp_fast.fused_amplify(model, optimizer=optimizer, **options)
    amplifier = gradamp_fast.fused_amplify(model)
    assert only(model, raw) == 2.0
    optimizer.step()
    assert amplifier.report().steps == 1
    gradamp_fast.reset(model)


def test_one_line_needs_all_of_the_model(place: Place) -> None:
    model = network(place.device)
    options: dict[str, Any] = {**ALWAYS, "backend": place.backend}
    optimizer = optim.SGD(model[0].parameters(), 0.1)
    backward(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"does not hold '2\.weight'"):
            gradamp_fast.fused_amplify(model, optimizer=optimizer, **options)
    before = copy.deepcopy(model)
    optimizer.step()
    assert not same(model, before)
    whole = optim.SGD(model.parameters(), 0.1)
    amplifier = gradamp_fast.fused_amplify(model, optimizer=whole, **options)
    whole.step()
    assert steps(amplifier) == {"0": 1, "2": 1, "4": 1}
    gradamp_fast.reset(model)
