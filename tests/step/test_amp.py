"""Mixed precision: unscaling, steps that are skipped, and where a non-finite element hides."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cases import COMPLEX, REALS, SHAPES, Place, Stream, Twin, bare, put, reals, same_bits, scaled

from gradamp_fast import Amplifier

NARROW = {name: shape for name, shape in SHAPES.items() if name != "wide.weight"}
QUICK = {"min_steps": 2, "refresh": 2, "decay": 0.9}


def device_scalar(place: Place, value: float) -> torch.Tensor:
    return torch.full((1,), value, device=place.device)


def layers(amplifier: Amplifier) -> str:
    """What is known of the layers as text, so that NaN equals NaN; but for counters of steps."""
    rows = [dataclasses.asdict(layer) for layer in amplifier.report().layers]
    return str([{k: v for k, v in row.items() if k != "steps_since_change"} for row in rows])


@pytest.mark.parametrize("dtype", [*REALS, *COMPLEX], ids=str)
@pytest.mark.parametrize("scale", [1.0, 256.0, 3.0, 0.7])
@pytest.mark.parametrize("unscale", [True, False])
def test_unscale(place: Place, unscale: bool, scale: float, dtype: torch.dtype) -> None:
    """round(g (inv factor)) in every gradient, or only the factor; statistics are of g inv."""
    model = bare(NARROW, dtype, place.device)
    twin = Twin(model, place, excluded=["scale"], exclude=["scale"], **QUICK)
    stream = Stream(model)
    for _ in range(5):
        gradients = {n: (g * scale).to(dtype) for n, g in stream.next().items()}
        twin.step(gradients, grad_scale=device_scalar(place, scale), unscale=unscale)
    assert any(layer.selected for layer in twin.oracle.layers.values())


@pytest.mark.parametrize("timing", ["lagged", "exact"])
def test_the_scale_may_change_between_steps(place: Place, timing: str) -> None:
    model = bare(NARROW, device=place.device)
    twin = Twin(model, place, timing=timing, **QUICK)
    stream = Stream(model)
    for scale in (65536.0, 32768.0, 5.0, 2.0**-3, 1.0, 65536.0):
        gradients = {n: g * scale for n, g in stream.next().items()}
        twin.step(gradients, grad_scale=device_scalar(place, scale))


@pytest.mark.parametrize("timing", ["lagged", "exact"])
@pytest.mark.parametrize("how", [{}, {"max_norm": 1.0}, {"match_norm": True}], ids=str)
def test_found_inf_on_entry_writes_nothing(place: Place, how: dict, timing: str) -> None:
    model = bare(SHAPES, device=place.device)
    twin = Twin(model, place, timing=timing, **how, **QUICK)
    stream = Stream(model)
    for _ in range(4):
        twin.step(stream.next())
    assert any(layer.selected for layer in twin.oracle.layers.values())
    before = layers(twin.amplifier)
    for scale in (None, device_scalar(place, 8.0)):
        found_inf = device_scalar(place, 1.0)
        gradients = stream.next()
        copies = {n: g.clone() for n, g in gradients.items()}
        twin.step(gradients, found_inf=found_inf, grad_scale=scale)
        assert float(found_inf) == 1
        assert layers(twin.amplifier) == before
        assert all(same_bits(copies[n], p.grad) for n, p in model.named_parameters())
    assert twin.amplifier.report().skipped_steps == 2
    twin.step(stream.next(), found_inf=device_scalar(place, 0.0))


@pytest.mark.parametrize("dtype", [*REALS, *COMPLEX], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("timing", ["lagged", "exact"])
def test_a_nonfinite_element_anywhere(
    place: Place, timing: str, bad: float, dtype: torch.dtype
) -> None:
    """First, middle or last: the step is skipped, and nothing remembers it."""
    model = bare(NARROW, dtype, place.device)
    twin = Twin(model, place, timing=timing, **QUICK)
    stream = Stream(model)
    for _ in range(3):
        twin.step(stream.next())
    selected = {n: layer.selected for n, layer in twin.oracle.layers.items()}
    before = layers(twin.amplifier)
    hidden = [("stem.weight", 0), ("body.0.weight", 2000), ("body.0.weight", -1), ("scale", 0),
              ("head.bias", -1)]  # fmt: skip
    for skipped, (name, position) in enumerate(hidden, 1):
        gradients = stream.next()
        reals(gradients[name]).view(-1)[position] = bad
        copies = {n: g.clone() for n, g in gradients.items()}
        found_inf = device_scalar(place, 0.0)
        twin.step(gradients, found_inf=found_inf)
        assert float(found_inf) == 1
        assert twin.amplifier.report().skipped_steps == skipped
        assert layers(twin.amplifier) == before
        for n, p in model.named_parameters():
            allowed = [copies[n]]
            if timing == "lagged" and selected[n.rpartition(".")[0]]:
                allowed.append(scaled(copies[n], 2.0))
            assert any(torch.allclose(p.grad, a, rtol=0, atol=0, equal_nan=True) for a in allowed)
    twin.step(stream.next())


@pytest.mark.parametrize("size", [4096, 8193, 131073])
@pytest.mark.parametrize("position", [0, 31, 511, 4095, -1])
def test_a_nonfinite_element_in_a_large_tensor(place: Place, size: int, position: int) -> None:
    model = bare({"a.w": (size,), "b.w": (3,)}, device=place.device)
    amplifier = place.amplifier(model)
    for bad in (math.nan, math.inf):
        gradient = torch.ones(size, device=place.device)
        gradient[position] = bad
        found_inf = device_scalar(place, 0.0)
        put(model, {"a.w": gradient, "b.w": torch.ones(3, device=place.device)})
        amplifier.step(found_inf=found_inf)
        assert float(found_inf) == 1
    assert amplifier.report().skipped_steps == 2
    assert amplifier.report().layers[1].steps == 0


def test_opposite_infinities_do_not_cancel(place: Place) -> None:
    model = bare({"a.w": (64,)}, device=place.device)
    amplifier = place.amplifier(model)
    gradient = torch.zeros(64, device=place.device)
    gradient[3], gradient[40] = math.inf, -math.inf
    put(model, {"a.w": gradient})
    amplifier.step()
    assert amplifier.report().skipped_steps == 1


def test_sums_that_overflow_skip_the_step(place: Place) -> None:
    model = bare({"a.w": (64,)}, torch.float64, place.device)
    amplifier = place.amplifier(model)
    put(model, {"a.w": torch.linspace(-1e300, 1e300, 64, dtype=torch.float64, device=place.device)})
    found_inf = device_scalar(place, 0.0)
    amplifier.step(found_inf=found_inf)
    report = amplifier.report()
    assert (report.steps, report.skipped_steps) == (1, 1)
    assert float(found_inf) == 1
    assert report.layers[0].steps == 0


def test_nonfinite_excluded_gradients_skip_nothing(place: Place) -> None:
    """Only a gradient of some layer skips a step."""
    model = bare({"a.w": (64,), "b.w": (64,)}, device=place.device)
    amplifier = place.amplifier(model, exclude=["b.w"])
    bad = torch.full((64,), math.nan, device=place.device)
    put(model, {"a.w": torch.ones(64, device=place.device), "b.w": bad})
    amplifier.step()
    assert amplifier.report().skipped_steps == 0
    assert amplifier.report().layers[0].steps == 1


def test_counted_steps_decide(place: Place) -> None:
    """``refresh`` counts steps that were not skipped."""
    model = bare(NARROW, device=place.device)
    twin = Twin(model, place, min_steps=1, refresh=3)
    stream = Stream(model)
    decided = []
    for step in range(9):
        gradients = stream.next()
        if step in (1, 4, 5):
            gradients["scale"].fill_(math.nan)
        twin.step(gradients)
        decided.append(math.isfinite(twin.amplifier.report().threshold))
    assert decided == [False] * 3 + [True] * 6


def test_error_if_nonfinite_names_the_layers(place: Place) -> None:
    model = bare(NARROW, device=place.device)
    amplifier = place.amplifier(model, error_if_nonfinite=True)
    stream = Stream(model)
    put(model, stream.next())
    amplifier.step()
    gradients = stream.next()
    gradients["body.1.weight"][5] = math.nan
    gradients["head.bias"][1] = math.inf
    put(model, gradients)
    with pytest.raises(Exception, match=r"body\.1") as raised:
        amplifier.step()
    assert "head" in str(raised.value)
    assert "stem" not in str(raised.value)
    assert isinstance(raised.value, (RuntimeError, ArithmeticError, ValueError))
    put(model, stream.next())
    amplifier.step()


def test_grad_scaler_loop(place: Place) -> None:
    """unscale_, amplify, step, update: the order of a plain loop."""
    model = torch.nn.Linear(4, 3).to(place.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(place.device, init_scale=8.0)
    amplifier = place.amplifier(model, measure="variance", min_steps=1, refresh=1, threshold=1e9)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(place.device)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.unscale_(optimizer)
        plain = model.weight.grad.clone()
        amplifier.step()
        assert same_bits(model.weight.grad, plain * (2.0 if step else 1.0))
        scaler.step(optimizer)
        scaler.update()
