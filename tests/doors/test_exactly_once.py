"""One optimizer.step() amplifies once, whatever calls its hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Place, bare
from factors import ALWAYS, LAGGED, backward, closure_of, network, only, sgd, slopes, steps
from torch.optim import Optimizer

gradamp_warnings = pytest.mark.filterwarnings("ignore:.*divides out the scale")
CPU = Place("torch", "cpu")

# Muon takes matrices, SparseAdam takes gradients that nothing here amplifies.
KINDS = [
    torch.optim.Adadelta, torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.Adam,
    torch.optim.Adamax, torch.optim.AdamW, torch.optim.ASGD, torch.optim.LBFGS, torch.optim.Muon,
    torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD,
]  # fmt: skip


def calling_super(kind: type[Optimizer]) -> type[Optimizer]:
    """A subclass as users write them."""

    class Verbose(kind):  # type: ignore[misc,valid-type]
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    return Verbose


def dynamic(kind: type[Optimizer]) -> type[Optimizer]:
    """A subclass as Horovod makes it: methods copied into a new class of the same name."""

    def step(self: Any, closure: Any = None) -> Any:
        return super(type(self), self).step(closure)

    return type(kind.__name__, (kind,), {"step": step})


def two_levels(kind: type[Optimizer]) -> type[Optimizer]:
    return calling_super(calling_super(kind))


@gradamp_warnings
@pytest.mark.parametrize("make", [calling_super, dynamic, two_levels])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_subclass_that_calls_super(kind: type[Optimizer], make: Any) -> None:
    model = bare({"a.w": (4, 3), "b.w": (3, 5)})
    kind(model.parameters(), lr=0.01)  # from then on torch's own step calls the hooks, too
    optimizer = make(kind)(model.parameters(), lr=0.01)
    amplifier = CPU.amplifier(model, **ALWAYS)
    amplifier.attach(optimizer)
    for step in range(1, 3):
        calls = 0
        raw = slopes(model, step)
        inner = closure_of(optimizer, model, raw)

        def closure(inner: Any = inner) -> Any:
            nonlocal calls
            calls += 1
            return inner()

        before = amplifier.report().steps
        if kind is torch.optim.LBFGS:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        assert only(model, raw) == 2.0
        assert amplifier.report().steps - before == calls


@pytest.mark.parametrize("options", [ALWAYS, LAGGED], ids=["exact", "lagged"])
@pytest.mark.parametrize("make", [calling_super, dynamic, two_levels])
def test_on_every_backend(place: Place, make: Any, options: dict[str, Any]) -> None:
    model = network(place.device)
    sgd(model.parameters())  # from then on torch's own step calls the hooks, too
    optimizer = make(torch.optim.SGD)(model.parameters(), lr=0.0)
    amplifier = place.amplifier(model, **options)
    amplifier.attach(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        raw = backward(model, seed=step)
        optimizer.step()
        assert only(model, raw) == (1.0 if options is LAGGED and step == 0 else 2.0)
    assert amplifier.report().steps == 3
    assert steps(amplifier) == {"0": 3, "2": 3, "4": 3}


def test_scores_are_those_of_one_step_each(place: Place) -> None:
    """A second measurement of the same gradients would read as perfect agreement."""
    scores = []
    for kind in (torch.optim.SGD, calling_super(torch.optim.SGD)):
        model = network(place.device)
        optimizer = kind(model.parameters(), lr=0.0)
        amplifier = place.amplifier(model, measure="direction", min_steps=2, refresh=2)
        amplifier.attach(optimizer)
        for step in range(6):
            optimizer.zero_grad()
            backward(model, scale=(-1) ** step, seed=step)
            optimizer.step()
        scores.append([layer.score for layer in amplifier.report().layers])
    assert scores[0] == scores[1]


class Twice(torch.optim.SGD):
    """Two half steps on the same gradients."""

    def step(self, closure: Any = None) -> Any:
        super().step()
        return super().step(closure)


class Preconditioned(torch.optim.SGD):
    """Rewrites its gradients before torch's step, as Riemannian and projecting optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(3.0)
        return super().step(closure)


