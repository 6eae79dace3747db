"""Four ways to train under a GradScaler, which come to the same weights and the same state."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Place, same_bits
from torch import Tensor, nn

import gradamp_fast
from gradamp_fast import Amplifier

QUICK = {"min_steps": 2, "refresh": 2, "threshold": "mean", "decay": 0.9}
SCALE = {"init_scale": 1024.0, "growth_interval": 3}
OVERFLOWS = {2: 0, 5: 3, 6: 1}  # step: parameter whose gradient overflows


def network(place: Place) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)]
    return nn.Sequential(*layers).to(place.device)


def batches(place: Place, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 12, generator=generator)
        yield x.to(place.device), x[:, :4].sin().to(place.device)


def train(
    place: Place, door: str, fused: bool, overflows: dict[int, int], **options: Any
) -> dict[str, Any]:
    """Ten steps through one of the doors; ``overflows`` as in OVERFLOWS."""
    model = network(place)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
    amplifier = place.amplifier(model, **{**QUICK, **options})
    if "ours" in door:
        scaler = gradamp_fast.GradScaler(amplifier, place.device, **SCALE)
    else:
        scaler = torch.amp.GradScaler(place.device, **SCALE)
    if door == "attach":
        amplifier.attach(optimizer)
    scales, selected = [], []
    for step, (x, y) in enumerate(batches(place, 10)):
        optimizer.zero_grad()
        scaler.scale((model(x) - y).square().mean()).backward()
        if step in overflows:
            list(model.parameters())[overflows[step]].grad.view(-1)[-1] = torch.inf
        if door in ("by hand", "ours, unscale_"):
            scaler.unscale_(optimizer)
        if door == "by hand":
            amplifier.step()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        selected.append([layer.selected for layer in amplifier.report().layers])
    report = amplifier.report()
    assert any(any(row) for row in selected)
    return {
        "weights": [p.detach().clone() for p in model.parameters()],
        "layers": [(r.name, r.steps, r.variance, r.score) for r in report.layers],
        "counted": report.steps - report.skipped_steps,
        "scales": scales,
        "selected": selected,
        "scaler": scaler.state_dict(),
    }


DOORS = ["attach", "ours", "ours, unscale_"]


@pytest.mark.parametrize("overflows", [{}, OVERFLOWS], ids=["finite", "overflows"])
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_all_doors_agree(place: Place, fused: bool, door: str, overflows: dict[int, int]) -> None:
    """With powers of two as scale and factor they agree bit for bit."""
    expected = train(place, "by hand", fused, overflows)
    found = train(place, door, fused, overflows)
    assert expected["counted"] == 10 - len(overflows)
    for what in ("layers", "counted", "scales", "selected", "scaler"):
        assert found[what] == expected[what], what
    for mine, theirs in zip(found["weights"], expected["weights"], strict=True):
        assert same_bits(mine, theirs)


@pytest.mark.parametrize("options", [{"max_norm": 0.1}, {"match_norm": True}], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_norms_are_those_of_unscaled_gradients(
    place: Place, fused: bool, options: dict[str, Any]
) -> None:
    expected = train(place, "by hand", False, OVERFLOWS, **options)
    found = train(place, "ours", fused, OVERFLOWS, **options)
    assert found["scales"] == expected["scales"]
    assert found["selected"] == expected["selected"]
    for mine, theirs in zip(found["weights"], expected["weights"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


# ---- one step -------------------------------------------------------------------------

ALL = {"measure": "variance", "min_steps": 1, "refresh": 1, "threshold": 1e9}
CPU = Place("torch", "cpu")


class Setting:
    """A model all of whose layers are amplified by 2, and its scaler at 8."""

    def __init__(self, place: Place = CPU, **options: Any) -> None:
        self.model = network(place)
        self.amplifier = place.amplifier(self.model, **{**ALL, **options})
        self.scaler = gradamp_fast.GradScaler(self.amplifier, place.device, init_scale=8.0)
        self.scaler.scale(torch.zeros((), device=place.device))
        for p in self.model.parameters():
            p.grad = torch.arange(1.0 * p.numel(), device=place.device).view_as(p)
        self.amplifier.step()  # decides

    def gradients(self, *models: nn.Module) -> None:
        for model in models or (self.model,):
            for p in model.parameters():
                p.grad = torch.full_like(p, 8.0)

    def sgd(self, parameters: Any, **options: Any) -> torch.optim.SGD:
        return torch.optim.SGD(parameters, lr=0.0, **options)


def values(*modules: nn.Module) -> set[float]:
    return {v for m in modules for p in m.parameters() for v in p.grad.flatten().tolist()}


def test_unscale_and_step_amplify_once(place: Place) -> None:
    setting = Setting(place)
    optimizer = setting.sgd(setting.model.parameters())
    setting.gradients()
    setting.scaler.unscale_(optimizer)
    assert values(setting.model) == {2.0}
    setting.scaler.step(optimizer)
    assert values(setting.model) == {2.0}
    assert setting.amplifier.report().steps == 2
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
        setting.scaler.unscale_(optimizer)
    setting.scaler.update()
    setting.gradients()
    setting.scaler.step(optimizer)
    assert values(setting.model) == {2.0}


def test_a_fused_optimizer_divides_by_itself() -> None:
    """Gradients stay scaled and are written only where they are amplified."""
    setting = Setting(Place("torch", "cpu"), exclude=["0.*"])
    before = [p.detach().clone() for p in setting.model.parameters()]
    optimizer = torch.optim.SGD(setting.model.parameters(), lr=1.0, fused=True)
    setting.gradients()
    setting.scaler.step(optimizer)
    for index, (p, old) in enumerate(zip(setting.model.parameters(), before, strict=True)):
        torch.testing.assert_close(old - p, torch.full_like(p, 1.0 if index < 2 else 2.0))


def test_parameters_of_another_model_are_unscaled_and_checked(place: Place) -> None:
    setting, other = Setting(place), nn.Linear(3, 3).to(place.device)
    optimizer = setting.sgd([*setting.model.parameters(), *other.parameters()])
    setting.gradients(setting.model, other)
    setting.scaler.unscale_(optimizer)
    assert (values(setting.model), values(other)) == ({2.0}, {1.0})
    setting.scaler.step(optimizer)
    setting.scaler.update()
    setting.gradients(setting.model, other)
    other.bias.grad[1] = torch.nan
    setting.scaler.step(optimizer)
    setting.scaler.update()
    assert setting.scaler.get_scale() == 4.0
    report = setting.amplifier.report()
    assert (report.steps, report.skipped_steps) == (3, 1)


def test_an_optimizer_of_another_model_alone(place: Place) -> None:
    setting, other = Setting(place), nn.Linear(3, 3).to(place.device)
    optimizer = setting.sgd(other.parameters())
    setting.gradients(other)
    setting.scaler.step(optimizer)
    assert values(other) == {1.0}
    assert setting.amplifier.report().steps == 1


def test_each_optimizer_its_part(place: Place) -> None:
    """An overflow in one part skips that part alone, and the scale backs off."""
    setting = Setting(place)
    first, second = (setting.sgd(setting.model[i].parameters()) for i in (0, 2))
    setting.gradients()
    setting.scaler.step(first)
    assert values(setting.model[0]) == {2.0}
    assert values(setting.model[2], setting.model[4]) == {8.0}
    setting.model[2].bias.grad[0] = torch.inf
    setting.scaler.step(second)
    setting.scaler.update()
    assert setting.scaler.get_scale() == 4.0
    assert [layer.steps for layer in setting.amplifier.report().layers] == [2, 1, 1]


@pytest.mark.parametrize("fused", [False, True])
def test_an_excluded_gradient_that_overflows_skips_the_step(place: Place, fused: bool) -> None:
    """The amplifier alone would not look at it."""
    setting = Setting(place, exclude=["4.*"])
    optimizer = torch.optim.SGD(setting.model.parameters(), lr=1.0, fused=fused)
    before = [p.detach().clone() for p in setting.model.parameters()]
    setting.gradients()
    setting.model[4].weight.grad[0, 0] = torch.inf
    setting.scaler.step(optimizer)
    setting.scaler.update()
    assert setting.scaler.get_scale() == 4.0
    assert all(same_bits(p, old) for p, old in zip(setting.model.parameters(), before, strict=True))
    report = setting.amplifier.report()
    assert (report.steps, report.skipped_steps) == (2, 1)
    setting.gradients()
    setting.scaler.unscale_(optimizer)
    assert values(setting.model[4]) == {2.0}  # 8 / 4, excluded


def test_frozen_and_missing_gradients(place: Place) -> None:
    """A frozen parameter that still has a gradient is the optimizer's all the same."""
    setting = Setting(place)
    optimizer = setting.sgd(setting.model.parameters())
    setting.gradients()
    setting.model[0].requires_grad_(False)
    setting.model[2].bias.grad = None
    setting.scaler.unscale_(optimizer)
    assert values(setting.model[0]) == {1.0}
    assert set(setting.model[2].weight.grad.flatten().tolist()) == {2.0}
    assert values(setting.model[4]) == {2.0}


