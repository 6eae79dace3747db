"""match_norm and max_norm, against the oracle and against torch's own clipping."""

from __future__ import annotations

import math

import pytest
import torch
from cases import COMPLEX, REALS, SHAPES, TOLERANCE, Place, Stream, Twin, bare, put, reals, scaled

NARROW = {name: shape for name, shape in SHAPES.items() if name != "wide.weight"}
QUICK = {"min_steps": 2, "refresh": 2, "decay": 0.9}


def norm(gradients: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(reals(g).double().square().sum()) for g in gradients))


@pytest.mark.parametrize("timing", ["lagged", "exact"])
@pytest.mark.parametrize(
    "how",
    [{"match_norm": True}, {"max_norm": 0.5}, {"max_norm": 50.0}, {"max_norm": 1e9}],
    ids=str,
)
def test_against_the_oracle(place: Place, how: dict, timing: str) -> None:
    model = bare(SHAPES, device=place.device)
    twin = Twin(model, place, excluded=["scale"], exclude=["scale"], timing=timing, **how, **QUICK)
    stream = Stream(model)
    for _ in range(6):
        twin.step(stream.next())
        if "max_norm" in how:
            expected = twin.oracle.total_norm
            assert float(twin.amplifier.total_norm) == pytest.approx(expected, rel=1e-5)
    assert any(layer.selected for layer in twin.oracle.layers.values())


@pytest.mark.parametrize("dtype", [*REALS, *COMPLEX], ids=str)
@pytest.mark.parametrize("max_norm", [0.7, 1e4])
def test_same_as_torch_clipping_after_amplification(
    place: Place, max_norm: float, dtype: torch.dtype
) -> None:
    model, other = (bare(NARROW, dtype, place.device) for _ in range(2))
    amplifier = place.amplifier(model, max_norm=max_norm, **QUICK)
    stream = Stream(model)
    for _ in range(5):
        gradients = stream.next()
        selected = {layer.name for layer in amplifier.report().layers if layer.selected}
        put(other, {
            name: scaled(g, 2.0 if name.rpartition(".")[0] in selected else 1.0)
            for name, g in gradients.items()
        })  # fmt: skip
        expected = torch.nn.utils.clip_grad_norm_(other.parameters(), max_norm)
        put(model, gradients)
        amplifier.step()
        # Half precision: torch rounds the amplified gradient and its norms to the dtype as well.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            float(amplifier.total_norm), float(expected), rtol=1e-5 + 2 * eps, atol=0
        )
        for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(
                mine.grad, theirs.grad, rtol=1e-5 + 4 * eps, atol=1e-7, msg=lambda m, n=name: n + m
            )
    assert selected


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_matched_norm_is_the_norm_before(place: Place, dtype: torch.dtype) -> None:
    model = bare(NARROW, dtype, place.device)
    amplifier = place.amplifier(model, match_norm=True, factor=8.0, **QUICK)
    stream, changed = Stream(model), False
    for _ in range(6):
        gradients = stream.next()
        before = {name: g.clone() for name, g in gradients.items()}
        put(model, gradients)
        amplifier.step()
        after = norm([p.grad for p in model.parameters()])
        assert after == pytest.approx(norm(list(before.values())), rel=TOLERANCE[dtype].written)
        assert float(amplifier.total_norm) == pytest.approx(norm(list(before.values())), rel=1e-5)
        changed |= any(not torch.equal(before[n], p.grad) for n, p in model.named_parameters())
    assert changed


def test_zero_gradients_stay_zero(place: Place) -> None:
    for how in ({"match_norm": True}, {"max_norm": 1.0}):
        model = bare(NARROW, device=place.device)
        amplifier = place.amplifier(model, **how)
        put(model, {name: torch.zeros_like(p) for name, p in model.named_parameters()})
        amplifier.step()
        assert all(not p.grad.any() for p in model.parameters())
        assert float(amplifier.total_norm) == 0


def test_excluded_parameters_are_normed_and_rescaled(place: Place) -> None:
    shapes = {"a.w": (50,), "b.w": (60,), "b.v": (5000,), "b.empty": (0,)}
    model = bare(shapes, device=place.device)
    amplifier = place.amplifier(model, exclude=["b.*"], max_norm=1.0)
    gradients = {n: torch.full(s, 3.0, device=place.device) for n, s in shapes.items()}
    put(model, {n: g.clone() for n, g in gradients.items()})
    amplifier.step()
    total = norm(list(gradients.values()))
    assert float(amplifier.total_norm) == pytest.approx(total, rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name] / total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("magnitude", [1e-3, 1e-6, 1e-9])
def test_small_norms(place: Place, magnitude: float) -> None:
    """The coefficient is max_norm / (norm + 1e-6)."""
    model = bare({"a.w": (50,)}, device=place.device)
    amplifier = place.amplifier(model, max_norm=magnitude)
    put(model, {"a.w": torch.full((50,), magnitude, device=place.device)})
    amplifier.step()
    expected = magnitude * min(1.0, magnitude / (magnitude * math.sqrt(50) + 1e-6))
    assert float(model.a.w.grad[0]) == pytest.approx(expected, rel=1e-5)


def test_parameters_without_gradient_do_not_count(place: Place) -> None:
    model = bare({"a.w": (50,), "b.w": (60,)}, device=place.device)
    amplifier = place.amplifier(model, max_norm=1e9)
    put(model, {"a.w": torch.ones(50, device=place.device)})
    amplifier.step()
    assert float(amplifier.total_norm) == pytest.approx(math.sqrt(50), rel=1e-6)


@pytest.mark.parametrize("unscale", [True, False])
def test_the_norm_is_of_unscaled_gradients(place: Place, unscale: bool) -> None:
    model = bare(NARROW, device=place.device)
    twin = Twin(model, place, max_norm=0.5, **QUICK)
    stream = Stream(model)
    scale = torch.tensor([1024.0], device=place.device)
    for _ in range(4):
        gradients = {name: g * 1024 for name, g in stream.next().items()}
        twin.step(gradients, grad_scale=scale, unscale=unscale)
        expected = twin.oracle.total_norm
        assert float(twin.amplifier.total_norm) == pytest.approx(expected, rel=1e-5)


def test_no_norm_without_being_asked(place: Place) -> None:
    model = bare(NARROW, device=place.device)
    amplifier = place.amplifier(model)
    put(model, Stream(model).next())
    amplifier.step()
    assert amplifier.total_norm is None


def test_the_norm_stays_on_the_device(place: Place) -> None:
    model = bare(NARROW, device=place.device)
    amplifier = place.amplifier(model, max_norm=1.0)
    put(model, Stream(model).next())
    amplifier.step()
    assert amplifier.total_norm.device.type == place.device
    assert amplifier.total_norm.numel() == 1
