"""Input that is not the usual: skipped, warned about, or refused by name before any write."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from cases import Place, Stream, bare, put, same_bits
from torch import Tensor, nn

SHAPES = {"a.w": (12, 6), "b.w": (40,), "z.w": (12, 6)}
QUICK = {"measure": "variance", "min_steps": 1, "refresh": 1, "threshold": 1e9}


class Tagged(Tensor):
    """A subclass with a meaning of its own."""


def sparse(x: Tensor) -> Tensor:
    return x.to_sparse()


def tagged(x: Tensor) -> Tensor:
    return x.as_subclass(Tagged)


def expanded(x: Tensor) -> Tensor:
    return x[:1].clone().expand(12, 6)


def overlapping(x: Tensor) -> Tensor:
    return torch.ones(17, device=x.device).as_strided((12, 6), (1, 1))


@pytest.mark.parametrize("timing", ["lagged", "exact"])
@pytest.mark.parametrize("how", [sparse, tagged, expanded, overlapping])
@pytest.mark.parametrize("prepared", [False, True])
def test_refused_by_name_before_any_write(
    place: Place, prepared: bool, how: Callable[[Tensor], Tensor], timing: str
) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, timing=timing, **QUICK)
    stream = Stream(model)
    for _ in range(2 if prepared else 0):
        put(model, stream.next())
        amplifier.step()
    state = repr(amplifier.report()) if prepared else None

    gradients = stream.next()
    gradients["z.w"] = how(gradients["z.w"])
    copies = {name: g.clone() for name, g in gradients.items()}
    put(model, gradients)
    with pytest.raises((TypeError, ValueError), match=r"z\.w"):
        amplifier.step()
    assert same_bits(model.a.w.grad, copies["a.w"])
    assert same_bits(model.b.w.grad, copies["b.w"])
    if prepared:
        assert repr(amplifier.report()) == state

    put(model, stream.next())
    amplifier.step()
    assert amplifier.report().steps == (3 if prepared else 1)


def test_refused_in_an_excluded_parameter_too(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, exclude=["z.*"], **QUICK)
    gradients = Stream(model).next()
    gradients["z.w"] = expanded(gradients["z.w"])
    put(model, gradients)
    with pytest.raises((TypeError, ValueError), match=r"z\.w"):
        amplifier.step()


def test_meta_gradients(place: Place) -> None:
    model = bare(SHAPES, device="meta")
    put(model, {name: torch.zeros_like(p) for name, p in model.named_parameters()})
    with pytest.raises((TypeError, ValueError), match=r"a\.w"):
        place.amplifier(model).step()


def test_gradients_on_several_devices(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    elsewhere = "cpu" if place.device == "cuda" else "meta"
    model.z.w = nn.Parameter(torch.zeros(12, 6, device=elsewhere))
    put(model, {n: torch.zeros_like(p) for n, p in model.named_parameters()})
    with pytest.raises((TypeError, ValueError), match=r"z\.w"):
        place.amplifier(model).step()


def test_parameters_without_gradient_are_skipped(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **QUICK)
    stream = Stream(model)
    for _ in range(3):
        gradients = stream.next()
        del gradients["b.w"]
        before = gradients["a.w"].clone()
        put(model, gradients)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            amplifier.step()
    assert model.b.w.grad is None
    assert {layer.name: layer.steps for layer in amplifier.report().layers} == {
        "a": 3, "b": 0, "z": 3,
    }  # fmt: skip
    assert same_bits(model.a.w.grad, before * 2)


def test_no_gradient_at_all_warns_once(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **QUICK)
    stream = Stream(model)
    put(model, stream.next())
    amplifier.step()
    state = repr(amplifier.report())
    put(model, {})
    with pytest.warns(UserWarning, match=r"backward"):
        amplifier.step()
    assert repr(amplifier.report()) == state
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        amplifier.step()
    assert repr(amplifier.report()) == state
    put(model, stream.next())
    amplifier.step()
    assert amplifier.report().steps == 2


def test_no_gradient_on_the_first_step(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **QUICK)
    with pytest.warns(UserWarning, match=r"backward"):
        amplifier.step()
    put(model, Stream(model).next())
    amplifier.step()
    assert amplifier.report().steps == 1


def test_one_warning_for_each_amplifier(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    for _ in range(2):
        amplifier = place.amplifier(model)
        with pytest.warns(UserWarning, match="backward"):
            amplifier.step()


def test_zero_gradients_set_in_place_are_gradients(place: Place) -> None:
    """``zero_grad(set_to_none=False)`` leaves gradients of zeros: a step like any other."""
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **QUICK)
    for _ in range(2):
        put(model, {n: torch.zeros_like(p) for n, p in model.named_parameters()})
        amplifier.step()
    assert [layer.steps for layer in amplifier.report().layers] == [2, 2, 2]
    assert not any(layer.selected for layer in amplifier.report().layers)


def test_a_trained_model(place: Place) -> None:
    """Gradients as autograd leaves them: convolution, norms, shared views, no warning."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    ).to(place.device, memory_format=torch.channels_last)
    amplifier = place.amplifier(model, min_steps=2, refresh=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.to(place.device)), y.to(place.device)).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            amplifier.step()
        optimizer.step()
    assert [layer.name for layer in amplifier.report().layers] == ["0", "1", "4"]
    assert any(layer.selected for layer in amplifier.report().layers)


