"""Mean and variance of a layer's gradients against fp64, in every dtype and size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from cases import BASE, COMPLEX, LARGE_SIZES, REALS, SIZES, TOLERANCE, Place, bare, normal, put
from cases import vector as as_vector
from torch import Tensor, nn

from gradamp_fast import Amplifier


def statistics(vectors: Sequence[np.ndarray]) -> tuple[float, float, int]:
    """Mean, variance and count, two passes in extended precision."""
    x = np.concatenate(vectors).astype(np.longdouble)
    mean = x.sum() / x.size
    return float(mean), float(np.square(x - mean).sum() / x.size), x.size


def measured(place: Place, gradients: dict[str, Tensor]) -> tuple[nn.Module, Amplifier]:
    """A model that has taken one step with these gradients; clipping is asked for, to no effect."""
    shapes = {name: tuple(g.shape) for name, g in gradients.items()}
    model = bare(shapes, {name: g.dtype for name, g in gradients.items()}, place.device)
    put(model, {name: g.clone().to(place.device) for name, g in gradients.items()})
    amplifier = place.amplifier(model, max_norm=1e300)
    amplifier.step()
    return model, amplifier


def check(place: Place, gradient: Tensor) -> None:
    _, amplifier = measured(place, {"a.w": gradient})
    check_one(amplifier, [gradient])


def check_one(amplifier: Amplifier, gradients: list[Tensor]) -> None:
    """The variance as reported; the mean through the norm, whose square is n (v + m^2)."""
    mean, variance, n = statistics([as_vector(g) for g in gradients])
    tolerance = TOLERANCE[gradients[0].dtype]
    row = amplifier.report().layers[0]
    assert row.steps == 1
    assert abs(row.variance - variance) <= tolerance.variance * variance
    square = variance + mean * mean
    norm = float(amplifier.total_norm)
    allowed = tolerance.variance * variance + 2 * tolerance.mean * abs(mean) * math.sqrt(square)
    assert abs(norm * norm / n - square) <= allowed


@pytest.mark.parametrize("dtype", [*REALS, *COMPLEX], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(place: Place, size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    check(place, normal((size,), dtype, generator) * 3 + 0.5)


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("size", LARGE_SIZES)
def test_large_sizes(place: Place, size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    check(place, normal((size,), dtype, generator) * 3 + 0.5)


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("size", [2, 33, 1009, 8193, 131073])
@pytest.mark.parametrize("mean", [1000.0, -1000.0])
def test_mean_far_above_the_deviation(
    place: Place, mean: float, size: int, dtype: torch.dtype
) -> None:
    """|m| = 1000 root v, as far as the dtype resolves it."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    check(place, ((x - x.mean()) / x.std(unbiased=False) + mean).to(dtype))


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("size", [33, 1009, 8193])
@pytest.mark.parametrize("outlier", [1e2, 1e4, -6e4])
def test_outlier_as_first_element(
    place: Place, outlier: float, size: int, dtype: torch.dtype
) -> None:
    x = normal((size,), dtype, torch.Generator().manual_seed(4))
    x[0] = outlier
    check(place, x)


@pytest.mark.parametrize("size", [33, 1009, 8193, 131073])
@pytest.mark.parametrize("where", ["middle", "last"])
def test_outlier_elsewhere(place: Place, size: int, where: str) -> None:
    x = normal((size,), torch.float32, torch.Generator().manual_seed(5))
    x[size // 2 if where == "middle" else -1] = 1e6
    check(place, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("magnitude", [1e-25, 1e-18, 1e18])
@pytest.mark.parametrize("size", [5, 1009, 8193])
def test_magnitudes(place: Place, magnitude: float, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    check(place, ((x + 0.3) * magnitude).to(dtype))


@pytest.mark.parametrize("magnitude", [1e-120, 1e-45, 1e30])
def test_magnitudes_of_fp64(place: Place, magnitude: float) -> None:
    x = torch.randn(1009, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    check(place, x * magnitude)


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_smallest_subnormals_of_half(place: Place, dtype: torch.dtype) -> None:
    x = torch.randint(-9, 9, (1009,), generator=torch.Generator().manual_seed(8))
    check(place, (x * 2.0**-24).to(dtype))


EQUAL = [(value, dtype) for value in (0.0, 1.0, 1 / 3, -777.0, 6e4) for dtype in REALS] + [
    (value, dtype) for value in (1e12, -1e17, 1e-30) for dtype in REALS if dtype != torch.float16
]


@pytest.mark.parametrize("size", [1, 33, 8193])
@pytest.mark.parametrize(("value", "dtype"), EQUAL, ids=str)
def test_equal_elements_have_no_variance(
    place: Place, value: float, size: int, dtype: torch.dtype
) -> None:
    """Their variance is 0, up to the rounding of the mean."""
    _, amplifier = measured(place, {"a.w": torch.full((size,), value, dtype=dtype)})
    row = amplifier.report().layers[0]
    assert row.steps == 1
    assert 0 <= row.variance <= (1e-7 * value) ** 2


def test_weight_and_bias_together(place: Place) -> None:
    """A layer's moments run over all its tensors, however far apart their means."""
    generator = torch.Generator().manual_seed(9)
    weight = normal((130, 70), torch.float32, generator) - 5
    bias = normal((130,), torch.float32, generator) * 1e-3 + 40
    _, amplifier = measured(place, {"a.weight": weight, "a.bias": bias})
    check_one(amplifier, [weight, bias])
    assert amplifier.report().layers[0].numel == 130 * 71


def test_mixed_dtypes_in_one_layer(place: Place) -> None:
    generator = torch.Generator().manual_seed(10)
    gradients = {f"a.{i}": normal((65,), t, generator) + i for i, t in enumerate(REALS)}
    _, amplifier = measured(place, {n.replace("a.", "a.w"): g for n, g in gradients.items()})
    check_one(amplifier, list(gradients.values()))


def test_a_complex_element_counts_as_two(place: Place) -> None:
    gradient = normal((33,), torch.complex64, torch.Generator().manual_seed(11)) * (2 + 1j)
    _, amplifier = measured(place, {"a.w": gradient})
    check_one(amplifier, [gradient])
    assert amplifier.report().layers[0].numel == 66


def test_running_variance(place: Place) -> None:
    """V is the bias-corrected moving average of v."""
    model = bare({"a.w": (500,)}, device=place.device)
    amplifier = place.amplifier(model, decay=0.9)
    variances = []
    for step in range(12):
        g = normal((500,), torch.float32, torch.Generator().manual_seed(step)) * (step + 1)
        variances.append(statistics([as_vector(g)])[1])
        put(model, {"a.w": g.to(place.device)})
        amplifier.step()
        weights = [0.9 ** (step - t) for t in range(step + 1)]
        expected = np.average(variances, weights=weights)
        actual = amplifier.report().layers[0].variance
        assert abs(actual - expected) <= BASE.variance * expected
