"""The fused optimizers with an amplifier: what acts on what, for which parameters, and when."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import SHAPES, Place, put, same_bits, same_state
from factors import ALWAYS, LAGGED, backward, network
from pairs import Pair, drawn, near, same
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from gradamp_fast import Amplifier, Schedule, optim

pytestmark = pytest.mark.usefixtures("alone_too")
MOMENTUM: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}
QUICK: dict[str, Any] = {"measure": "direction", "min_steps": 2, "refresh": 2, "decay": 0.9}


# ---- what acts on what --------------------------------------------------------------

WAYS: list[dict[str, Any]] = [
    {},
    {"timing": "exact", "measure": "variance", "select": "above"},
    {"max_norm": 3.0},
    {"match_norm": True, "timing": "exact", "exclude": ["head.*"]},
    {"schedule": Schedule([(2, 4), (5, 7, 3.0)], unit="step"), "group_by": "tensor"},
    {"grow": True, "refresh": 1, "factor": 1.5},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_sgd_is_sgd_on_multiplied_gradients(
    place: Place, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Bit for bit, in parameters, momentum and what is measured; ``.grad`` stays."""
    pair = Pair(place, dtype)
    inside = place.amplifier(pair.a, **{**QUICK, **options})
    before = place.amplifier(pair.b, **{**QUICK, **options})
    ours, other = (optim.SGD(m.parameters(), **MOMENTUM) for m in (pair.a, pair.b))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inside.attach(ours)
    acted = 0
    for _ in range(9):
        gradients = pair.give()
        ours.step()
        before.step()
        other.step()
        acted += not all(same_bits(p.grad, gradients[n]) for n, p in pair.b.named_parameters())
        assert pair.untouched(gradients)
        assert same(pair.a, pair.b)
        for p, q in zip(pair.a.parameters(), pair.b.parameters(), strict=True):
            assert same_bits(ours.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])
    assert acted > 2
    assert same_state(inside.state_dict(), before.state_dict())
    assert {layer.acts_on for layer in inside.report().layers} == {"gradient"}