def test_gradients_that_share_one_buffer(place: Place) -> None:
    """As DistributedDataParallel's bucket views do."""
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **QUICK)
    generator = torch.Generator().manual_seed(0)
    for step in range(2):
        buffer = torch.randn(12 * 6 + 40 + 12 * 6, generator=generator).to(place.device)
        before = buffer.clone()
        a, b, z = buffer.split([72, 40, 72])
        put(model, {"a.w": a.view(12, 6), "b.w": b, "z.w": z.view(12, 6)})
        amplifier.step()
        assert same_bits(buffer, before * (2 if step else 1))


@pytest.mark.parametrize(
    "scale", [torch.ones(2), torch.ones(1, dtype=torch.int64), 2.0], ids=["two", "integer", "float"]
)
def test_grad_scale_is_a_one_element_tensor(place: Place, scale: object) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model)
    gradients = Stream(model).next()
    put(model, {n: g.clone() for n, g in gradients.items()})
    with pytest.raises((TypeError, ValueError), match="grad_scale"):
        amplifier.step(grad_scale=scale)
    assert all(same_bits(p.grad, gradients[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scalars_of_any_one_element_shape(place: Place, shape: tuple[int, ...]) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model)
    gradients = Stream(model).next()
    before = {n: g.clone() for n, g in gradients.items()}
    put(model, gradients)
    found_inf = torch.zeros(shape, device=place.device)
    amplifier.step(grad_scale=torch.full(shape, 8.0, device=place.device), found_inf=found_inf)
    assert all(same_bits(p.grad, before[n] / 8) for n, p in model.named_parameters())
    model.a.w.grad[0, 0] = torch.inf
    amplifier.step(found_inf=found_inf)
    assert float(found_inf) == 1
    assert found_inf.shape == shape


def test_gradients_that_are_part_of_a_graph(place: Place) -> None:
    """``backward(create_graph=True)`` leaves gradients that require gradients themselves."""
    model = bare({"a.w": (33,), "b.w": (5,)}, device=place.device)
    amplifier = place.amplifier(model, **QUICK)
    with torch.no_grad():
        model.a.w.copy_(torch.linspace(1, 2, 33))
        model.b.w.copy_(torch.linspace(-1, 2, 5))
    for step in range(2):
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a reference cycle
            (model.a.w.pow(3).sum() + model.b.w.pow(2).sum()).backward(create_graph=True)
        assert model.a.w.grad.requires_grad
        before = model.a.w.grad.detach().clone()
        amplifier.step()
        assert same_bits(model.a.w.grad, before * (2 if step else 1))
    model.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_default_dtype_does_not_matter(place: Place, dtype: torch.dtype) -> None:
    reports = []
    for default in (torch.float32, dtype):
        model = bare(SHAPES, device=place.device)
        stream = Stream(model)
        torch.set_default_dtype(default)
        try:
            amplifier = place.amplifier(model, min_steps=2, refresh=2)
            for _ in range(4):
                put(model, stream.next())
                amplifier.step()
            reports.append(repr(amplifier.report()))
        finally:
            torch.set_default_dtype(torch.float32)
    assert reports[0] == reports[1]
