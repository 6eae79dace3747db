"""Optimizers that step another one, or none; steps that are not training; groups that load."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from cases import Place
from factors import ALWAYS, backward, factors, network, only, sgd, steps
from torch import nn
from torch.optim import Optimizer

from gradamp_fast import Amplifier

# ---- an inner optimizer, or no step at all -----------------------------------------------


class SAM(Optimizer):
    """Sharpness-aware minimisation as it is commonly written: two half steps of its own."""

    def __init__(self, params: Any, base_optimizer: type[Optimizer], **options: Any) -> None:
        super().__init__(params, {"rho": 0.05, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.detach().clone()
                p.add_(p.grad, alpha=group["rho"])
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            self.first_step(zero_grad=True)
            closure()
            self.second_step()


@pytest.mark.parametrize("how", ["halves", "step", "halves without zero_grad"])
def test_sam(place: Place, how: str) -> None:
    """The gradient at the disturbed point is amplified, once, before the base optimizer."""
    model = network(place.device)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.0)
    amplifier = place.amplifier(model, **ALWAYS)
    amplifier.attach(optimizer)
    for step in range(1, 4):
        optimizer.zero_grad()
        first = backward(model, seed=1)
        if how == "step":
            optimizer.step(lambda: backward(model, seed=2))
        else:
            optimizer.first_step(zero_grad="without" not in how)
            assert "without" not in how or only(model, first) == 1.0
            optimizer.zero_grad()
            raw = backward(model, seed=2)
            optimizer.second_step()
        raw = backward_slopes(model)
        assert only(model, raw) == 2.0
        assert amplifier.report().steps == step


def backward_slopes(model: nn.Module) -> dict[str, torch.Tensor]:
    from factors import slopes

    return slopes(model, 2)


class Lomo(Optimizer):
    """Updates in the middle of backpropagation, and never through ``step``."""

    def __init__(self, model: nn.Module, lr: float = 0.1) -> None:
        super().__init__(list(model.parameters()), {"lr": lr})

    def fused_backward(self, loss: Any, lr: float) -> None: ...


class AdaLomo(Lomo):
    def step(self, closure: Any = None) -> None:
        raise NotImplementedError


class Stepless(Optimizer):
    """One whose class has no step of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Lomo, "Lomo.*fused_backward"),
        (AdaLomo, "AdaLomo.*fused_backward"),
        (lambda model: Stepless(model.parameters()), "Stepless"),
    ],
)
def test_where_nothing_would_call_a_hook_it_is_refused(
    make: Callable[[nn.Module], Optimizer], says: str
) -> None:
    model = network()
    with pytest.raises(TypeError, match=says):
        Amplifier(model).attach(make(model))


def test_the_trainers_callback_refuses_it_too() -> None:
    pytest.importorskip("transformers")
    from types import SimpleNamespace

    from gradamp_fast.integrations.huggingface import GradientAmplificationCallback

    model = network()
    callback = GradientAmplificationCallback()
    args = SimpleNamespace(max_grad_norm=0, save_strategy="no")
    state = SimpleNamespace(epoch=0.0, global_step=0, stateful_callbacks={})
    with pytest.raises(TypeError, match="fused_backward"):
        callback.on_train_begin(args, state, None, model=model, optimizer=Lomo(model))


class Around:
    """A wrapper that is no Optimizer; ``name`` holds the one inside."""

    def __init__(self, name: str, inner: Any) -> None:
        setattr(self, name, inner)


@pytest.mark.parametrize("name", ["optimizer", "base_optimizer", "_base_optimizer", "optim"])
def test_the_inner_optimizer_is_found(place: Place, name: str) -> None:
    model = network(place.device)
    inner = sgd(model.parameters())
    amplifier = place.amplifier(model, **ALWAYS)
    amplifier.attach(Around(name, Around("optimizer", inner)))  # type: ignore[arg-type]
    raw = backward(model)
    inner.step()
    assert only(model, raw) == 2.0


# ---- gradients that live elsewhere -------------------------------------------------------


@pytest.mark.parametrize("gradient", ["dummy", "none", "zeros"])
@pytest.mark.parametrize("door", ["step", "attach"])
def test_main_grad_is_refused_by_name(place: Place, door: str, gradient: str) -> None:
    """Megatron's and Transformer Engine's accumulated gradients, whose ``.grad`` means nothing."""
    model = network(place.device)
    optimizer = sgd(model.parameters(), lr=0.1)
    amplifier = place.amplifier(model, **ALWAYS)
    if door == "attach":
        amplifier.attach(optimizer)
    for p in model.parameters():
        p.main_grad = torch.ones(p.shape, device=place.device)
        p.grad = {"none": None, "dummy": torch.empty_like(p), "zeros": torch.zeros_like(p)}[
            gradient
        ]
    with pytest.raises(TypeError, match=r"'0\.weight'.*main_grad"):
        amplifier.step() if door == "step" else optimizer.step()


