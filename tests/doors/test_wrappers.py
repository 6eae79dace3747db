"""Wrappers are known by their class; a model's own child is never taken for one."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import Place
from factors import ALWAYS, backward, factors, network, only, sgd, steps
from torch import Tensor, nn

import gradamp_fast
from gradamp_fast import Amplifier


class Named(nn.Module):
    """A model whose only child has the name that a wrapper gives to what it wraps."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.child = name
        self.add_module(name, nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.child)(x)


NAMES = ["module", "_orig_mod", "_forward_module", "_module"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_the_models_own(name: str) -> None:
    """In reports, in globs, in checkpoints."""
    model = Named(name)
    amplifier = Amplifier(model, **ALWAYS, include=[f"{name}.*"])
    assert list(steps(amplifier)) == [name]
    assert list(amplifier.state_dict()["layers"]) == [name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("door", ["attach", "fused_amplify"])
def test_its_child_is_replaced(place: Place, door: str, name: str) -> None:
    model = Named(name).to(place.device)
    if door == "attach":
        amplifier = place.amplifier(model, **ALWAYS)
    for size in (3, 3, 5):
        setattr(model, name, nn.Linear(4, size).to(place.device))
        optimizer = sgd(model.parameters())
        handle = amplifier.attach(optimizer) if door == "attach" else None
        raw = backward(model)
        if handle is None:
            gradamp_fast.fused_amplify(model, backend=place.backend, **ALWAYS)
        optimizer.step()
        assert only(model, raw) == 2.0
        if handle is not None:
            handle.remove()


def test_a_model_within_a_model() -> None:
    """An Amplifier of the outer one is not that of the inner one."""
    model = Named("module")
    backward(model)
    outer = gradamp_fast.fused_amplify(model, **ALWAYS)
    gradamp_fast.reset(model.module)
    assert gradamp_fast.fused_amplify(model) is outer


# ---- wrappers that are installed ---------------------------------------------------------


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def twice(model: nn.Module) -> nn.Module:
    return nn.DataParallel(compiled(model))


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, twice])
def test_a_wrapper_is_the_model(place: Place, wrap: Any) -> None:
    model = network(place.device)
    wrapper = wrap(model)
    amplifier = gradamp_fast.fused_amplify
    backward(model)
    first = amplifier(wrapper, backend=place.backend, **ALWAYS)
    assert amplifier(model) is first
    assert set(steps(first)) == {"0", "2", "4"}
    raw = backward(model, leave_out=[])
    model.zero_grad()
    raw = backward(model)
    amplifier(wrapper)
    assert only(model, raw) == 2.0


def test_a_wrapper_is_a_part_of_the_model(place: Place) -> None:
    """Names come without what it inserts, and its own child may still be called module."""
    model = nn.Sequential(compiled(Named("module")), nn.DataParallel(nn.Linear(3, 3)))
    model = model.to(place.device)
    amplifier = place.amplifier(model, **ALWAYS, include=["0.module.*", "1.*"])
    raw = backward(model)
    amplifier.step()
    assert list(steps(amplifier)) == ["0.module", "1"]
    assert set(factors(model, raw).values()) == {2.0}


def test_states_saved_under_fabric() -> None:
    fabric_of = pytest.importorskip("lightning.fabric")
    fabric = fabric_of.Fabric(accelerator="cpu", devices=1)
    model = network()
    wrapper, optimizer = fabric.setup(model, sgd(model.parameters()))
    amplifier = Amplifier(wrapper, **ALWAYS)
    amplifier.attach(optimizer)
    raw = backward(model)
    optimizer.step()
    assert only(model, raw) == 2.0
    plain = Amplifier(network(), **ALWAYS)
    plain.load_state_dict(amplifier.state_dict())
    assert steps(plain) == {"0": 1, "2": 1, "4": 1}
    assert gradamp_fast.fused_amplify is not None


def test_fabric_and_compile_together() -> None:
    fabric_of = pytest.importorskip("lightning.fabric")
    fabric = fabric_of.Fabric(accelerator="cpu", devices=1)
    model = network()
    wrapper = fabric.setup_module(compiled(model))
    backward(model)
    kept = gradamp_fast.fused_amplify(wrapper, **ALWAYS)
    assert gradamp_fast.fused_amplify(model) is kept
    assert set(steps(kept)) == {"0", "2", "4"}


@pytest.fixture
def opacus(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """Opacus' wrapper as far as it matters here: its name, its module and its one child."""
    package = ModuleType("opacus")
    part = ModuleType("opacus.grad_sample")
    inner = ModuleType("opacus.grad_sample.grad_sample_module")

    class GradSampleModule(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self._module(*args, **kwargs)

    GradSampleModule.__module__ = inner.__name__
    inner.GradSampleModule = GradSampleModule  # type: ignore[attr-defined]
    part.GradSampleModule = GradSampleModule  # type: ignore[attr-defined]
    for module in (package, part, inner):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return GradSampleModule


def test_states_saved_under_opacus(opacus: type[nn.Module]) -> None:
    wrapped = opacus(network())
    amplifier = Amplifier(wrapped, **ALWAYS)
    raw = backward(wrapped)
    amplifier.step()
    assert only(wrapped, raw) == 2.0
    plain = Amplifier(network(), **ALWAYS)
    plain.load_state_dict(amplifier.state_dict())
    assert steps(plain) == {"0": 1, "2": 1, "4": 1}


def test_a_state_of_before_loads_with_the_wrappers_names() -> None:
    """Versions that took the wrapper for a part of the model stored its child's name."""
    model = network()
    amplifier = Amplifier(model, **ALWAYS)
    backward(model)
    amplifier.step()
    stored = amplifier.state_dict()
    for prefix in ("_forward_module.", "_module.", "module.", "_orig_mod."):
        old = {
            **stored,
            "layers": {f"{prefix}{n}": k for n, k in stored["layers"].items()},
            "sketches": {f"{prefix}{n}": s for n, s in stored["sketches"].items()},
        }
        plain = Amplifier(network(), **ALWAYS)
        plain.load_state_dict(old)
        assert steps(plain) == {"0": 1, "2": 1, "4": 1}


def test_a_state_of_another_model_is_still_refused() -> None:
    stored = Amplifier(network(), **ALWAYS).state_dict()
    stored["layers"] = {f"other.{n}": k for n, k in stored["layers"].items()}
    with pytest.raises(ValueError, match=r"other\.0"):
        Amplifier(network(), **ALWAYS).load_state_dict(stored)


def test_attach_looks_into_fabrics_optimizer() -> None:
    fabric_of = pytest.importorskip("lightning.fabric")
    fabric = fabric_of.Fabric(accelerator="cpu", devices=1)
    model = network()
    wrapper, optimizer = fabric.setup(model, sgd(model.parameters()))
    amplifier = Amplifier(model, **ALWAYS)
    amplifier.attach(optimizer)
    for step in range(1, 3):
        optimizer.zero_grad()
        raw = backward(wrapper.module)
        optimizer.step()
        assert only(model, raw) == 2.0
        assert amplifier.report().steps == step
