"""In fp16 a finite gradient never becomes infinite: what is too large stops at ±65,504."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import Place, bare
from factors import ALWAYS, LAGGED, backward, network
from torch import Tensor

import gradamp_fast

LARGEST = 65504.0
GIVEN = [40000.0, -40000.0, 65504.0, 32752.0, 1.0, -65504.0, 0.0, 32768.0]


@pytest.mark.parametrize("options", [ALWAYS, LAGGED], ids=["exact", "lagged"])
@pytest.mark.parametrize("factor", [2.0, 4096.0])
def test_the_product_saturates(place: Place, factor: float, options: dict[str, Any]) -> None:
    model = bare({"a.w": (8,)}, torch.float16, place.device)
    amplifier = place.amplifier(model, **{**options, "factor": factor})
    given = torch.tensor(GIVEN, dtype=torch.float16, device=place.device)
    for step in range(2):
        model.a.w.grad = given.clone()
        amplifier.step()
        if step or options is ALWAYS:
            expected = (given.double() * factor).clamp(-LARGEST, LARGEST).half()
            assert torch.equal(model.a.w.grad, expected)


@pytest.mark.parametrize("largest", [257, 4111, 70_001])
def test_in_every_bucket_length_and_beside_other_dtypes(place: Place, largest: int) -> None:
    dtypes = {"a.w": torch.float16, "b.w": torch.bfloat16, "c.w": torch.float32}
    model = bare(dict.fromkeys(dtypes, (largest,)), dtypes, place.device)
    amplifier = place.amplifier(model, **ALWAYS)
    for p in model.parameters():
        p.grad = torch.full_like(p, 60000.0)
        p.grad[::3] = -60000.0
    amplifier.step()
    for p in model.parameters():
        wanted = (
            LARGEST if p.dtype == torch.float16 else float(2 * torch.tensor(6e4, dtype=p.dtype))
        )
        assert set(p.grad.unique().tolist()) == {-wanted, wanted}


@pytest.mark.parametrize("strided", [False, True])
def test_a_view_with_gaps(place: Place, strided: bool) -> None:
    """One that is served through a copy saturates too."""
    model = bare({"a.w": (6, 4)}, torch.float16, place.device)
    base = torch.full((6, 8), 50000.0, dtype=torch.float16, device=place.device)
    model.a.w.grad = base[:, ::2] if strided else base[:, :4].contiguous()
    place.amplifier(model, **ALWAYS).step()
    assert set(model.a.w.grad.flatten().tolist()) == {LARGEST}


@pytest.mark.parametrize("scale", [65536.0, 4.0])
def test_a_fused_optimizer_that_unscales(place: Place, scale: float) -> None:
    """The scaler has looked before the product is made; weights stay finite."""
    model = network(place.device, torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, fused=True)
    amplifier = place.amplifier(model, **{**ALWAYS, "factor": 8.0})
    amplifier.attach(optimizer)
    scaler = torch.amp.GradScaler(place.device, init_scale=scale)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, scale=0.3 * 65504 / scale, seed=step)
        for p in model.parameters():
            p.grad.mul_(scale)
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
        scaler.scale(torch.ones((), device=place.device))
        scaler.step(optimizer)
        scaler.update()
        for p in model.parameters():
            assert bool(p.isfinite().all())
            assert float(p.grad.abs().max()) <= LARGEST
    assert scaler.get_scale() == scale  # nothing overflowed


@pytest.mark.parametrize("unscale", [True, False])
def test_our_scaler_and_step(place: Place, unscale: bool) -> None:
    model = bare({"a.w": (4,)}, torch.float16, place.device)
    amplifier = place.amplifier(model, **{**ALWAYS, "factor": 64.0})
    found = torch.zeros(1, device=place.device)
    model.a.w.grad = torch.tensor([3e4, -3e4, 1.0, 0.0], device=place.device).half()
    amplifier.step(torch.full((1,), 2.0, device=place.device), found, unscale=unscale)
    scale = 0.5 if unscale else 1.0
    assert model.a.w.grad.tolist() == [LARGEST, -LARGEST, 64.0 * scale, 0.0]
    assert float(found) == 0.0


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_stays(place: Place, value: float) -> None:
    """It is skipped, not made finite: a scaler has to find it."""
    model = bare({"a.w": (4,)}, torch.float16, place.device)
    amplifier = place.amplifier(model, **ALWAYS)
    found = torch.zeros(1, device=place.device)
    model.a.w.grad = torch.tensor([value, 1.0, -value, 2.0], device=place.device).half()
    before = model.a.w.grad.clone()
    amplifier.step(found_inf=found)
    assert torch.equal(model.a.w.grad.nan_to_num(9.0), before.nan_to_num(9.0))
    assert float(found) == 1.0
    assert amplifier.report().skipped_steps == 1


def test_matched_norms_saturate(place: Place) -> None:
    """A rescaled layer may be multiplied by more than 1 as well."""
    model = bare({"a.w": (3,), "b.w": (3,)}, torch.float16, place.device)
    amplifier = place.amplifier(
        model, **{**ALWAYS, "factor": 0.01, "include": ["a.*"]}, match_norm=True
    )
    model.a.w.grad = torch.full((3,), 60000.0, device=place.device).half()
    model.b.w.grad = torch.full((3,), 60000.0, device=place.device).half()
    amplifier.step()
    assert model.b.w.grad.tolist() == [LARGEST] * 3


def multiplied(values: Tensor, factor: float) -> Tensor:
    return (values.float() * factor).clamp(-LARGEST, LARGEST).half()


def test_every_number_of_fp16(place: Place) -> None:
    """Bit for bit the clamped product, for all finite numbers there are."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()].to(place.device)
    model = bare({"a.w": (every.numel(),)}, torch.float16, place.device)
    amplifier = gradamp_fast.Amplifier(model, backend=place.backend, **{**ALWAYS, "factor": 1.7})
    model.a.w.grad = every.clone()
    amplifier.step()
    expected = multiplied(every, torch.tensor(1.7).item())
    assert torch.equal(model.a.w.grad.view(torch.int16), expected.view(torch.int16))