@pytest.mark.parametrize("options", [{"min_steps": 20, "refresh": 10}, {"grow": True}], ids=str)
def test_a_training_is_that_of_attach_and_torchs(place: Place, options: dict[str, Any]) -> None:
    """300 steps of SGD with momentum and decay: losses side by side, within rounding."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 10, generator=generator, dtype=torch.float64).to(place.device)
    targets = (inputs[:, :1] * inputs[:, 1:2]).tanh()
    losses: dict[str, list[float]] = {}
    for kind in (optim.SGD, torch.optim.SGD):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 1)).double()
        model.to(place.device)
        amplifier = place.amplifier(model, **options)
        optimizer = kind(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-3)
        amplifier.attach(optimizer)
        batches = torch.Generator().manual_seed(2)
        of = losses[kind.__module__] = []
        for _ in range(300):
            chosen = torch.randint(256, (32,), generator=batches).to(place.device)
            loss = nn.functional.mse_loss(model(inputs[chosen]), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            of.append(loss.item())
        layers = amplifier.report().layers
        assert any(layer.selected or layer.factor > 1.5 for layer in layers)
    ours, torchs = losses.values()
    assert ours == pytest.approx(torchs, rel=1e-9)
    assert sum(ours[-50:]) < 0.9 * sum(ours[:50])


@pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW])
@pytest.mark.parametrize(
    "options", [{}, {"match_norm": True}, {"max_norm": 0.5}, {"max_norm": 0.5, **LAGGED}], ids=str
)
def test_a_factor_is_a_learning_rate_under_adam(
    place: Place, kind: Any, options: dict[str, Any]
) -> None:
    """And the decay is torch's: not multiplied where decoupled. A norm is the gradients' own."""
    pair = Pair(place)
    amplifier = place.amplifier(pair.a, **{**ALWAYS, **options, "factor": 4.0})
    decay = 0.5 if kind is optim.AdamW else 0.125
    ours = kind(pair.a.parameters(), 0.01, weight_decay=0.5)
    others = getattr(torch.optim, kind.__name__)(
        pair.b.parameters(), 0.04, weight_decay=decay if kind is optim.Adam else decay / 4
    )
    if kind is optim.Adam:
        ours.param_groups[0]["weight_decay"] = 0.125
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        amplifier.attach(ours)
    for step in range(4):
        if options.get("timing") == "lagged":
            others.param_groups[0].update(
                lr=0.04 if step else 0.01, weight_decay=(decay / 4 if step else decay)
            )
            if kind is optim.Adam:
                others.param_groups[0]["weight_decay"] = decay
        gradients = pair.give()
        ours.step()
        assert pair.untouched(gradients)
        if "max_norm" in options:
            norm = nn.utils.clip_grad_norm_(pair.b.parameters(), options["max_norm"])
            torch.testing.assert_close(amplifier.total_norm.to(norm), norm)
        others.step()
        near(pair.a, pair.b)
    assert {layer.acts_on for layer in amplifier.report().layers} == {"update"}
    assert "acts on: update" in amplifier.summary()


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_what_is_left_alone_moves_all_the_same(place: Place, kind: Any) -> None:
    """Excluded, in a group that is not to be amplified, of another model, or no model at all."""
    pair, more = Pair(place), [drawn(place) for _ in range(2)]
    amplifier = place.amplifier(pair.a, **ALWAYS, exclude=["head.*", "scale"])
    left = {"body.0.weight", "wide.weight"}

    def groups(model: nn.Module, other: nn.Module) -> list[dict[str, Any]]:
        named = dict(model.named_parameters())
        return [
            {"params": [p for n, p in named.items() if n not in left]},
            {"params": [named[n] for n in sorted(left)], "amplify": False},
            {"params": other.parameters()},
        ]

    ours = kind(groups(pair.a, more[0]), 0.01, weight_decay=0.0)
    others = kind(groups(pair.b, more[1]), 0.01, weight_decay=0.0)
    amplified = {n for n in SHAPES if n not in left and not n.startswith("head.") and n != "scale"}
    others.param_groups[0]["params"] = [
        p for n, p in pair.b.named_parameters() if n not in amplified and n not in left
    ]
    others.add_param_group(
        {"params": [p for n, p in pair.b.named_parameters() if n in amplified], "lr": 0.02}
    )
    amplifier.attach(ours)
    for _ in range(3):
        pair.give()
        for model in more:
            put(model, {n: p.detach().clone() for n, p in model.named_parameters()})
        ours.step()
        others.step()
        near(pair.a, pair.b)
        near(*more)
    assert amplifier.report().steps == 3


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_windows(place: Place, kind: Any) -> None:
    pair = Pair(place)
    schedule = Schedule([(1, 2), (3, 4, 8.0)], unit="epoch")
    amplifier = place.amplifier(pair.a, **ALWAYS, schedule=schedule)
    ours, others = (kind(m.parameters(), 0.01, weight_decay=0.0) for m in (pair.a, pair.b))
    amplifier.attach(ours)
    with pytest.raises(RuntimeError, match="set_epoch"):
        ours.step()
    for epoch in range(5):
        amplifier.set_epoch(epoch)
        others.param_groups[0]["lr"] = 0.01 * {1: 2.0, 3: 8.0}.get(epoch, 1.0)
        pair.give()
        ours.step()
        others.step()
        near(pair.a, pair.b)


# ---- several ----------------------------------------------------------------------------


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    named = dict(model.named_parameters())
    body = [p for n, p in named.items() if n.startswith("body")]
    return [p for n, p in named.items() if not n.startswith("body")], body


@pytest.mark.parametrize(
    "second", [optim.AdamW, torch.optim.SGD], ids=["two fused", "one fused, one of torch's"]
)
@pytest.mark.parametrize("timing", ["lagged", "exact"])
def test_two_optimizers_are_one_round(place: Place, second: Any, timing: str) -> None:
    """Steps, windows and decisions are those of one optimizer over all of it."""
    options = {**QUICK, "timing": timing, "schedule": Schedule([(0, 3), (5, 9)], unit="step")}
    pair = Pair(place)
    two, one = place.amplifier(pair.a, **options), place.amplifier(pair.b, **options)
    parts = split(pair.a)
    optimizers = [optim.AdamW(parts[0], 0.0), second(parts[1], 0.0)]
    for optimizer in optimizers:
        two.attach(optimizer)
    for _ in range(10):
        pair.give()
        for optimizer in optimizers:
            optimizer.step()
        one.step()
        reports = two.report(), one.report()
        assert reports[0].steps == reports[1].steps
        for p, q in zip(*(report.layers for report in reports), strict=True):
            assert (p.name, p.steps, p.selected) == (q.name, q.steps, q.selected)
            assert p.direction == pytest.approx(q.direction, nan_ok=True)
    acts = {layer.name: layer.acts_on for layer in reports[0].layers}
    assert acts.pop("head") == "update"
    assert acts["body.0"] == ("update" if second is optim.AdamW else "gradient")


def test_one_optimizer_over_two_models(place: Place) -> None:
    first, second, lone = (network(place.device) for _ in range(3))
    plain = copy.deepcopy(nn.ModuleList([first, second, lone]))
    amplifiers = [place.amplifier(first, **ALWAYS), place.amplifier(second, **LAGGED)]
    ours = optim.SGD([{"params": m.parameters()} for m in (first, second, lone)], 0.1)
    for amplifier in amplifiers:
        amplifier.attach(ours)
    for step in range(3):
        before = copy.deepcopy(nn.ModuleList([first, second, lone]))
        ours.zero_grad()
        raw = [backward(m, seed=step) for m in (first, second, lone)]
        ours.step()
        for m, b, gradients, factor in zip(
            (first, second, lone), before, raw, (2.0, 2.0 if step else 1.0, 1.0), strict=True
        ):
            for name, p in m.named_parameters():
                moved = b.get_parameter(name) - p
                torch.testing.assert_close(
                    moved, 0.1 * factor * gradients[name], rtol=1e-4, atol=1e-5
                )
    assert [amplifier.report().steps for amplifier in amplifiers] == [3, 3]
    assert not same(first, plain[0])


def test_attaching_twice_and_letting_go(place: Place) -> None:
    model = network(place.device)
    amplifier = place.amplifier(model, **ALWAYS)
    optimizer = optim.AdamW(model.parameters(), 0.1)
    handle = amplifier.attach(optimizer)
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        amplifier.attach(optimizer)
    with pytest.raises(ValueError, match="holds no parameter"):
        place.amplifier(network(), **ALWAYS).attach(optimizer)
    backward(model)
    optimizer.step()
    assert handle.active
    handle.remove()
    handle.remove()
    assert not handle.active
    assert not amplifier.attached
    assert not optimizer.amplifiers
    before = copy.deepcopy(model)
    optimizer.step()
    assert not same(before, model)
    assert amplifier.report().steps == 1
    assert {layer.acts_on for layer in amplifier.report().layers} == {"gradient"}
    copied = copy.deepcopy(optimizer)
    assert not copied.amplifiers
    amplifier.attach(optimizer)
    optimizer.step()
    assert amplifier.report().steps == 2


# ---- how it is called ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_closures_are_amplified_once(place: Place, kind: Any) -> None:
    pair = Pair(place)
    amplifier = place.amplifier(pair.a, **ALWAYS)
    amplifier.attach(ours := kind(pair.a.parameters(), 0.01, weight_decay=0.0))
    others = kind(pair.b.parameters(), 0.02, weight_decay=0.0)

    def closure() -> float:
        pair.give()
        return 1.0

    for step in range(3):
        assert (ours.step(closure) if step else ours.step(closure=closure)) == 1.0
        others.step()
        near(pair.a, pair.b)
    assert amplifier.report().steps == 3


def test_a_subclass_amplifies_once(place: Place) -> None:
    class Own(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Elsewhere(optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                p -= self.param_groups[0]["lr"] * p.grad

    for kind, expected in ((Own, 2.0), (Elsewhere, 1.0)):
        model = network(place.device, torch.float64)
        amplifier = place.amplifier(model, **ALWAYS)
        amplifier.attach(optimizer := kind(model.parameters(), 0.1))
        before = copy.deepcopy(model)
        raw = backward(model)
        if kind is Own:
            optimizer.step()
        else:
            with pytest.warns(UserWarning, match=r"Elsewhere.step\(\) did not call .*SGD"):
                optimizer.step()
            optimizer.step()
            expected *= 2
        for name, p in model.named_parameters():
            moved = before.get_parameter(name) - p
            torch.testing.assert_close(moved, 0.1 * expected * raw[name])
        assert amplifier.report().steps == (1 if kind is Own else 0)


@pytest.mark.filterwarnings("ignore:.*torch.distributed is")
@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_a_step_that_only_makes_state_is_none(place: Place, kind: Any) -> None:
    """torch's distributed checkpoint initialises an optimizer by a step."""
    model, other = network(place.device), network(place.device)
    optimizers = []
    amplifier = place.amplifier(model, **LAGGED)
    for m, k in ((model, kind), (other, getattr(torch.optim, kind.__name__))):
        optimizers.append(k(m.parameters(), 0.1, **({"momentum": 0.9} if "SGD" in str(k) else {})))
    amplifier.attach(optimizers[0])
    state = amplifier.state_dict()
    found, expected = (
        get_optimizer_state_dict(m, o) for m, o in zip((model, other), optimizers, strict=True)
    )
    assert same_state(state, amplifier.state_dict())
    assert same(model, other)
    assert found["state"].keys() == expected["state"].keys()
    for name, of in found["state"].items():
        assert of.keys() == expected["state"][name].keys()