# ---- a library's own steps ----------------------------------------------------------------


def train(model: nn.Module, optimizer: Optimizer, every: int | None) -> list[dict[str, float]]:
    """Seven steps; saves as torch's checkpoints do, every so many."""
    seen = []
    for step in range(7):
        raw = backward(model, seed=step)
        optimizer.step()
        seen.append(factors(model, raw))
        optimizer.zero_grad()
        if every and step % every == every - 1:
            dcp.get_optimizer_state_dict(model, optimizer)
    return seen


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.filterwarnings("ignore:.*divides out the scale")
def test_saving_does_not_change_the_training(
    place: Place, kind: type[Optimizer], rate: Any
) -> None:
    """The checkpoint's functions make state by a step with zeroed gradients at rate 0."""
    runs = []
    for every in (None, 3, 1):
        model = network(place.device)
        optimizer = kind(model.parameters(), lr=rate)
        options = {"measure": "direction", "threshold": 0.5, "min_steps": 2, "refresh": 2}
        amplifier = place.amplifier(model, **options)
        amplifier.attach(optimizer)
        if every:
            dcp.get_optimizer_state_dict(model, optimizer)
        assert amplifier.report().steps == 0
        runs.append((train(model, optimizer, every), repr(amplifier.report())))
    assert runs[0] == runs[1] == runs[2]


def test_loading_does_not_count_either(place: Place) -> None:
    model = network(place.device)
    optimizer = sgd(model.parameters(), momentum=0.9)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    stored = dcp.get_optimizer_state_dict(model, optimizer)
    other = network(place.device)
    fresh = sgd(other.parameters(), momentum=0.9)
    amplifier = place.amplifier(other, **ALWAYS)
    amplifier.attach(fresh)
    dcp.set_optimizer_state_dict(other, fresh, stored)
    assert amplifier.report().steps == 0
    raw = backward(other)
    fresh.step()
    assert only(other, raw) == 2.0
    assert amplifier.report().steps == 1


def test_a_warm_up_from_rate_0_does_count(place: Place) -> None:
    """A rate of 0 alone is training: its gradients are measured."""
    model = network(place.device)
    optimizer = sgd(model.parameters(), lr=0.0)
    amplifier = place.amplifier(model, **ALWAYS)
    amplifier.attach(optimizer)
    raw = backward(model)
    optimizer.step()
    assert only(model, raw) == 2.0
    assert steps(amplifier) == {"0": 1, "2": 1, "4": 1}


# ---- "amplify" in groups ------------------------------------------------------------------


@pytest.mark.parametrize("source", ["plain", "groups", "dcp"])
def test_a_checkpoint_without_the_key_keeps_the_wish(place: Place, source: str) -> None:
    """Groups that are not to be amplified stay so when the optimizer loads its state."""
    model = network(place.device)
    groups: list[dict[str, Any]] = [
        {"params": [*model[0].parameters()], "amplify": False},
        {"params": [*model[2].parameters(), *model[4].parameters()]},
    ]
    optimizer = sgd(groups)
    amplifier = place.amplifier(model, **ALWAYS)
    amplifier.attach(optimizer)
    plain = sgd([{"params": group["params"]} for group in groups], momentum=0.0)
    for _ in range(2):
        if source == "dcp":
            stored = dcp.get_optimizer_state_dict(model, plain)
            dcp.set_optimizer_state_dict(model, optimizer, stored)
        elif source == "groups":
            for group in optimizer.param_groups:
                group.pop("amplify", None)
        else:
            optimizer.load_state_dict(plain.state_dict())
        optimizer.zero_grad()
        raw = backward(model)
        optimizer.step()
        assert factors(model, raw) == {n: 1.0 if n.startswith("0.") else 2.0 for n in raw}


def test_the_key_said_again_counts(place: Place) -> None:
    model = network(place.device)
    optimizer = sgd([{"params": model.parameters(), "amplify": True}])
    amplifier = place.amplifier(model, **ALWAYS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        amplifier.attach(optimizer)
        for wish, expected in ((True, 2.0), (None, 2.0), (True, 2.0)):
            if wish is None:
                del optimizer.param_groups[0]["amplify"]
            else:
                optimizer.param_groups[0]["amplify"] = wish
            optimizer.zero_grad()
            raw = backward(model)
            optimizer.step()
            assert only(model, raw) == expected
