"""Schedules: validation, round trip, and when a window amplifies."""

from __future__ import annotations

import json
import math

import pytest
import torch
from cases import Place, Stream, Twin, bare, put

from gradamp_fast import Schedule

SHAPES = {"a.w": (40,), "b.w": (70,), "c.w": (9,), "d.w": (33,)}
QUICK = {"min_steps": 1, "refresh": 1, "threshold": 1e6}  # everything with a score is selected


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        ([], ("window",)),
        ([(3, 3)], ("3",)),
        ([(5, 2)], ("5", "2")),
        ([(-1, 2)], ("-1",)),
        ([(0, 4), (3, 6)], ("overlap",)),
        ([(4, 8), (0, 5)], ("overlap",)),
        ([(0, 4, 0.0)], ("factor",)),
        ([(0, 4, -1.0)], ("factor",)),
        ([(0, 4, math.inf)], ("factor",)),
        ([(0, 4, math.nan)], ("factor",)),
        ([(0,)], ("window",)),
        ([(0, 1, 2, 3)], ("window",)),
        ([(math.nan, 4)], ("nan",)),
    ],
    ids=str,
)
def test_bad_windows(windows: list, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=words[0]) as raised:
        Schedule(windows)
    for word in words:
        assert word in str(raised.value), str(raised.value)


def test_bad_unit_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="epoch"):
        Schedule([(0, 4)], unit="epochs")  # type: ignore[arg-type]


def test_equality_hash_and_round_trip() -> None:
    schedule = Schedule([(0, 4), (4, 6, 3.0)], unit="step")
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert schedule != Schedule([(0, 4), (4, 6, 3.0)], unit="epoch")
    assert Schedule([(0, 4)]).unit == "epoch"


@pytest.mark.parametrize("timing", ["lagged", "exact"])
def test_step_windows(place: Place, timing: str) -> None:
    """Windows hold their first step and not their last; one has its own factor."""
    model = bare(SHAPES, device=place.device)
    twin = Twin(
        model, place, timing=timing, windows=[(4, 6), (7, 9, 5.0)], unit="step", **QUICK
    )  # fmt: skip
    stream, seen = Stream(model), []
    for _ in range(11):
        gradients = stream.next()
        before = gradients["b.w"].clone()
        twin.step(gradients)
        seen.append(round(float((model.b.w.grad / before).median()), 3))
    assert seen == [1, 1, 1, 1, 2, 2, 1, 5, 5, 1, 1]


@pytest.mark.parametrize("timing", ["lagged", "exact"])
def test_epoch_windows(place: Place, timing: str) -> None:
    model = bare(SHAPES, device=place.device)
    twin = Twin(model, place, timing=timing, windows=[(1, 2), (3, 4, 0.5)], **QUICK)
    stream, seen = Stream(model), []
    for epoch in range(5):
        twin.set_epoch(epoch)
        for _ in range(4):
            gradients = stream.next()
            before = gradients["b.w"].clone()
            twin.step(gradients)
        seen.append(round(float((model.b.w.grad / before).median()), 3))
    assert seen == [1, 2, 1, 0.5, 1]


def test_step_number_counts_skipped_steps_but_not_empty_ones(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    twin = Twin(model, place, windows=[(6, 7)], unit="step", **QUICK)
    stream, written = Stream(model), []
    for step in range(8):
        gradients = stream.next()
        if step in (2, 3):
            gradients["c.w"][4] = math.nan
        before = gradients["b.w"].clone()
        twin.step(gradients)
        written.append(not torch.equal(before, model.b.w.grad))
        put(model, {})
        if step == 4:
            with pytest.warns(UserWarning, match="backward"):
                twin.amplifier.step()
    assert written == [False] * 6 + [True, False]


def test_epoch_may_be_given_out_of_order(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    twin = Twin(model, place, windows=[(1, 2)], **QUICK)
    stream = Stream(model)
    for epoch in (7, 1, 0, 1):
        twin.set_epoch(epoch)
        for _ in range(3):
            twin.step(stream.next())


@pytest.mark.parametrize("options", [{"refresh": "epoch"}, {"schedule": Schedule([(0, 2)])}])
def test_epochs_must_be_told(place: Place, options: dict) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **options)
    gradients = Stream(model).next()
    put(model, {name: g.clone() for name, g in gradients.items()})
    with pytest.raises(RuntimeError, match="set_epoch"):
        amplifier.step()
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters())
    amplifier.set_epoch(0)
    amplifier.step()


def test_step_schedules_need_no_epoch(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, schedule=Schedule([(0, 2)], unit="step"))
    put(model, Stream(model).next())
    amplifier.step()
    assert amplifier.report().steps == 1
