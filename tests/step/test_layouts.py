"""Gradients that are not plain contiguous tensors: the same bits, in the same memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import COMPLEX, REALS, Place, bare, normal, put, same_bits, scaled
from oracle import Oracle
from torch import Tensor, nn

from gradamp_fast import Amplifier

Layout = Callable[[Tensor], Tensor]


def transposed(x: Tensor) -> Tensor:
    return x.clone().transpose(0, 1).contiguous().transpose(0, 1)


def channels_last(x: Tensor) -> Tensor:
    return x.clone().contiguous(memory_format=torch.channels_last)


def every_other(x: Tensor) -> Tensor:
    out = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)
    view = out[..., ::2]
    return view.copy_(x)


def rows_of_a_wider_matrix(x: Tensor) -> Tensor:
    out = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype, device=x.device)
    return out[..., 1:-2].copy_(x)


def strided_and_transposed(x: Tensor) -> Tensor:
    return every_other(x.transpose(0, 1).contiguous()).transpose(0, 1)


def misaligned(x: Tensor) -> Tensor:
    """One element past the start of an allocation."""
    out = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    return out[1:].view(x.shape).copy_(x)


LAYOUTS: dict[str, tuple[Layout, tuple[int, ...]]] = {
    "transposed": (transposed, (37, 65)),
    "transposed_3d": (transposed, (7, 11, 13)),
    "channels_last": (channels_last, (16, 5, 3, 3)),
    "channels_last_wide": (channels_last, (64, 64, 5, 5)),
    "every_other": (every_other, (41, 33)),
    "every_other_1d": (every_other, (4097,)),
    "rows_of_a_wider_matrix": (rows_of_a_wider_matrix, (29, 31)),
    "strided_and_transposed": (strided_and_transposed, (21, 33)),
    "misaligned": (misaligned, (67, 5)),
    "misaligned_large": (misaligned, (8193,)),
}


def selected(
    place: Place, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[nn.Module, Amplifier]:
    """A model of two layers that are both amplified from their second step on."""
    model = bare({"a.w": shape, "b.w": (33,)}, dtype, place.device)
    amplifier = place.amplifier(
        model, measure="variance", min_steps=1, refresh=1, threshold=1e9, factor=3.0
    )
    return model, amplifier


@pytest.mark.parametrize("dtype", [*REALS, *COMPLEX], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_in_place(place: Place, layout: str, dtype: torch.dtype) -> None:
    make, shape = LAYOUTS[layout]
    model, amplifier = selected(place, shape, dtype)
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        gradient = make(normal(shape, dtype, generator).to(place.device))
        before = gradient.clone()
        address, strides, version = gradient.data_ptr(), gradient.stride(), gradient._version
        put(model, {"a.w": gradient, "b.w": normal((33,), dtype, generator).to(place.device)})
        amplifier.step()
        assert model.a.w.grad is gradient
        assert (gradient.data_ptr(), gradient.stride()) == (address, strides)
        assert gradient.dtype == dtype
        assert same_bits(gradient, scaled(before, 3.0 if step else 1.0))
        if step:
            assert gradient._version > version


@pytest.mark.parametrize("layout", ["every_other", "rows_of_a_wider_matrix", "misaligned"])
def test_memory_around_a_view_is_left_alone(place: Place, layout: str) -> None:
    make, shape = LAYOUTS[layout]
    model, amplifier = selected(place, shape, torch.float32)
    generator = torch.Generator().manual_seed(6)
    for step in range(3):
        gradient = make(normal(shape, torch.float32, generator).to(place.device))
        before, base = gradient.clone(), gradient._base
        put(model, {"a.w": gradient, "b.w": torch.ones(33, device=place.device)})
        amplifier.step()
        assert same_bits(gradient, scaled(before, 3.0 if step else 1.0))
        gradient.zero_()
        assert not base.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_of_a_layout(place: Place, layout: str) -> None:
    """Elements are counted in memory order, or in index order where memory has gaps."""
    make, shape = LAYOUTS[layout]
    model = bare({"a.w": shape}, device=place.device)
    amplifier = place.amplifier(model, decay=0.5)
    oracle = Oracle({"a": ["a.w"]}, decay=0.5)
    generator = torch.Generator().manual_seed(2)
    base = normal(shape, torch.float32, generator)
    for _ in range(4):
        gradient = make((base + normal(shape, torch.float32, generator)).to(place.device))
        dense = gradient.numel() == gradient.untyped_storage().nbytes() // 4
        flat = gradient.as_strided((gradient.numel(),), (1,)) if dense else gradient.reshape(-1)
        oracle.step({"a.w": flat.double().cpu().numpy()})
        put(model, {"a.w": gradient})
        amplifier.step()
        row, layer = amplifier.report().layers[0], oracle.layers["a"]
        assert row.variance == pytest.approx(layer.V, rel=1e-5)
        if row.steps >= 2:
            assert row.score == pytest.approx(oracle.score("a"), abs=5e-5)
            assert row.temporal_variance == pytest.approx(
                (layer.Q - layer.R) / flat.numel(), rel=1e-4
            )


def test_layout_may_change_between_steps(place: Place) -> None:
    """A layer whose elements come in another order begins anew; the others go on.

    Gradients of other strides that are taken in the same order, through a copy, change nothing.
    """
    shape = (16, 5, 3, 3)
    model, amplifier = selected(place, shape, torch.float32)
    generator = torch.Generator().manual_seed(3)
    # How the gradient lies, and the layer's steps after it: 1 where it begins.
    layouts = [
        (torch.clone, 1), (torch.clone, 2), (channels_last, 1), (channels_last, 2),
        (transposed, 1), (transposed, 2), (misaligned, 1), (every_other, 2), (torch.clone, 3),
    ]  # fmt: skip
    for step, (make, steps) in enumerate(layouts):
        gradient = make(normal(shape, torch.float32, generator).to(place.device))
        other = normal((33,), torch.float32, generator).to(place.device)
        before, other_before = gradient.clone(), other.clone()
        put(model, {"a.w": gradient, "b.w": other})
        amplifier.step()
        assert same_bits(gradient, scaled(before, 3.0 if steps > 1 else 1.0)), step
        assert same_bits(other, scaled(other_before, 3.0 if step else 1.0)), step
        assert [layer.steps for layer in amplifier.report().layers] == [steps, step + 1]


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 2, 1), (3, 1, 4)])
def test_dimensions_of_one_with_any_stride(place: Place, shape: tuple[int, ...]) -> None:
    model, amplifier = selected(place, shape, torch.float32)
    strides = [999 if size == 1 else stride for size, stride in zip(
        shape, torch.empty(shape).stride(), strict=True)]  # fmt: skip
    for step in range(2):
        flat = torch.arange(1.0, torch.Size(shape).numel() + 1, device=place.device)
        gradient = flat.as_strided(shape, strides)
        before = gradient.clone()
        put(model, {"a.w": gradient, "b.w": torch.ones(33, device=place.device)})
        amplifier.step()
        assert same_bits(gradient, scaled(before, 3.0 if step else 1.0))


@pytest.mark.parametrize("offset", range(1, 17))
@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_alignment_changes_no_bit(place: Place, dtype: torch.dtype, offset: int) -> None:
    """The order of summation depends on the element's index, never on its address."""
    values = normal((9001,), dtype, torch.Generator().manual_seed(4)).to(place.device)
    outcomes = []
    for shift in (0, offset):
        model = bare({"a.w": (9001,)}, dtype, place.device)
        amplifier = place.amplifier(model)
        buffer = torch.zeros(9001 + shift, dtype=dtype, device=place.device)
        for step in range(2):
            gradient = buffer[shift:]
            put(model, {"a.w": gradient.copy_(values * (step + 1))})
            amplifier.step()
        row = amplifier.report().layers[0]
        outcomes.append((row.variance, row.temporal_variance, row.fluctuation, row.direction))
    assert outcomes[0] == outcomes[1]


def test_lazily_conjugated_gradient(place: Place) -> None:
    """Multiplied as any other, or refused by name; never wrong."""
    model, amplifier = selected(place, (33,), torch.complex64)
    generator = torch.Generator().manual_seed(5)
    for step in range(3):
        gradient = normal((33,), torch.complex64, generator).to(place.device).conj()
        before = gradient.clone().resolve_conj()
        other = normal((33,), torch.complex64, generator).to(place.device)
        put(model, {"a.w": gradient, "b.w": other})
        try:
            amplifier.step()
        except (TypeError, ValueError) as error:
            if "a.w" in str(error):
                return
            raise
        expected = before * (3.0 if step else 1.0)
        torch.testing.assert_close(model.a.w.grad.resolve_conj(), expected, rtol=0, atol=0)
