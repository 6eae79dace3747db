"""The public face: fused_amplify and its registry, ownership, lifetime, report, factor."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from cases import SHAPES, Place, Stream, bare, put, same_bits
from torch import nn

import gradamp_fast
from gradamp_fast import Amplifier, fused_amplify

NARROW = {name: shape for name, shape in SHAPES.items() if name != "wide.weight"}
QUICK = {"measure": "variance", "min_steps": 1, "refresh": 1, "threshold": 1e9}


def ready(device: str = "cpu") -> nn.Module:
    """A model whose parameters hold gradients."""
    model = bare(NARROW, device=device)
    put(model, Stream(model).next())
    return model


# ---- fused_amplify ------------------------------------------------------------------


def test_drop_in_is_an_amplifier_step(place: Place) -> None:
    models = [bare(NARROW, device=place.device) for _ in range(2)]
    amplifier = place.amplifier(models[0], **QUICK)
    streams = [Stream(model) for model in models]
    for _ in range(4):
        for model, stream in zip(models, streams, strict=True):
            put(model, stream.next())
        amplifier.step()
        returned = fused_amplify(models[1], backend=place.backend, **QUICK)
        for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert same_bits(mine.grad, theirs.grad)
    assert isinstance(returned, Amplifier)
    assert returned.report().steps == 4


def test_one_amplifier_for_each_model() -> None:
    first, second = ready(), ready()
    assert fused_amplify(first) is fused_amplify(first)
    assert fused_amplify(second) is not fused_amplify(first)


def test_wrappers_are_the_same_model() -> None:
    model = ready()
    amplifier = fused_amplify(model)
    assert fused_amplify(nn.DataParallel(model)) is amplifier
    assert fused_amplify(torch.compile(model)) is amplifier
    assert fused_amplify(torch.compile(nn.DataParallel(model))) is amplifier


def test_a_wrapper_first_then_the_model() -> None:
    model = ready()
    assert fused_amplify(torch.compile(model)) is fused_amplify(model)


def test_options_may_be_left_out_later_but_not_differ() -> None:
    model = ready()
    amplifier = fused_amplify(model, factor=3.0, decay=0.5)
    assert fused_amplify(model) is amplifier
    assert fused_amplify(model, factor=3.0) is amplifier
    with pytest.raises(ValueError, match=r"factor.*reset\("):
        fused_amplify(model, factor=4.0)
    with pytest.raises(ValueError, match=r"min_steps.*reset\("):
        fused_amplify(model, factor=3.0, min_steps=7)
    with pytest.raises(ValueError, match="factor"):
        fused_amplify(model, facter=3.0)
    assert amplifier.report().steps == 3


def test_reset_forgets_options_and_state() -> None:
    model = ready()
    first = fused_amplify(model, factor=3.0)
    gradamp_fast.reset(model)
    del first
    again = fused_amplify(model, factor=4.0)
    assert again.report().steps == 1
    assert float(again.factor) == 4.0


def test_drop_in_does_not_keep_the_model_alive() -> None:
    model = ready()
    amplifier = weakref.ref(fused_amplify(model))
    alive = weakref.ref(model)
    assert amplifier() is not None
    del model
    gc.collect()
    assert alive() is None
    assert amplifier() is None


def test_drop_in_keeps_its_amplifier_for_as_long_as_the_model_lives() -> None:
    model = ready()
    fused_amplify(model)
    gc.collect()
    put(model, Stream(model).next())
    assert fused_amplify(model).report().steps == 2


def test_drop_in_passes_scale_and_found_inf(place: Place) -> None:
    model = ready(place.device)
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    scale = torch.tensor([4.0], device=place.device)
    fused_amplify(model, grad_scale=scale, backend=place.backend)
    assert all(same_bits(p.grad, before[n] / 4) for n, p in model.named_parameters())
    found_inf = torch.ones(1, device=place.device)
    amplifier = fused_amplify(model, found_inf=found_inf)
    assert amplifier.report().skipped_steps == 1
    fused_amplify(model, grad_scale=scale, unscale=False)
    assert all(same_bits(p.grad, before[n] / 4) for n, p in model.named_parameters())


def test_drop_in_with_an_adam_warns() -> None:
    model = ready()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.warns(UserWarning, match="Adam"):
        fused_amplify(model, optimizer=optimizer)


def test_drop_in_refuses_a_model_whose_amplifier_is_attached() -> None:
    model = ready()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    amplifier = fused_amplify(model)
    handle = amplifier.attach(optimizer)
    with pytest.raises(ValueError, match="attach"):
        fused_amplify(model)
    handle.remove()
    assert fused_amplify(model) is amplifier


# ---- ownership and lifetime ---------------------------------------------------------


def test_a_parameter_has_one_living_owner() -> None:
    model = ready()
    amplifier = Amplifier(model)
    amplifier.step()
    with pytest.raises(ValueError, match=r"'scale'.*Amplifier"):
        Amplifier(model).step()
    with pytest.raises(ValueError, match=r"'scale'.*Amplifier"):
        fused_amplify(model)
    with pytest.raises(ValueError, match=r"weight"):
        Amplifier(model.stem).step()
    del amplifier
    Amplifier(model).step()


def test_an_amplifier_dies_without_the_collector() -> None:
    model = ready()
    amplifier = Amplifier(model)
    amplifier.step()
    amplifier.report()
    alive = weakref.ref(amplifier)
    gc.disable()
    try:
        del amplifier
        assert alive() is None
    finally:
        gc.enable()


def test_an_amplifier_does_not_keep_the_model_alive() -> None:
    model = ready()
    amplifier = Amplifier(model)
    amplifier.step()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    del amplifier


@pytest.mark.parametrize("do", [copy.deepcopy, pickle.dumps, copy.copy])
def test_amplifiers_are_not_copied(do: object) -> None:
    amplifier = Amplifier(ready())
    with pytest.raises(TypeError, match="state_dict"):
        do(amplifier)  # type: ignore[operator]


def test_nothing_is_stored_on_the_model() -> None:
    model = ready()
    keys = {name: set(module.__dict__) for name, module in model.named_modules()}
    of_parameters = {name: set(p.__dict__) for name, p in model.named_parameters()}
    amplifier = fused_amplify(model)
    amplifier.step()
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == keys
    assert {name: set(p.__dict__) for name, p in model.named_parameters()} == of_parameters
    twin = copy.deepcopy(model)
    put(twin, Stream(twin).next())
    assert fused_amplify(twin) is not amplifier
    assert pickle.loads(pickle.dumps(model)).state_dict().keys() == model.state_dict().keys()


def test_gradients_are_not_held_between_steps(place: Place) -> None:
    model = ready(place.device)
    amplifier = place.amplifier(model)
    amplifier.step()
    held = [weakref.ref(p.grad) for p in model.parameters()]
    put(model, {})
    assert [ref() for ref in held] == [None] * len(held)
    assert amplifier.report().steps == 1


# ---- report, summary, factor --------------------------------------------------------


def test_report(place: Place) -> None:
    model = bare(NARROW, device=place.device)
    amplifier = place.amplifier(model, min_steps=2, refresh=2)
    stream = Stream(model)
    for _ in range(3):
        put(model, stream.next())
        amplifier.step()
    report = amplifier.report()
    assert (report.steps, report.skipped_steps) == (3, 0)
    assert isinstance(report.threshold, float)
    assert math.isfinite(report.threshold)
    row = report.layers[-1]
    assert row.name == "head"
    assert row.numel == 180
    assert row.steps == 3
    for name in ("variance", "temporal_variance", "fluctuation", "direction", "score"):
        assert isinstance(getattr(row, name), float), name
    assert row.score == row.fluctuation
    assert isinstance(row.selected, bool)
    assert {layer.factor for layer in report.layers} == {1.0, 2.0}
    assert all((layer.factor == 2.0) == layer.selected for layer in report.layers)


def test_report_before_any_step(place: Place) -> None:
    report = place.amplifier(bare(NARROW, device=place.device)).report()
    assert (report.steps, report.skipped_steps) == (0, 0)
    assert math.isnan(report.threshold)
    assert [layer.steps for layer in report.layers] == [0] * len(report.layers)
    assert not any(layer.selected for layer in report.layers)


def test_summary_names_every_layer() -> None:
    model = ready()
    amplifier = Amplifier(model)
    before = str(amplifier.summary())
    amplifier.step()
    after = str(amplifier.summary())
    for name in ("stem", "body.0", "body.1", "head"):
        assert name in before
        assert name in after


def test_factor_may_be_assigned(place: Place) -> None:
    model = bare(NARROW, device=place.device)
    amplifier = place.amplifier(model, **QUICK)
    stream = Stream(model)
    for step, factor in enumerate((2.0, 2.0, 5.0, 0.25)):
        if step >= 2:
            amplifier.factor = factor
        gradients = stream.next()
        before = gradients["head.weight"].clone()
        put(model, gradients)
        amplifier.step()
        assert float(amplifier.factor) == factor
        assert same_bits(model.head.weight.grad, before * (factor if step else 1.0))


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, math.nan, math.inf])
def test_factor_is_checked_when_assigned(value: float) -> None:
    model = ready()
    amplifier = Amplifier(model)
    for _ in range(2):  # before the state exists, and after
        with pytest.raises(ValueError, match="factor"):
            amplifier.factor = value
        amplifier.step()
    assert float(amplifier.factor) == 2.0


def test_factor_assigned_before_the_first_step(place: Place) -> None:
    model = bare(NARROW, device=place.device)
    amplifier = place.amplifier(model, **QUICK)
    amplifier.factor = 7.0
    stream = Stream(model)
    for step in range(2):
        gradients = stream.next()
        before = gradients["head.weight"].clone()
        put(model, gradients)
        amplifier.step()
        assert same_bits(model.head.weight.grad, before * (7.0 if step else 1.0))


def test_windows_with_their_own_factor_ignore_the_assigned_one(place: Place) -> None:
    schedule = gradamp_fast.Schedule([(0, 2, 3.0), (2, 9)], unit="step")
    model = bare(NARROW, device=place.device)
    amplifier = place.amplifier(model, schedule=schedule, **QUICK)
    amplifier.factor = 5.0
    stream = Stream(model)
    for factor in (1.0, 3.0, 5.0):
        gradients = stream.next()
        before = gradients["head.weight"].clone()
        put(model, gradients)
        amplifier.step()
        assert same_bits(model.head.weight.grad, before * factor)


# ---- reset, prepare, backend --------------------------------------------------------


def test_reset_is_a_fresh_start(place: Place) -> None:
    model = bare(NARROW, device=place.device)
    amplifier = place.amplifier(model, min_steps=2, refresh=2)
    outcomes = []
    for _ in range(2):
        stream = Stream(model)
        for _ in range(5):
            put(model, stream.next())
            amplifier.step()
        outcomes.append((repr(amplifier.report()), [p.grad.clone() for p in model.parameters()]))
        amplifier.reset()
        report = amplifier.report()
        assert (report.steps, report.skipped_steps) == (0, 0)
        assert not any(layer.selected or layer.steps for layer in report.layers)
    assert outcomes[0][0] == outcomes[1][0]
    assert all(same_bits(a, b) for a, b in zip(outcomes[0][1], outcomes[1][1], strict=True))


def test_prepare_does_not_step(place: Place) -> None:
    model = ready(place.device)
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    amplifier = place.amplifier(model, **QUICK)
    amplifier.prepare()
    assert amplifier.report().steps == 0
    assert all(same_bits(p.grad, before[n]) for n, p in model.named_parameters())
    amplifier.step()
    assert amplifier.report().steps == 1


def test_a_backend_that_cannot_run_says_why() -> None:
    missing = "cuda" if not torch.cuda.is_available() else "cpu"
    model = ready("cpu" if missing == "cuda" else "cuda")
    with pytest.raises((RuntimeError, ValueError), match=missing):
        Amplifier(model, backend=missing).step()


def test_environment_overrides_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADAMP_BACKEND", "nonsense")
    model = ready()
    with pytest.raises(ValueError, match="GRADAMP_BACKEND"):
        Amplifier(model).step()
    Amplifier(model, backend="torch").step()


def test_step_takes_keywords_as_written() -> None:
    model = ready()
    amplifier = Amplifier(model)
    amplifier.step(grad_scale=None, found_inf=None, unscale=True)
    assert amplifier.report().steps == 1