def test_gradients_that_cannot_be_amplified(place: Place) -> None:
    """Non-finite ones, under both timings; nothing is updated by half."""
    for options, moves in ((LAGGED, True), (ALWAYS, False)):
        model = network(place.device)
        amplifier = place.amplifier(model, **options)
        optimizer = optim.AdamW(model.parameters(), 0.1)
        amplifier.attach(optimizer)
        backward(model)
        model[2].bias.grad[1] = torch.nan
        before = copy.deepcopy(model)
        optimizer.step()
        assert amplifier.report().skipped_steps == 1
        assert same(model, before) != moves
        assert not moves or (model[2].bias.isnan().sum() == 1 and not model[0].bias.isnan().any())
    model = network(place.device)
    amplifier = place.amplifier(model, **LAGGED, error_if_nonfinite=True)
    optimizer = optim.AdamW(model.parameters(), 0.1)
    amplifier.attach(optimizer)
    backward(model)
    model[2].bias.grad[1] = torch.inf
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="non-finite gradients in layer"):
        optimizer.step()
    assert same(model, before)


# ---- during backpropagation, and growing ------------------------------------------------


def test_backward_placement_leaves_the_step_alone(place: Place) -> None:
    options = {**ALWAYS, "placement": "backward", "measure_every": 2}
    options.pop("timing")
    models = [network(place.device) for _ in range(2)]
    pairs = []
    for model, kind in zip(models, (optim.AdamW, torch.optim.AdamW), strict=True):
        amplifier = place.amplifier(model, **options)
        optimizer = kind(model.parameters(), 0.01)
        with pytest.warns(UserWarning, match="AdamW divides out"):
            amplifier.attach(optimizer)
        pairs.append((model, amplifier, optimizer))
    for step in range(6):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(place.device)
        for model, _, optimizer in pairs:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)
    reports = [amplifier.report() for _, amplifier, _ in pairs]
    assert reports[0].steps == 6
    assert {layer.acts_on for layer in reports[0].layers} == {"gradient"}
    assert [x.selected for x in reports[0].layers] == [x.selected for x in reports[1].layers]


