"""Input that cannot be served is named before anything is written, and odd settings just work."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Place, Stream, bare, put, same_bits
from factors import ALWAYS, LAGGED, backward, factors, network, only, sgd, steps
from torch import nn

from gradamp_fast import Schedule

CPU = Place("torch", "cpu")


# ---- two gradients in one memory ---------------------------------------------------------


def made_by_autograd(model: nn.Module) -> None:
    (1 + model.a.w[None] + model.b.w[None]).square().sum().backward()


def the_same_tensor(model: nn.Module) -> None:
    model.a.w.grad = model.b.w.grad = torch.ones_like(model.a.w)


def half_of_it(model: nn.Module) -> None:
    memory = torch.ones(12, device=model.a.w.device)
    model.a.w.grad, model.b.w.grad = memory[:8].view(2, 4), memory[4:].view(2, 4)


@pytest.mark.parametrize("options", [ALWAYS, LAGGED], ids=["exact", "lagged"])
@pytest.mark.parametrize("share", [made_by_autograd, the_same_tensor, half_of_it])
def test_gradients_that_share_memory(place: Place, share: Any, options: dict[str, Any]) -> None:
    model = bare({"a.w": (2, 4), "b.w": (2, 4), "c.w": (3,)}, device=place.device)
    amplifier = place.amplifier(model, **options)
    put(model, {n: torch.ones_like(p) for n, p in model.named_parameters()})
    amplifier.step()
    model.zero_grad()
    share(model)
    model.c.w.grad = torch.ones_like(model.c.w)
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"'a\.w'.*'b\.w'.*share memory"):
        amplifier.step()
    assert all(same_bits(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert amplifier.report().steps == 1


def test_views_of_one_buffer_that_do_not_overlap(place: Place) -> None:
    """As data parallel training lays gradients out; columns of a matrix interleave."""
    model = bare({"a.w": (5,), "b.w": (3,), "c.w": (0,), "d.w": (2,)}, device=place.device)
    amplifier = place.amplifier(model, **ALWAYS)
    memory = torch.ones(10, device=place.device)
    for p, g in zip(model.parameters(), memory.split([5, 3, 0, 2]), strict=True):
        p.grad = g
    amplifier.step()
    assert memory.tolist() == [2.0] * 10


def test_an_excluded_one_counts_as_well(place: Place) -> None:
    model = bare({"a.w": (2, 4), "b.w": (2, 4)}, device=place.device)
    amplifier = place.amplifier(model, **ALWAYS, exclude=["b.*"])
    the_same_tensor(model)
    with pytest.raises(ValueError, match="share memory"):
        amplifier.step()


# ---- inference mode ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [ALWAYS, LAGGED], ids=["exact", "lagged"])
def test_gradients_made_under_inference_mode(place: Place, options: dict[str, Any]) -> None:
    """Named at the first step, with nothing written, not when the first layer is selected."""
    model = bare({"a.w": (4,), "b.w": (5,)}, device=place.device)
    amplifier = place.amplifier(model, **options)
    model.a.w.grad = torch.ones_like(model.a.w)
    with torch.inference_mode():
        model.b.w.grad = torch.ones_like(model.b.w)
    with pytest.raises(TypeError, match=r"'b\.w'.*inference_mode"):
        amplifier.step()
    assert model.a.w.grad.tolist() == [1.0] * 4
    assert amplifier.report().steps == 0


def test_an_amplifier_made_under_inference_mode(place: Place) -> None:
    model, other = network(place.device), network(place.device)
    with torch.inference_mode():
        amplifier = place.amplifier(model, **ALWAYS, schedule=Schedule([(0, 9)]))
        amplifier.prepare()
    amplifier.set_epoch(0)
    amplifier.factor = 3.0
    raw = backward(model)
    amplifier.step()
    assert only(model, raw) == 3.0
    stored = amplifier.state_dict()
    amplifier.reset()
    amplifier.load_state_dict(stored)
    with torch.inference_mode():
        second = place.amplifier(other, **ALWAYS, schedule=Schedule([(0, 9)]))
        second.load_state_dict(stored)
        second.set_epoch(1)
        second.reset()
    second.load_state_dict(stored)
    assert steps(second) == {"0": 1, "2": 1, "4": 1}


# ---- sparse gradients ------------------------------------------------------------------------


def sparse(place: Place) -> tuple[nn.ModuleDict, dict[str, torch.Tensor]]:
    model = nn.ModuleDict({"e": nn.Embedding(6, 3, sparse=True), "l": nn.Linear(3, 2)})
    model = model.to(place.device)
    model["l"](model["e"](torch.tensor([1, 4, 1], device=place.device))).sum().backward()
    return model, {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {"exclude": ["e.*"]},
        {"include": lambda name: name.startswith("l")},
        {"group_by": lambda name: None if name.startswith("e") else name},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_sparse_gradient_is_excluded(place: Place, options: dict[str, Any]) -> None:
    model, raw = sparse(place)
    amplifier = place.amplifier(model, **ALWAYS, **options)
    amplifier.step()
    assert factors(model, {n: raw[n] for n in ("l.weight", "l.bias")}) == {
        "l.weight": 2.0,
        "l.bias": 2.0,
    }
    assert torch.equal(model["e"].weight.grad.to_dense(), raw["e.weight"].to_dense())


def test_a_sparse_gradient_in_a_group_that_is_not_amplified(place: Place) -> None:
    model, raw = sparse(place)
    groups = [{"params": model["e"].parameters(), "amplify": False}]
    optimizer = sgd([*groups, {"params": model["l"].parameters()}])
    place.amplifier(model, **ALWAYS).attach(optimizer)
    optimizer.step()
    assert only(model["l"], {n[2:]: g for n, g in raw.items() if n.startswith("l")}) == 2.0
    assert torch.equal(model["e"].weight.grad.to_dense(), raw["e.weight"].to_dense())


def test_a_sparse_gradient_is_unscaled_but_no_norm_is_made_of_it(place: Place) -> None:
    model, raw = sparse(place)
    amplifier = place.amplifier(model, **ALWAYS, exclude=["e.*"])
    amplifier.step(torch.full((1,), 4.0, device=place.device))
    torch.testing.assert_close(model["e"].weight.grad.to_dense(), raw["e.weight"].to_dense() / 4)
    model, _ = sparse(place)
    clipping = place.amplifier(model, **ALWAYS, exclude=["e.*"], max_norm=1.0)
    with pytest.raises(TypeError, match=r"'e\.weight'.*max_norm"):
        clipping.step()


# ---- not finite: one formula -------------------------------------------------------------------

TOO_LARGE = [(torch.float64, 1e40, 7), (torch.float32, 3e38, 5000), (torch.float64, 1e160, 70_001)]


@pytest.mark.parametrize(("dtype", "value", "numel"), TOO_LARGE)
def test_sums_that_overflow(place: Place, dtype: torch.dtype, value: float, numel: int) -> None:
    """The elements are finite, what is made of them is not: skipped, found, or raised for."""
    model = bare({"a.w": (numel,), "b.w": (9,)}, dtype, place.device)
    amplifier = place.amplifier(model, **ALWAYS)
    found = torch.zeros(1, device=place.device)
    gradients = {n: torch.full_like(p, 1.0) for n, p in model.named_parameters()}
    gradients["a.w"].fill_(value)
    put(model, gradients)
    before = [p.grad.clone() for p in model.parameters()]
    amplifier.step(found_inf=found)
    assert float(found) == 1.0
    assert amplifier.report().skipped_steps == 1
    assert all(same_bits(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    other = bare({"a.w": (numel,), "b.w": (9,)}, dtype, place.device)
    strict = place.amplifier(other, **ALWAYS, error_if_nonfinite=True)
    put(other, gradients)
    with pytest.raises(RuntimeError, match=r"layer.*'a'"):
        strict.step()
    assert strict.report().steps == 0


def test_the_largest_that_are_still_counted(place: Place) -> None:
    model = bare({"a.w": (7,)}, torch.float32, place.device)
    amplifier = place.amplifier(model, **{**ALWAYS, "factor": 0.5}, error_if_nonfinite=True)
    model.a.w.grad = torch.full_like(model.a.w, 3e38)
    amplifier.step()
    assert model.a.w.grad.tolist() == [float(torch.tensor(1.5e38))] * 7
    assert amplifier.report().skipped_steps == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"match_norm": True}], ids=str)
def test_total_norm_after_a_nan(place: Place, options: dict[str, Any], value: float) -> None:
    """It is that of the last step, as ``clip_grad_norm_`` returns it, and no longer a number."""
    model = network(place.device)
    amplifier = place.amplifier(model, **ALWAYS, **options)
    backward(model)
    amplifier.step()
    assert math.isfinite(float(amplifier.total_norm))
    model.zero_grad()
    backward(model)
    model[2].weight.grad[0, 0] = value
    amplifier.step()
    norm = float(amplifier.total_norm)
    assert math.isnan(norm) if math.isnan(value) else not math.isfinite(norm)
    model.zero_grad()
    backward(model)
    amplifier.step()
    assert math.isfinite(float(amplifier.total_norm))


# ---- the default device, numpy, the environment ---------------------------------------------


@pytest.mark.parametrize("options", [ALWAYS, {"min_steps": 2, "refresh": 2}], ids=["random", "own"])
def test_another_default_device(place: Place, options: dict[str, Any]) -> None:
    """Nothing of a step, a report or a checkpoint is made there."""
    model, twin = (bare({"a.w": (40, 3), "b.w": (60,)}, device=place.device) for _ in range(2))
    stream = Stream(model)
    given = [stream.next() for _ in range(4)]
    reports = []
    for each, device in ((twin, None), (model, "meta")):
        with torch.device(device) if device else torch.device(place.device):
            amplifier = place.amplifier(each, **options)
            for gradients in given:
                put(each, {n: g.clone() for n, g in gradients.items()})
                amplifier.step()
                amplifier.record()
            stored = amplifier.state_dict()
            amplifier.reset()
            amplifier.load_state_dict(stored)
            reports.append((repr(amplifier.report()), amplifier.summary()))
    assert reports[0] == reports[1]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_bits(p.grad, q.grad)


def test_a_heat_map_under_another_default_device(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from gradamp_fast import plot

    model = network()
    amplifier = CPU.amplifier(model, **ALWAYS)
    for _ in range(3):
        backward(model)
        amplifier.step()
        amplifier.record()
    with torch.device("meta"):
        plot.heatmap(amplifier.record(), tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 0


WINDOWS = ((np.int64(0), np.float32(3.0), np.float64(2.0)), (np.float64(4.0), np.int32(5)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"schedule": Schedule(WINDOWS, unit="step")},
        lambda: {"schedule": Schedule([(0, 3)], unit=np.str_("step")), "match_norm": np.True_},
        lambda: {"measure": np.str_("direction"), "select": np.array(["above"])[0]},
        lambda: {"include": np.array(["0.*", "2.*"])},
        lambda: {"exclude": [np.str_("0.*")], "threshold": np.float32(0.5)},
        lambda: {"min_steps": np.int32(3), "refresh": np.str_("epoch"), "factor": np.float16(3)},
    ],
)
def test_numpy_in_options_is_stored_as_plain_values(make: Callable[[], dict[str, Any]]) -> None:
    """What is saved loads again under ``weights_only=True``, and means the same."""
    amplifier = CPU.amplifier(network(), **make())
    buffer = io.BytesIO()
    torch.save(amplifier.state_dict(), buffer)
    buffer.seek(0)
    other = CPU.amplifier(network(), **make())
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert plain(amplifier.options.to_dict())


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(plain(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(plain(v) for v in value)
    return value is None or type(value) in (str, int, float, bool)
