"""Growing amplification: factors of the layers' own, the gate, the brake, settling for good."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from cases import Place, Twin, bare, put, same_bits, same_state, scaled
from torch import Tensor, nn

from gradamp_fast import Amplifier

SHAPES = {"a.w": (64,), "a.b": (8,), "b.w": (20, 15), "c.w": (41, 101), "d.w": (32,)}
GROW: dict[str, Any] = {
    "grow": True,
    "measure": "direction",
    "threshold": 0.0,
    "factor": 1.5,
    "decay": 0.8,
    "min_steps": 10,
    "refresh": 2,
}
# By layer: how a step's gradient stands to the last ones, and its size.
Way = Callable[[int], tuple[float, float]]
AGREE, NOISE, LARGE, TURN = (1.0, 1.0), (0.0, 1.0), (1.0, 10.0), (-1.0, 1.0)


def agree(step: int) -> tuple[float, float]:
    return AGREE


def noise(step: int) -> tuple[float, float]:
    return NOISE


def then_turn(step: int) -> tuple[float, float]:
    return AGREE if step < 20 else TURN


def with_a_surge(step: int) -> tuple[float, float]:
    return LARGE if 24 <= step < 30 else AGREE


class Course:
    """Gradients that go the way of each layer, step after step."""

    def __init__(self, model: nn.Module, ways: Mapping[str, Way], default: Way = agree) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.parameters = dict(model.named_parameters())
        self.base = {name: self.draw(p) for name, p in self.parameters.items()}
        self.ways, self.default, self.step = ways, default, 0

    def draw(self, parameter: Tensor) -> Tensor:
        return torch.randn(parameter.shape, generator=self.generator, dtype=torch.float64)

    def next(self) -> dict[str, Tensor]:
        made = {}
        for name, parameter in self.parameters.items():
            trend, size = self.ways.get(name.split(".")[0], self.default)(self.step)
            turned = trend if trend >= 0 else trend * (-1) ** self.step
            value = size * (turned * self.base[name] + 0.3 * self.draw(parameter))
            made[name] = value.to(parameter.dtype).to(parameter.device)
        self.step += 1
        return made


WAYS: dict[str, Way] = {"b": then_turn, "c": with_a_surge, "d": noise}


def factors(amplifier: Amplifier) -> dict[str, float]:
    return {layer.name: layer.factor for layer in amplifier.report().layers}


def settled(amplifier: Amplifier) -> set[str]:
    return {layer.name for layer in amplifier.report().layers if layer.settled}


# ---- the rule -----------------------------------------------------------------------


@pytest.mark.parametrize("timing", ["lagged", "exact"])
@pytest.mark.parametrize("more", [{}, {"max_norm": 1.0}], ids=str)
def test_layers_grow_settle_and_brake(place: Place, timing: str, more: dict[str, Any]) -> None:
    model = bare(SHAPES, device=place.device)
    options = {**GROW, "max_factor": 8.0, "timing": timing, **more}
    twin, course = Twin(model, place, **options), Course(model, WAYS)
    seen = []
    for _ in range(40):
        twin.step(course.next())
        seen.append(factors(twin.amplifier))
    assert all(seen[step] == dict.fromkeys("abcd", 1.0) for step in range(9))
    assert seen[-1]["a"] == 8.0
    assert settled(twin.amplifier) >= {"b"}
    assert 1.0 < seen[-1]["b"] < max(of["b"] for of in seen)
    assert min(of["c"] for of in seen[24:30]) < seen[23]["c"]
    assert seen[-1]["c"] > min(of["c"] for of in seen[24:30])


def test_a_rate_that_is_not_low_grows_nothing(place: Place) -> None:
    """Whatever a single layer says: at the first decision all settle, for good."""
    model = bare(SHAPES, device=place.device)
    twin = Twin(model, place, **GROW)
    course = Course(model, {"a": agree}, lambda step: NOISE if step < 14 else AGREE)
    for _ in range(24):
        twin.step(course.next())
    assert factors(twin.amplifier) == dict.fromkeys("abcd", 1.0)
    assert settled(twin.amplifier) == set("abcd")
    assert twin.amplifier.report().direction > 0.1  # by now


@pytest.mark.parametrize("direction", [0.1, math.nextafter(0.1, 1.0)])
def test_the_gate_at_its_edge(place: Place, direction: float) -> None:
    """A mean direction of exactly 0.1 is not above it. Layers that are absent count."""
    model = bare({"a.w": (64,), "b.w": (64,), "late.w": (3,)}, device=place.device)
    amplifier = place.amplifier(model, **{**GROW, "refresh": 1})
    state = amplifier.bound.settled_state()
    for name, value in {
        "agreement": direction,
        "steps": 10,
        "variance": 1,
        "member_numel": 64,
    }.items():
        state.column(name)[:2] = value
    put(model, {"late.w": torch.ones(3, device=place.device)})
    amplifier.step()
    above = direction > 0.1
    assert factors(amplifier) == {"a": 1.5 if above else 1.0, "b": 1.5 if above else 1.0, "late": 1}
    assert settled(amplifier) == (set() if above else {"a", "b"})


def test_the_mean_direction_weighs_elements(place: Place) -> None:
    """A small layer that agrees does not open the gate for a large one that does not."""
    model = bare({"small.w": (40,), "large.w": (4000,)}, device=place.device)
    twin, course = Twin(model, place, **GROW), Course(model, {"large": noise})
    for _ in range(12):
        twin.step(course.next())
    report = twin.amplifier.report()
    assert report.layers[0].direction > 0.5
    assert report.direction < 0.1
    assert settled(twin.amplifier) == {"small", "large"}


def test_one_element_has_no_variance_to_brake_by(place: Place) -> None:
    model = bare({"one.w": (1,), "more.w": (64,)}, device=place.device)
    twin = Twin(model, place, **GROW)
    course = Course(model, {"one": then_turn})
    for _ in range(32):
        twin.step(course.next())
    of = factors(twin.amplifier)
    assert of["one"] > 1.0
    assert settled(twin.amplifier) == {"one"}


def test_a_layer_without_any_gradient_in_it(place: Place) -> None:
    """Zeros have no direction: 0 is not above the threshold, so the layer settles at 1."""
    model = bare({"still.w": (64,), "b.w": (64,)}, device=place.device)
    twin, course = Twin(model, place, **GROW), Course(model, {"still": lambda step: (0.0, 0.0)})
    for _ in range(16):
        twin.step(course.next())
    assert factors(twin.amplifier)["still"] == 1.0
    assert settled(twin.amplifier) == {"still"}


def test_a_skipped_step_changes_no_factor(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    twin, course = Twin(model, place, **GROW), Course(model, WAYS)
    for step in range(24):
        gradients = course.next()
        before = factors(twin.amplifier)
        if step in (9, 13, 14):
            gradients["b.w"][3, 4] = torch.nan
        twin.step(gradients)
        if step in (9, 13, 14):
            assert factors(twin.amplifier) == before
    assert twin.amplifier.report().skipped_steps == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_factor_reported_is_what_multiplies_next(place: Place, dtype: torch.dtype) -> None:
    """Bit for bit, the brake included."""
    model = bare(SHAPES, dtype, place.device)
    amplifier, course = place.amplifier(model, **GROW), Course(model, WAYS)
    braked = 0
    for _ in range(34):
        gradients = course.next()
        standing = factors(amplifier)
        expected = {n: scaled(g, standing[n.split(".")[0]]) for n, g in gradients.items()}
        put(model, gradients)
        amplifier.step()
        braked += standing["c"] not in {1.5**k for k in range(30)}
        for name, parameter in model.named_parameters():
            assert same_bits(parameter.grad, expected[name]), name
    assert braked > 0


# ---- windows, epochs, warm-up ----------------------------------------------------------


@pytest.mark.parametrize("timing", ["lagged", "exact"])
def test_windows(place: Place, timing: str) -> None:
    """Outside of them the multiplier is 1, and nothing grows or settles."""
    model = bare(SHAPES, device=place.device)
    windows = [(14, 18), (24, 28, 3.0)]
    twin = Twin(model, place, windows=windows, unit="step", timing=timing, **GROW)
    course, seen = Course(model, {}), []
    for _ in range(34):
        gradients = course.next()
        before = gradients["a.w"].clone()
        twin.step(gradients)
        seen.append(round(float((model.a.w.grad / before).median()), 3))
    shift = timing == "lagged"  # a decision of step 15 multiplies in step 16
    assert seen[:14] == [1.0] * 14
    assert seen[18:24] == [1.0] * 6
    assert seen[28:] == [1.0] * 6
    assert seen[27] == 1.5**2 * 3.0 ** (2 - shift)
    assert settled(twin.amplifier) == set()


def test_epochs_restart_the_averages_and_not_the_factors(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    twin = Twin(model, place, **{**GROW, "decay": None, "refresh": "epoch"})
    course = Course(model, WAYS)
    twin.set_epoch(0)
    for epoch in range(1, 4):
        for _ in range(12):
            twin.step(course.next())
        twin.set_epoch(epoch)
    assert factors(twin.amplifier)["a"] == 1.5**3
    least = twin.amplifier.bound.settled_state().column("least_variance")
    assert least.isinf().all()


def test_nothing_grows_in_a_warm_up(place: Place) -> None:
    """Neither grows nor settles while the learning rate of an attached optimizer rises."""
    model = bare(SHAPES, device=place.device)
    amplifier, course = place.amplifier(model, **GROW), Course(model, {"d": noise})
    parameters = list(model.parameters())
    first = torch.optim.SGD(parameters[:2], 1e-6)
    second = torch.optim.SGD([{"params": parameters[2:3]}, {"params": parameters[3:]}], 1e-6)
    handles = [amplifier.attach(optimizer) for optimizer in (first, second)]
    handles[0].remove()
    for step in range(20):
        rate = 1e-6 * min(step, 15)
        second.param_groups[1]["lr"] = rate
        put(model, course.next())
        second.step()
        if step < 16:
            assert factors(amplifier) == dict.fromkeys("abcd", 1.0)
            assert settled(amplifier) == set()
    assert factors(amplifier)["c"] > 1.0
    assert settled(amplifier) == {"d"}


# ---- control ---------------------------------------------------------------------------


def test_release(place: Place) -> None:
    """Layers grow again from where they are, or settle there: nothing is taken back."""
    model = bare(SHAPES, device=place.device)
    twin, course = Twin(model, place, **GROW), Course(model, {"b": then_turn, "d": noise})
    for _ in range(34):
        twin.step(course.next())
    before = factors(twin.amplifier)
    assert settled(twin.amplifier) >= {"b"}
    for other in (twin.amplifier, twin.oracle):
        other.release()
    assert settled(twin.amplifier) == set()
    assert factors(twin.amplifier) == before
    for _ in range(6):
        twin.step(course.next())
    after = factors(twin.amplifier)
    assert after["b"] == before["b"]
    assert after["a"] > before["a"]


def test_reset_begins_anew(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **GROW)
    digests = []
    for _ in range(2):
        course = Course(model, WAYS)
        for _ in range(28):
            put(model, course.next())
            amplifier.step()
        digests.append(amplifier.state_dict())
        amplifier.reset()
    assert same_state(*digests)
    assert factors(amplifier) == dict.fromkeys("abcd", 1.0)


@pytest.mark.parametrize("at", [8, 13, 27])
def test_a_resumed_run_continues_bit_for_bit(place: Place, at: int) -> None:
    models = [bare(SHAPES, device=place.device) for _ in range(2)]
    whole, part = (place.amplifier(model, **GROW) for model in models)
    courses = [Course(model, WAYS) for model in models]
    for step in range(34):
        for model, course in zip(models, courses, strict=True):
            put(model, course.next())
        if step == at:
            state = part.state_dict()
            del part
            part = place.amplifier(models[1], **GROW)
            part.load_state_dict(state)
        whole.step()
        part.step()
        for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
            assert same_bits(mine.grad, theirs.grad)
    assert same_state(whole.state_dict(), part.state_dict())
    assert repr(whole.report()) == repr(part.report())
    assert factors(whole)["a"] > 1.0


def test_what_grows_may_change_its_pace(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier, course = place.amplifier(model, **GROW), Course(model, {})
    for step in range(14):
        if step == 12:
            amplifier.factor = 3.0
        put(model, course.next())
        amplifier.step()
    assert factors(amplifier)["a"] == pytest.approx(1.5**2 * 3.0)
    with pytest.raises(ValueError, match=r"factor=1\.0 .* nothing would grow"):
        amplifier.factor = 1.0