def trained(
    place: Place, kind: Any, steps: int, rate: Callable[[int], float]
) -> tuple[Amplifier, list[float]]:
    model = network(place.device)
    optimizer = kind(model.parameters(), 1.0, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    amplifier = place.amplifier(model, grow=True, min_steps=4, refresh=2, factor=2.0)
    amplifier.attach(optimizer)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)).to(place.device)
    grown = []
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        schedule.step()
        grown.append(max(layer.factor for layer in amplifier.report().layers))
    return amplifier, grown


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_growth_waits_for_a_warm_up(place: Place, kind: Any) -> None:
    amplifier, grown = trained(place, kind, 14, lambda step: 1e-6 * min(step + 1, 9))
    assert grown[8] == 1.0
    assert grown[-1] > 1.0
    acts = {layer.acts_on for layer in amplifier.report().layers}
    assert acts == {"gradient" if kind is optim.SGD else "update"}


def test_growth_has_no_brake_under_adam(place: Place) -> None:
    """The size of gradients says nothing of the size of steps there."""
    pair = Pair(place)
    amplifier = place.amplifier(pair.a, grow=True, min_steps=2, refresh=100)
    amplifier.attach(ours := optim.AdamW(pair.a.parameters(), 0.001))
    others = torch.optim.AdamW(pair.b.parameters(), 0.001)
    state = amplifier.bound.settled_state()
    for step in range(6):
        pair.give()
        if step == 2:
            amplifier.bound.settled_state().column("factor").fill_(4.0)
            amplifier.bound.written()
            others.param_groups[0].update(lr=0.004, weight_decay=0.0025)
        for model in (pair.a, pair.b):
            for p in model.parameters():
                p.grad.mul_(100.0 ** (step > 3))  # a surge
        ours.step()
        others.step()
        near(pair.a, pair.b)
    assert bool((state.column("on_update") == 1).all())
