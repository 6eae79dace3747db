"""attach(): one amplified step before every optimizer step, closures included."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Place, same_bits
from torch import Tensor, nn

QUICK = {"measure": "variance", "min_steps": 1, "refresh": 1, "threshold": 1e9, "factor": 4.0}


def problem(place: Place) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(place.device)
    x, y = torch.randn(7, 6).to(place.device), torch.randn(7, 3).to(place.device)
    return model, lambda: (model(x) - y).square().mean()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def by_hand(place: Place, steps: int, **options: object) -> list[Tensor]:
    """The same training with ``amplifier.step()`` written out."""
    model, loss = problem(place)
    amplifier = place.amplifier(model, **{**QUICK, **options})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        amplifier.step()
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("how", ["plain", "positional", "keyword"])
def test_same_as_by_hand(place: Place, how: str) -> None:
    model, loss = problem(place)
    amplifier = place.amplifier(model, **QUICK)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    amplifier.attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(4):
        if how == "plain":
            closure()
            optimizer.step()
        elif how == "positional":
            assert optimizer.step(closure) is not None
        else:
            assert optimizer.step(closure=closure) is not None
    assert amplifier.report().steps == 4
    for mine, theirs in zip(weights(model), by_hand(place, 4), strict=True):
        assert same_bits(mine, theirs)


def test_every_closure_call_of_lbfgs_is_a_step(place: Place) -> None:
    model, loss = problem(place)
    amplifier = place.amplifier(model, **QUICK)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    amplifier.attach(optimizer)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    assert calls > 1
    assert amplifier.report().steps == calls


def test_a_removed_handle_does_nothing(place: Place) -> None:
    model, loss = problem(place)
    amplifier = place.amplifier(model, **QUICK)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = amplifier.attach(optimizer)
    loss().backward()
    optimizer.step()
    handle.remove()
    handle.remove()
    optimizer.step()
    assert amplifier.report().steps == 1
    amplifier.attach(optimizer)
    optimizer.step()
    assert amplifier.report().steps == 2


def test_param_group_that_is_not_to_be_amplified(place: Place) -> None:
    model, loss = problem(place)
    amplifier = place.amplifier(model, **QUICK)
    groups = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "amplify": False},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    amplifier.attach(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        loss().backward()
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        factors = [4.0, 4.0, 1.0, 1.0] if step else [1.0] * 4
        for p, g, factor in zip(model.parameters(), before, factors, strict=True):
            assert same_bits(p.grad, g * factor)
    found = {layer.name: layer.steps for layer in amplifier.report().layers}
    assert found["0"] == 3


def test_two_optimizers_share_an_amplifier(place: Place) -> None:
    """Each amplifies its own parameters, when it steps, and once."""
    model, loss = problem(place)
    amplifier = place.amplifier(model, **QUICK)
    first = torch.optim.SGD(model[0].parameters(), lr=0.0)
    second = torch.optim.SGD(model[2].parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        amplifier.attach(first)
        amplifier.attach(second)
        for step in range(3):
            model.zero_grad()
            loss().backward()
            before = [p.grad.clone() for p in model.parameters()]
            factor = 4.0 if step else 1.0
            first.step()
            for p, g, f in zip(model.parameters(), before, [factor] * 2 + [1.0] * 2, strict=True):
                assert same_bits(p.grad, g * f)
            second.step()
            for p, g in zip(model.parameters(), before, strict=True):
                assert same_bits(p.grad, g * factor)
    assert [layer.steps for layer in amplifier.report().layers] == [3, 3]


def test_parameters_of_the_optimizer_only(place: Place) -> None:
    model, loss = problem(place)
    amplifier = place.amplifier(model, **QUICK)
    amplifier.attach(torch.optim.SGD(model[2].parameters(), lr=0.0))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.0)
    loss().backward()
    before = [p.grad.clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.step()
    assert all(same_bits(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


SCALE_INVARIANT = [
    "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "Adafactor", "Muon",
]  # fmt: skip


@pytest.mark.parametrize("name", SCALE_INVARIANT)
def test_scale_invariant_optimizers_warn_once(name: str) -> None:
    place = Place("torch", "cpu")
    model, loss = problem(place)
    amplifier = place.amplifier(model, **QUICK)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    optimizer = getattr(torch.optim, name)(matrices, lr=1e-3)
    with pytest.warns(UserWarning, match=name) as caught:
        amplifier.attach(optimizer)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            loss().backward()
            optimizer.step()


class Lion(torch.optim.Optimizer):
    """Known by its name, for it cannot be tried on other parameters."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError


class Plain(torch.optim.AdamW):
    """Tried, whatever its name."""


@pytest.mark.parametrize("kind", [Lion, Plain])
def test_optimizers_from_elsewhere_warn(kind: type[torch.optim.Optimizer]) -> None:
    place = Place("torch", "cpu")
    model, _ = problem(place)
    amplifier = place.amplifier(model)
    with pytest.warns(UserWarning, match=kind.__name__):
        amplifier.attach(kind(model.parameters(), lr=0.1))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.ASGD, torch.optim.LBFGS])
def test_others_do_not_warn(kind: type[torch.optim.Optimizer]) -> None:
    place = Place("torch", "cpu")
    model, _ = problem(place)
    amplifier = place.amplifier(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        amplifier.attach(kind(model.parameters(), lr=0.1))


def test_an_optimizer_of_another_model_is_refused() -> None:
    place = Place("torch", "cpu")
    amplifier = place.amplifier(problem(place)[0])
    with pytest.raises(ValueError, match="parameter"):
        amplifier.attach(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))


class Hookless(torch.optim.SGD):
    """As wrappers are that do not call Optimizer.__init__."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__dict__.update(optimizer.__dict__)

    def step(self, closure: object = None) -> None:
        pass


def test_an_optimizer_whose_step_calls_no_hooks_is_refused() -> None:
    place = Place("torch", "cpu")
    model, _ = problem(place)
    optimizer = Hookless(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"Hookless\.step\(\) calls no hooks"):
        place.amplifier(model).attach(optimizer)


def test_grad_scaler_with_a_plain_optimizer(place: Place) -> None:
    """The scaler unscales before the hook and drops steps that overflowed."""
    model, loss = problem(place)
    amplifier = place.amplifier(model, **QUICK)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    amplifier.attach(optimizer)
    scaler = torch.amp.GradScaler(place.device, init_scale=16.0)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        if step == 2:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert amplifier.report().steps == 4
    for mine, theirs in zip(weights(model), by_hand(place, 4), strict=True):
        assert same_bits(mine, theirs)


def test_grad_scaler_with_an_optimizer_that_unscales_itself(place: Place) -> None:
    """A fused optimizer divides by the scale: the amplifier measures through it only."""
    model, loss = problem(place)
    amplifier = place.amplifier(model, **QUICK)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    amplifier.attach(optimizer)
    scaler = torch.amp.GradScaler(place.device, init_scale=16.0)
    variances = []
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        if step == 2:
            model[0].weight.grad[0, 0] = torch.inf
        before = model[2].weight.grad.clone()
        scaler.step(optimizer)
        scaler.update()
        variances.append(amplifier.report().layers[1].variance)
        if step == 1:
            assert float((model[2].weight.grad / before).median()) in (4.0, 4.0 / 16)
    report = amplifier.report()
    assert (report.steps, report.skipped_steps) == (5, 1)
    assert variances[2] == variances[1]
    for mine, theirs in zip(weights(model), by_hand(place, 4), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_an_attached_amplifier_that_dies_takes_its_hook_along(place: Place) -> None:
    model, loss = problem(place)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    amplifier = place.amplifier(model, **QUICK)
    handle = amplifier.attach(optimizer)
    loss().backward()
    optimizer.step()
    handle.remove()
    del amplifier, handle
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(same_bits(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
