"""gradamp_fast.GradScaler: every gradient unscaled exactly once, whatever the optimizer holds."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import Place, bare, same_bits
from factors import ALWAYS, backward, network, only, sgd
from test_stepped_is_bound import ENTRIES, Entry
from torch import nn

import gradamp_fast
from gradamp_fast import Amplifier, GradScaler

SCALE = 65536.0


class Setting:
    def __init__(self, place: Place, **options: Any) -> None:
        self.model = network(place.device)
        self.optimizer = sgd(self.model.parameters(), fused=options.pop("fused", False))
        self.amplifier = place.amplifier(self.model, **ALWAYS)
        self.scaler = GradScaler(self.amplifier, place.device, init_scale=SCALE, **options)
        self.scaler.scale(torch.ones((), device=place.device))

    def gradients(self) -> dict[str, torch.Tensor]:
        self.optimizer.zero_grad()
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else 1.0
        return backward(self.model, scale)

    def step(self) -> float:
        """One iteration; the factor over what was not scaled."""
        raw = self.gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return only(self.model, raw)


@pytest.mark.parametrize("enter", ENTRIES)
@pytest.mark.parametrize("size", ["same", "other"])
def test_a_parameter_put_into_a_group(place: Place, enter: Entry, size: str) -> None:
    """Again and again: CPython gives addresses back."""
    setting = Setting(place)
    assert setting.step() == 2.0
    for _ in range(3):
        old = setting.model[2].weight
        new = old.detach() if size == "same" else torch.cat([old.detach(), old.detach()])
        setting.model[2].weight = nn.Parameter(new.clone())
        enter(setting.optimizer.param_groups[0], old, setting.model[2].weight)
        del old, new
        assert setting.step() == 2.0


def test_a_parameter_of_nobody_put_into_a_group(place: Place) -> None:
    """It is not the amplifier's: unscaled and checked as torch does it."""
    setting = Setting(place)
    setting.step()
    stranger = nn.Parameter(torch.zeros(4, device=place.device))
    setting.optimizer.param_groups[0]["params"][-1] = stranger
    for bad in (False, True):
        raw = setting.gradients()
        stranger.grad = torch.full((4,), 3 * SCALE, device=place.device)
        if bad:
            stranger.grad[0] = torch.inf
        setting.scaler.step(setting.optimizer)
        setting.scaler.update()
        if not bad:
            assert stranger.grad.tolist() == [3.0] * 4
            assert float(setting.model[0].bias.grad[0] / raw["0.bias"][0]) == 2.0
    assert setting.scaler.get_scale() == SCALE / 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_new_layer_and_its_group(place: Place, fused: bool) -> None:
    setting = Setting(place, fused=fused)  # a fused optimizer divides by itself, in place
    assert setting.step() == 2.0
    late = nn.Linear(5, 5).to(place.device)
    setting.model.append(late)
    setting.optimizer.add_param_group({"params": late.parameters()})
    for _ in range(2):
        assert setting.step() == 2.0


def test_training_goes_on_after_a_replacement(place: Place) -> None:
    """The loss falls as it does without a scaler."""
    losses = []
    for scaled in (False, True):
        setting = Setting(place, enabled=scaled)
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).to(place.device)
        setting.optimizer.param_groups[0]["lr"] = 0.05
        for step in range(6):
            if step == 3:
                old = setting.model[2].weight
                setting.model[2].weight = nn.Parameter(old.detach().clone())
                ENTRIES[0](setting.optimizer.param_groups[0], old, setting.model[2].weight)
            setting.optimizer.zero_grad()
            loss = (setting.model(x) - 1).square().mean()
            setting.scaler.scale(loss).backward()
            setting.scaler.step(setting.optimizer)
            setting.scaler.update()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0.0)


# ---- switched off ---------------------------------------------------------------------


