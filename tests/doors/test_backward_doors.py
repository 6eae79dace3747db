"""placement="backward": what its hooks never see, and backward passes that are not training."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from cases import Place
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gradamp_fast import Amplifier

OPTIONS: dict[str, Any] = {
    "placement": "backward", "measure": "random", "threshold": 2.0, "min_steps": 1, "refresh": 1,
    "measure_every": 2, "factor": 2.0, "max_amplification": 4096.0,
}  # fmt: skip


class Functional(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.used, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.first(x), self.used.weight, self.used.bias)
        return self.last(x)


class Bypassed(Functional):
    """Calls ``forward`` instead of the module."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.used.forward(self.first(x)))


class Called(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.used(self.first(x)))


class Attention(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.used(x, x, x)[0])


class Parametrized(Functional):
    def __init__(self) -> None:
        super().__init__()
        parametrize.register_parametrization(self.used, "weight", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.used(self.first(x)))


UNCALLED = {
    Functional: "used",
    Bypassed: "used",
    Attention: "used.out_proj",
    Parametrized: "used.parametrizations.weight",
}


def train(model: nn.Module, amplifier: Amplifier, count: int) -> Tensor:
    """Steps; returns the last one's gradient of the first layer's weight over the raw one."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(model.last.weight.device)
    twin = copy.deepcopy(model)  # whose hooks, if it has any, do nothing
    for _ in range(count):
        for each in (model, twin):
            each.zero_grad()
            each(x).square().sum().backward()
        amplifier.step()
    return (model.first.weight.grad / twin.first.weight.grad).flatten()


@pytest.mark.parametrize("kind", UNCALLED, ids=lambda kind: kind.__name__)
def test_a_layer_that_is_never_called_is_not_selected(place: Place, kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().to(place.device)
    amplifier = place.amplifier(model, **OPTIONS)
    ratio = train(model, amplifier, 4)
    selected = {layer.name: layer.selected for layer in amplifier.report().layers}
    assert not selected[UNCALLED[kind]]
    assert selected["last"]
    # What reached the first layer went through each selected module that was called, once.
    passed = [n for n in ("last", "used") if selected.get(n)]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2.0 ** len(passed)))


def test_it_does_not_count_towards_the_bound(place: Place) -> None:
    """Three layers, of which two are called: each factor is at most 16^(1/2)."""
    torch.manual_seed(0)
    model = Functional().to(place.device)
    options = {**OPTIONS, "factor": 100.0, "max_amplification": 16.0}
    ratio = train(model, place.amplifier(model, **options), 4)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 4.0))


def test_a_layer_that_is_called_now_and_then(place: Place) -> None:
    """It is selected again once its module has been called."""
    torch.manual_seed(0)
    model = Functional().to(place.device)
    amplifier = place.amplifier(model, **OPTIONS)
    seen = []
    for kind in (Functional, Called, Bypassed):
        model.__class__ = kind
        train(model, amplifier, 4)
        seen.append({layer.name for layer in amplifier.report().layers if layer.selected})
    assert ["used" in names for names in seen] == [False, True, False]


# ---- passes that are not training --------------------------------------------------------


def amplified(place: Place) -> tuple[nn.Sequential, Amplifier, Tensor]:
    """A model whose next backward pass is amplified, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).to(place.device)
    amplifier = place.amplifier(model, **OPTIONS)
    x = torch.randn(3, 4).to(place.device)
    for _ in range(3):
        model.zero_grad()
        model(x).square().sum().backward()
        amplifier.step()
    return model, amplifier, x.requires_grad_()


def input_gradient(model: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.grad(model(x).sum(), x)[0]


def functional_gradient(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: model(x).sum())(x.detach())


def hessian(model: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(lambda x: model(x).sum(), x[:1].detach())


@pytest.mark.parametrize("look", [input_gradient, functional_gradient, hessian])
def test_suspended_it_leaves_other_passes_alone(place: Place, look: Any) -> None:
    model, amplifier, x = amplified(place)
    expected = look(copy.deepcopy(model), x)
    assert not torch.allclose(look(model, x), expected)
    with amplifier.suspended():
        torch.testing.assert_close(look(model, x), expected)
    assert not torch.allclose(look(model, x), expected)


def test_suspended_at_the_time_of_the_forward_or_the_backward_pass(place: Place) -> None:
    model, amplifier, x = amplified(place)
    with amplifier.suspended():
        expected = input_gradient(model, x)
    out = model(x).sum()
    with amplifier.suspended():
        torch.testing.assert_close(torch.autograd.grad(out, x)[0], expected)


def test_suspended_in_each_other_and_after_an_error(place: Place) -> None:
    model, amplifier, x = amplified(place)
    before = input_gradient(model, x)
    with amplifier.suspended():
        with amplifier.suspended():
            expected = input_gradient(model, x)
        torch.testing.assert_close(input_gradient(model, x), expected)
    torch.testing.assert_close(input_gradient(model, x), before)
    with pytest.raises(ArithmeticError), amplifier.suspended():
        raise ArithmeticError
    torch.testing.assert_close(input_gradient(model, x), before)


def test_scripting_says_what_is_in_the_way() -> None:
    model, amplifier, _ = amplified(Place("torch", "cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="placement='backward'"):
            torch.jit.script(model)
        del amplifier
        torch.jit.script(model)


def test_a_scripted_part_is_told_of_or_amplified(place: Place) -> None:
    """A scripted module inside of the model runs its hooks as any other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), scripted, nn.Linear(4, 1)).to(place.device)
    amplifier = place.amplifier(model, **OPTIONS)
    x = torch.randn(3, 4).to(place.device)
    for _ in range(4):
        model.zero_grad()
        model(x).square().sum().backward()
        amplifier.step()
    rows = {layer.name: layer.selected for layer in amplifier.report().layers}
    with amplifier.suspended():
        raw = torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
    wanted = 2.0 ** (rows["1"] + rows["2"])
    torch.testing.assert_close(model[0].weight.grad, raw * wanted)