class Replacing(torch.optim.SGD):
    """The same with new gradient tensors."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad * 3.0
        return super().step(closure)


@pytest.mark.parametrize(("kind", "own"), [(Twice, 1.0), (Preconditioned, 3.0), (Replacing, 3.0)])
def test_what_a_step_does_inside_is_not_a_new_step(
    place: Place, kind: type[Optimizer], own: float
) -> None:
    model = network(place.device)
    optimizer = kind(model.parameters(), lr=0.0)
    amplifier = place.amplifier(model, **ALWAYS)
    amplifier.attach(optimizer)
    for step in range(1, 4):
        optimizer.zero_grad()
        raw = backward(model)
        optimizer.step()
        assert only(model, raw) == 2.0 * own
        assert amplifier.report().steps == step


class Fragile(torch.optim.SGD):
    """Raises before, or after, torch's step on demand."""

    fails: str | None = None

    def step(self, closure: Any = None) -> Any:
        if self.fails == "before":
            raise ArithmeticError
        out = super().step(closure)
        if self.fails == "after":
            raise ArithmeticError
        return out


@pytest.mark.parametrize("fails", ["before", "after"])
def test_after_a_step_that_raised(place: Place, fails: str) -> None:
    model = network(place.device)
    optimizer = Fragile(model.parameters(), lr=0.0)
    place.amplifier(model, **ALWAYS).attach(optimizer)
    for failing in (None, fails, fails, None, None):
        optimizer.zero_grad()
        raw = backward(model)
        optimizer.fails = failing
        if failing is None:
            optimizer.step()
        else:
            with pytest.raises(ArithmeticError):
                optimizer.step()
        assert only(model, raw) == 2.0


def test_after_a_closure_that_raised(place: Place) -> None:
    model = network(place.device)
    optimizer = calling_super(torch.optim.SGD)(model.parameters(), lr=0.0)
    place.amplifier(model, **ALWAYS).attach(optimizer)

    def broken() -> float:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(broken)
    raw = backward(model)
    optimizer.step()
    assert only(model, raw) == 2.0


def test_a_step_wrapped_by_a_scheduler(place: Place) -> None:
    """Schedulers replace ``optimizer.step`` by a counting wrapper."""
    model = network(place.device)
    optimizer = calling_super(torch.optim.SGD)(model.parameters(), lr=0.1)
    place.amplifier(model, **ALWAYS).attach(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(3):
        optimizer.zero_grad()
        raw = backward(model)
        optimizer.step()
        scheduler.step()
        assert only(model, raw) == 2.0


def test_a_step_hooked_twice_by_hand(place: Place) -> None:
    class Doubly(torch.optim.SGD):
        step = Optimizer.profile_hook_step(Optimizer.profile_hook_step(torch.optim.SGD.step))

    model = network(place.device)
    optimizer = Doubly(model.parameters(), lr=0.0)
    amplifier = place.amplifier(model, **ALWAYS)
    amplifier.attach(optimizer)
    raw = backward(model)
    optimizer.step()
    assert only(model, raw) == 2.0
    assert amplifier.report().steps == 1


def test_a_step_that_steps_another_optimizer(place: Place) -> None:
    """Each of the two is a step of its own."""
    model = network(place.device)
    inner = sgd(model[0].parameters())

    class Outer(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            inner.step()
            return super().step(closure)

    outer = Outer([*model[2].parameters(), *model[4].parameters()], lr=0.0)
    amplifier = place.amplifier(model, **ALWAYS)
    amplifier.attach(inner)
    amplifier.attach(outer)
    raw = backward(model)
    outer.step()
    assert only(model, raw) == 2.0
    assert amplifier.report().steps == 1