def test_without_any_gradient_it_says_what_torch_says() -> None:
    setting = Setting()
    optimizer = setting.sgd(setting.model.parameters())
    optimizer.zero_grad()
    with pytest.raises(AssertionError, match="No inf checks"):
        setting.scaler.step(optimizer)


def test_a_parameter_that_arrives_is_unscaled_once(place: Place) -> None:
    """Bound in the middle of a step, it is amplified from the next step on."""
    setting = Setting(place)
    optimizer = setting.sgd(setting.model.parameters())
    setting.gradients()
    setting.scaler.step(optimizer)
    setting.scaler.update()
    optimizer.zero_grad()
    late = nn.Linear(4, 4).to(place.device)
    setting.model.append(late)
    del setting.model[2]
    optimizer.add_param_group({"params": late.parameters()})
    setting.gradients()
    with pytest.warns(UserWarning, match="no longer in the model"):
        setting.scaler.unscale_(optimizer)
    assert values(late) == {1.0}
    assert values(setting.model[0]) == {2.0}


def test_unfrozen_in_training_is_unscaled_once(place: Place) -> None:
    model = network(place)
    amplifier = place.amplifier(model, **{**ALL, "measure": "direction"})
    scaler = gradamp_fast.GradScaler(amplifier, place.device, init_scale=8.0)
    scaler.scale(torch.zeros((), device=place.device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step, last in enumerate([None, 1.0, 1.0, 1.0, 2.0]):  # bound late, decided after two
        model[4].requires_grad_(step > 0)
        for p in model.parameters():
            p.grad = torch.full_like(p, 8.0) if p.requires_grad else None
        scaler.unscale_(optimizer)
        assert values(model[0]) == {1.0 if step < 2 else 2.0}
        if step > 0:
            assert values(model[4]) == {last}
        scaler.step(optimizer)
        scaler.update()


def test_groups_that_are_not_to_be_amplified(place: Place) -> None:
    setting = Setting(place)
    first, last = setting.model[0], setting.model[4]
    groups = [{"params": first.parameters()}, {"params": last.parameters(), "amplify": False}]
    optimizer = setting.sgd(groups)
    setting.gradients()
    setting.scaler.unscale_(optimizer)
    assert (values(first), values(last)) == ({2.0}, {1.0})


# ---- switched off ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["step", "unscale_", "closure", "closure="])
def test_switched_off_it_amplifies_all_the_same(place: Place, how: str) -> None:
    setting = Setting(place)
    scaler = gradamp_fast.GradScaler(setting.amplifier, place.device, enabled=False)
    optimizer = setting.sgd(setting.model.parameters())
    for step in range(2):
        setting.gradients()
        if how == "unscale_":
            scaler.unscale_(optimizer)
            assert values(setting.model) == {16.0}
            with pytest.raises(RuntimeError, match="already"):
                scaler.unscale_(optimizer)
        if how == "closure":
            scaler.step(optimizer, lambda: torch.ones(()))
        elif how == "closure=":
            scaler.step(optimizer, closure=lambda: torch.ones(()))
        else:
            scaler.step(optimizer)
        scaler.update()
        assert values(setting.model) == {16.0}
        assert setting.amplifier.report().steps == 2 + step


# ---- what is refused, what is said -----------------------------------------------------


def test_not_together_with_attach() -> None:
    setting = Setting()
    optimizer = setting.sgd(setting.model.parameters())
    handle = setting.amplifier.attach(optimizer)
    setting.gradients()
    for call in (setting.scaler.unscale_, setting.scaler.step):
        with pytest.raises(ValueError, match="attached to this optimizer"):
            call(optimizer)
    handle.remove()
    setting.scaler.step(optimizer)
    assert values(setting.model) == {2.0}


def test_fp16_parameters_are_refused_as_torch_does() -> None:
    model = network(CPU).half()
    scaler = gradamp_fast.GradScaler(Amplifier(model), "cpu")
    scaler.scale(torch.zeros(()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="unscale FP16"):
        scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.1))


def test_the_amplifier_comes_first() -> None:
    with pytest.raises(TypeError, match="amplifier must be"):
        gradamp_fast.GradScaler("cpu")  # type: ignore[arg-type]


def test_scale_invariant_optimizers_warn_once() -> None:
    setting = Setting()
    optimizer = torch.optim.Adam(setting.model.parameters())
    setting.gradients()
    with pytest.warns(UserWarning, match="Adam") as caught:
        setting.scaler.step(optimizer)
    assert len(caught) == 1
    setting.scaler.update()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setting.scaler.step(optimizer)


def test_its_state_dict_is_torchs() -> None:
    setting = Setting()
    plain = torch.amp.GradScaler("cpu", init_scale=8.0)
    plain.scale(torch.zeros(()))
    assert setting.scaler.state_dict() == plain.state_dict()
    setting.scaler.load_state_dict({**plain.state_dict(), "scale": 2.0})
    assert setting.scaler.get_scale() == 2.0
