"""The sketch: signs, buckets, and the running means that backends share."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from cases import (
    BASE,
    COMPLEX,
    LARGE_SIZES,
    REALS,
    SIZES,
    Place,
    Stream,
    Twin,
    bare,
    normal,
    put,
    vector,
)  # fmt: skip

from gradamp_fast import reference


def test_the_sign_hash_is_murmurs_finaliser() -> None:
    """MurmurHash3_x86_32 of the empty key is the finaliser of the seed: published values."""
    assert oracle.murmur_finaliser(0) == 0
    assert oracle.murmur_finaliser(1) == 0x514E28B7
    assert oracle.murmur_finaliser(0xFFFFFFFF) == 0x81F16F39


def test_signs_of_the_first_words() -> None:
    """Elements 0-31 have word 0, all plus; elements 32-63 have 0x514E28B7, bit 0 first."""
    word = [int(bit) for bit in reversed(f"{0x514E28B7:032b}")]
    expected = [1] * 32 + [-1 if bit else 1 for bit in word]
    assert reference.signs(64, torch.device("cpu")).tolist() == expected
    assert [oracle.sign(i) for i in range(64)] == expected


@pytest.mark.parametrize("size", [1, 32, 33, 4097, 131073])
def test_signs_of_every_element(place: Place, size: int) -> None:
    found = reference.signs(size, torch.device(place.device)).cpu().double().numpy()
    assert np.array_equal(found, oracle.signs(size))
    assert size < 4096 or abs(found.mean()) < 5 / size**0.5


def power(place: Place, gradient: torch.Tensor) -> tuple[float, float]:
    """Q - R after one step with this gradient g, which is 0; and q, the power of its buckets.

    After the steps (g, 0) a plain average holds Q = q/2 and R = q/4, hence q = 4 (Q - R).
    """
    model = bare({"a.w": tuple(gradient.shape)}, gradient.dtype, place.device)
    amplifier = place.amplifier(model, decay=None)
    found = []
    for g in (gradient.clone(), torch.zeros_like(gradient)):
        put(model, {"a.w": g.to(place.device)})
        amplifier.step()
        row = amplifier.report().layers[0]
        found.append(row.temporal_variance * row.numel)
    return found[0], 4 * found[1]


@pytest.mark.parametrize("size", [*SIZES, *LARGE_SIZES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_power_of_one_gradient(place: Place, size: int, dtype: torch.dtype) -> None:
    gradient = normal((size,), dtype, torch.Generator().manual_seed(size)) + 0.25
    at_first, q = power(place, gradient)
    expected = np.square(oracle.bucket_sums(vector(gradient))).sum()
    assert abs(at_first) <= BASE.sketch * expected
    assert q == pytest.approx(expected, rel=2 * BASE.sketch)


@pytest.mark.parametrize("size", [4096, 131072])
def test_each_element_lands_in_its_bucket_with_its_sign(place: Place, size: int) -> None:
    """Two elements of one bucket add or cancel as their signs say; of two buckets they do not."""
    length = oracle.bucket_length(size)
    for i, j in ((0, 1), (length - 1, length), (40, 47), (47, 48), (size - 2, size - 1), (33, 35)):
        gradient = torch.zeros(size)
        gradient[i] = gradient[j] = 1.0
        together = i // length == j // length
        expected = (oracle.sign(i) + oracle.sign(j)) ** 2 if together else 2
        assert power(place, gradient)[1] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [*REALS, *COMPLEX], ids=str)
@pytest.mark.parametrize("decay", [0.9, None])
def test_running_sketch(place: Place, decay: float | None, dtype: torch.dtype) -> None:
    """Agreement, fluctuation and temporal variance over many steps, at each bucket length."""
    shapes = {"a.w": (1009,), "b.w": (4099,), "b.v": (67,), "c.w": (131077,)}
    if dtype.is_complex:
        shapes["c.w"] = (65539,)
    model = bare(shapes, dtype, place.device)
    twin = Twin(model, place, decay=decay)
    stream = Stream(model)
    for _ in range(8):
        twin.step(stream.next())


@pytest.mark.parametrize("measure", ["fluctuation", "direction"])
def test_oscillation_and_steadiness(place: Place, measure: str) -> None:
    """The extremes, where the means all but vanish or all but equal the gradient."""
    model = bare({"steady.w": (5000,), "flip.w": (5000,), "fading.w": (5000,)}, device=place.device)
    twin = Twin(model, place, measure=measure, decay=0.95, min_steps=2, refresh=5)
    base = normal((5000,), torch.float32, torch.Generator().manual_seed(0)).to(place.device)
    for step in range(20):
        gradients = {"steady.w": base, "flip.w": base * (-1) ** step, "fading.w": base * 0.5**step}
        twin.step({name: g.clone() for name, g in gradients.items()})


@pytest.mark.parametrize("size", [5, 4095, 4096, 4097, 131071, 131073])
def test_reference_buckets(size: int) -> None:
    g = torch.randn(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    log2 = {1: 0, 16: 4, 512: 9}[oracle.bucket_length(size)]
    found = reference.bucket_sums(g, log2).numpy()
    np.testing.assert_allclose(found, oracle.bucket_sums(g.numpy()), rtol=0, atol=1e-12)