@pytest.mark.parametrize("between", ["update", "nothing", "new iteration"])
def test_switched_off_an_update_may_be_left_out(place: Place, between: str) -> None:
    """An iteration that unscales and then does not step, as after a NaN in the loss."""
    setting = Setting(place, enabled=False)
    setting.gradients()
    setting.scaler.unscale_(setting.optimizer)
    if between == "nothing":
        with pytest.raises(RuntimeError, match="already"):
            setting.scaler.unscale_(setting.optimizer)
    setting.scaler.update()
    for _ in range(2):
        raw = setting.gradients()
        setting.scaler.unscale_(setting.optimizer)
        if between == "new iteration":
            setting.scaler.step(setting.optimizer)
        assert only(setting.model, raw) == 2.0
        setting.scaler.update()


# ---- copies -----------------------------------------------------------------------------


def test_a_deep_copy_scales_for_the_same_amplifier(place: Place) -> None:
    setting = Setting(place)
    setting.step()
    setting.scaler = copy.deepcopy(setting.scaler)
    assert setting.scaler.amplifier is setting.amplifier
    assert setting.scaler.get_scale() == SCALE
    setting.scaler.scale(torch.ones((), device=place.device))  # makes the scale, as in torch's
    assert setting.step() == 2.0


def test_a_pickled_one_asks_for_its_amplifier() -> None:
    """Its numbers are those of before; it never unscales without amplifying."""
    setting = Setting(Place("torch", "cpu"))
    setting.step()
    scaler = pickle.loads(pickle.dumps(setting.scaler))
    assert isinstance(scaler, GradScaler)
    assert scaler.state_dict() == setting.scaler.state_dict()
    scaler.scale(torch.ones(()))
    setting.gradients()
    with pytest.raises(RuntimeError, match=r"scaler\.amplifier"):
        scaler.unscale_(setting.optimizer)
    scaler.amplifier = setting.amplifier
    setting.scaler = scaler
    assert setting.step() == 2.0


@pytest.mark.parametrize("do", [copy.deepcopy, pickle.dumps])
def test_not_in_the_middle_of_an_iteration(do: Any) -> None:
    """As torch's."""
    setting = Setting(Place("torch", "cpu"))
    setting.gradients()
    setting.scaler.unscale_(setting.optimizer)
    with pytest.raises((AssertionError, RuntimeError), match="beginning of an iteration"):
        do(setting.scaler)


def test_an_amplifier_is_asked_for() -> None:
    setting = Setting(Place("torch", "cpu"))
    with pytest.raises(TypeError, match="amplifier must be"):
        setting.scaler.amplifier = None  # type: ignore[assignment]


# ---- precision --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [3.0, 1000.0, 7e4])
def test_unscaled_as_torch_does_it(place: Place, dtype: torch.dtype, scale: float) -> None:
    """By the inverse in fp32, whatever the gradients' precision."""
    model = bare({"a.w": (257,), "b.w": (9,)}, dtype, place.device)
    ours = GradScaler(
        Amplifier(model, backend=place.backend, min_steps=100), place.device, init_scale=scale
    )
    theirs = torch.amp.GradScaler(place.device, init_scale=scale)
    written = []
    for scaler in (theirs, ours):
        scaler.scale(torch.ones((), device=place.device))
        for p in model.parameters():
            p.grad = torch.linspace(-3, 5, p.numel(), dtype=torch.float64).to(p)
        scaler.unscale_(sgd(model.parameters()))
        written.append([p.grad.clone() for p in model.parameters()])
    assert all(same_bits(a, b) for a, b in zip(*written, strict=True))


def test_sparse_gradients_beside_it(place: Place) -> None:
    """Those that the amplifier leaves out are unscaled by torch."""
    model = nn.ModuleDict({"e": nn.Embedding(6, 3, sparse=True), "l": nn.Linear(3, 2)})
    model = model.to(place.device)
    amplifier = place.amplifier(model, **ALWAYS, exclude=["e.*"])
    scaler = gradamp_fast.GradScaler(amplifier, place.device, init_scale=8.0)
    optimizer = sgd(model.parameters())
    loss = model["l"](model["e"](torch.tensor([1, 4, 1], device=place.device))).sum()
    raw = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(model["e"].weight.grad.to_dense(), raw[0].to_dense())
    torch.testing.assert_close(model["l"].weight.grad, 2 * raw[1])
    scaler.step(optimizer)
