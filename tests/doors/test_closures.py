"""Closures: every call that makes new gradients is amplified once, any other is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Place
from factors import ALWAYS, backward, closure_of, linear, network, only, sgd, slopes
from torch import Tensor


class LineSearch(torch.optim.SGD):
    """Looks at values after the gradients were made; each look passes these arguments."""

    looks: tuple[dict[str, Any], ...] = ({"backward": False}, {"backward": False})

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for arguments in self.looks:
            closure(**arguments)
        return loss


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_value_only_calls_do_not_multiply_again(place: Place, how: str) -> None:
    model = network(place.device)
    optimizer = LineSearch(model.parameters(), lr=0.0)
    amplifier = place.amplifier(model, **ALWAYS)
    amplifier.attach(optimizer)
    for step in range(1, 4):
        raw = slopes(model, step)
        closure = closure_of(optimizer, model, raw)
        if how == "positional":
            optimizer.step(closure)
        else:
            optimizer.step(closure=closure)
        assert only(model, raw) == 2.0
        assert amplifier.report().steps == step


def test_value_only_calls_inside_one_closure(place: Place) -> None:
    """A closure that knows by itself that no gradient is wanted."""
    model = network(place.device)
    raw = slopes(model)

    class NoGrad(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                closure()
                closure()
            super().step()
            return loss

    optimizer = NoGrad(model.parameters(), lr=0.0)
    amplifier = place.amplifier(model, **ALWAYS)
    amplifier.attach(optimizer)

    def closure() -> Tensor:
        loss = linear(model, raw)
        if torch.is_grad_enabled():
            optimizer.zero_grad()
            loss.backward()
        return loss

    for step in range(1, 4):
        optimizer.step(closure)
        assert only(model, raw) == 2.0
        assert amplifier.report().steps == step


def test_values_first_then_gradients(place: Place) -> None:
    """The gradients of before the step are amplified once, and so are the new ones."""
    model = network(place.device)
    raw, later = slopes(model, 0), slopes(model, 1)

    class Warm(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure(backward=False)
            assert only(model, raw) == 2.0
            return super().step(closure)

    optimizer = Warm(model.parameters(), lr=0.0)
    amplifier = place.amplifier(model, **ALWAYS)
    amplifier.attach(optimizer)
    backward(model)
    optimizer.step(closure_of(optimizer, model, later))
    assert only(model, later) == 2.0
    assert amplifier.report().steps == 2


def test_a_closure_that_only_tells_the_loss(place: Place) -> None:
    """``backward()`` was called before the step."""
    model = network(place.device)
    optimizer = sgd(model.parameters())
    amplifier = place.amplifier(model, **ALWAYS)
    amplifier.attach(optimizer)
    raw = backward(model)
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    assert only(model, raw) == 2.0
    assert amplifier.report().steps == 1


@pytest.mark.parametrize("set_to_none", [True, False])
def test_every_call_with_new_gradients_is_amplified(place: Place, set_to_none: bool) -> None:
    """As LBFGS and SAM call closures; gradients at the same address are new ones too."""
    model = network(place.device)
    raw = slopes(model)
    seen: list[float] = []

    class Thrice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for _ in range(3):
                with torch.enable_grad():
                    loss = closure()
                seen.append(only(model, raw))
            return loss

    optimizer = Thrice(model.parameters(), lr=0.0)
    amplifier = place.amplifier(model, **ALWAYS)
    amplifier.attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = linear(model, raw)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert seen == [2.0, 2.0, 2.0]
    assert amplifier.report().steps == 3


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs(place: Place, search: str | None) -> None:
    """Every evaluation's gradient is twice the raw one of the point it was made at."""
    torch.manual_seed(0)
    model = network(place.device)
    x = torch.randn(9, 6).to(place.device)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn=search)
    amplifier = place.amplifier(model, **ALWAYS)
    amplifier.attach(optimizer)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    gradients = []
    gather = optimizer._gather_flat_grad

    def spy() -> Tensor:
        with torch.enable_grad():
            here = torch.autograd.grad((model(x) - 1).square().mean(), list(model.parameters()))
        flat = gather()
        gradients.append((flat, torch.cat([g.flatten() for g in here])))
        return flat

    optimizer._gather_flat_grad = spy
    optimizer.step(closure)
    assert calls > 1
    assert amplifier.report().steps == calls
    for seen, raw in gradients:
        torch.testing.assert_close(seen, 2 * raw, rtol=1e-4, atol=1e-6)


def test_a_subclass_that_calls_the_closure_itself(place: Place) -> None:
    """It then steps without one: what the closure made is amplified already."""
    model = network(place.device)

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                loss = None if closure is None else closure()
            super().step()
            return loss

    optimizer = Own(model.parameters(), lr=0.0)
    amplifier = place.amplifier(model, **ALWAYS)
    amplifier.attach(optimizer)
    raw = slopes(model)
    for step in range(1, 4):
        optimizer.step(closure_of(optimizer, model, raw))
        assert only(model, raw) == 2.0
        assert amplifier.report().steps == step


def test_a_subclass_that_never_calls_the_closure(place: Place) -> None:
    model = network(place.device)

    class Deaf(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step()

    optimizer = Deaf(model.parameters(), lr=0.0)
    place.amplifier(model, **ALWAYS).attach(optimizer)
    raw = backward(model)
    optimizer.step(lambda: None)
    assert only(model, raw) == 2.0


class TakesLoss(torch.optim.SGD):
    """A step that wants the loss, or any other value, and no closure."""

    def step(self, loss: Any = None, **more: Any) -> Any:
        super().step()
        return loss, more


@pytest.mark.parametrize("loss", [torch.tensor(1.5), 1.5, "best"])
def test_an_argument_that_cannot_be_called_is_passed_on(place: Place, loss: Any) -> None:
    model = network(place.device)
    optimizer = TakesLoss(model.parameters(), lr=0.0)
    place.amplifier(model, **ALWAYS).attach(optimizer)
    raw = backward(model)
    found, more = optimizer.step(loss, epoch=3)
    assert found is loss
    assert more == {"epoch": 3}
    assert only(model, raw) == 2.0


def test_a_loss_given_as_closure_keyword(place: Place) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step()
            return closure

    model = network(place.device)
    optimizer = Odd(model.parameters(), lr=0.0)
    place.amplifier(model, **ALWAYS).attach(optimizer)
    raw = backward(model)
    assert optimizer.step(closure=0.25) == 0.25
    assert only(model, raw) == 2.0


def test_the_scaler_switched_off(place: Place) -> None:
    """The closure's door of ``GradScaler(enabled=False)`` is the same."""
    import gradamp_fast

    model = network(place.device)
    optimizer = LineSearch(model.parameters(), lr=0.0)
    amplifier = place.amplifier(model, **ALWAYS)
    scaler = gradamp_fast.GradScaler(amplifier, place.device, enabled=False)
    raw = slopes(model)
    for step in range(1, 3):
        scaler.step(optimizer, closure_of(optimizer, model, raw))
        scaler.update()
        assert only(model, raw) == 2.0
        assert amplifier.report().steps == step
