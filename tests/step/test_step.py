"""Whole steps: state, decision and written gradients, against the oracle."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import COMPLEX, REALS, SHAPES, Place, Stream, Twin, bare, put, same_bits, scaled

NARROW = {name: shape for name, shape in SHAPES.items() if name != "wide.weight"}
QUICK = {"min_steps": 2, "refresh": 2, "decay": 0.9}


def run(twin: Twin, steps: int, seed: int = 0) -> set[tuple[bool, ...]]:
    """Takes the steps, compared; returns the selections that stood."""
    stream = Stream(twin.model, seed)
    selections = set()
    for _ in range(steps):
        twin.step(stream.next())
        selections.add(tuple(layer.selected for layer in twin.oracle.layers.values()))
    return selections


@pytest.mark.parametrize("select", ["below", "above"])
@pytest.mark.parametrize(
    "threshold",
    [
        {"threshold": "mean"},
        {"threshold": "std", "num_std": 0.4},
        {"threshold": "quantile"},
        {"threshold": "quantile", "quantile": 0.15},
        {"threshold": -0.25},
    ],
    ids=str,
)
@pytest.mark.parametrize("measure", ["fluctuation", "direction", "variance"])
def test_every_decision(place: Place, measure: str, threshold: dict, select: str) -> None:
    model = bare(NARROW, device=place.device)
    twin = Twin(model, place, measure=measure, select=select, **threshold, **QUICK)
    selections = run(twin, 7)
    assert any(any(chosen) and not all(chosen) for chosen in selections)


@pytest.mark.parametrize("threshold", ["mean", "std", "quantile", 0.4])
def test_every_random_decision(place: Place, threshold: str | float) -> None:
    model = bare(NARROW, device=place.device)
    twin = Twin(model, place, measure="random", seed=2**32 - 1, threshold=threshold, **QUICK)
    assert len(run(twin, 9)) > 1
    rows = twin.amplifier.report().layers
    assert [row.score for row in rows] == [twin.oracle.score(row.name) for row in rows]


@pytest.mark.parametrize("timing", ["lagged", "exact"])
@pytest.mark.parametrize("decay", [0.99, 0.5, 0.0, None])
def test_all_bucket_lengths(place: Place, timing: str, decay: float | None) -> None:
    model = bare(SHAPES, device=place.device)
    run(Twin(model, place, timing=timing, decay=decay, min_steps=3, refresh=3), 9)


@pytest.mark.parametrize("dtype", [*REALS, *COMPLEX], ids=str)
@pytest.mark.parametrize("factor", [2.0, 0.3, 1 / 3 + 1e-9])
def test_written_bits(place: Place, dtype: torch.dtype, factor: float) -> None:
    """Selected layers hold what ``grad.mul_(factor)`` holds, the others what they held."""
    model = bare(NARROW, dtype, place.device)
    twin = Twin(model, place, factor=factor, **QUICK)
    run(twin, 5)


def test_mixed_dtypes(place: Place) -> None:
    dtypes = itertools.cycle([*REALS, *COMPLEX])
    model = bare(SHAPES, {name: next(dtypes) for name in SHAPES}, place.device)
    run(Twin(model, place, **QUICK), 6)


def test_the_product_stops_at_the_largest_number(place: Place) -> None:
    model = bare({"a.w": (5,), "b.w": (5,)}, torch.float16, place.device)
    amplifier = place.amplifier(model, factor=4.0, min_steps=1, refresh=1, measure="variance")
    big = torch.tensor([60000.0, -60000.0, 1.0, 2e4, 5e-8], dtype=torch.float16)
    for _ in range(2):
        put(model, {"a.w": big.clone().to(place.device) / 30, "b.w": big.clone().to(place.device)})
        amplifier.step()
    first, second = amplifier.report().layers
    assert first.selected
    assert not second.selected
    assert same_bits(model.b.w.grad.cpu(), big)
    put(model, {"a.w": big.clone().to(place.device), "b.w": big.clone().to(place.device)})
    amplifier.step()
    assert same_bits(model.a.w.grad.cpu(), scaled(big, 4.0))
    assert model.a.w.grad[0] == 65504.0


def test_lagged_uses_the_selection_that_stood(place: Place) -> None:
    """With one decision, at step 3: "exact" writes from step 3 on, "lagged" from step 4 on."""
    first = {}
    for timing in ("exact", "lagged"):
        model = bare(NARROW, device=place.device)
        twin = Twin(model, place, timing=timing, min_steps=1, refresh=3)
        stream = Stream(model)
        for step in range(1, 6):
            gradients = stream.next()
            before = {name: g.clone() for name, g in gradients.items()}
            twin.step(gradients)
            changed = not all(same_bits(before[n], p.grad) for n, p in model.named_parameters())
            if changed:
                first.setdefault(timing, step)
    assert first == {"exact": 3, "lagged": 4}


def check_quantile(place: Place, position: float) -> None:
    """The quantile of 300 scores, three of each kind in far layers, at a place in their order."""
    count = 300
    kinds = [i * 7 % count // 3 for i in range(count)]
    model = bare({f"m{i}.w": (2,) for i in range(count)}, device=place.device)
    sizes = [2.0 ** (kind / 16) for kind in kinds]
    put(
        model,
        {
            f"m{i}.w": torch.tensor([size, -size], device=place.device)
            for i, size in enumerate(sizes)
        },
    )
    amplifier = place.amplifier(
        model,
        measure="variance",
        threshold="quantile",
        quantile=position / (count - 1),
        min_steps=1,
        refresh=1,
    )
    amplifier.step()
    report = amplifier.report()
    scores = sorted(layer.score for layer in report.layers)
    low, high = scores[int(position)], scores[int(position) + 1]
    assert report.threshold == pytest.approx(low + position % 1 * (high - low), abs=1e-9)


@pytest.mark.parametrize("position", [147.5, 148.5, 149.5, 298.5])
def test_quantiles_of_many_scores(place: Place, position: float) -> None:
    """Between equal ones, and between those of layers that are far from each other."""
    check_quantile(place, position)


def test_selection_stands_between_decisions(place: Place) -> None:
    model = bare(NARROW, device=place.device)
    twin = Twin(model, place, min_steps=2, refresh=4, decay=0.3)
    stream, decided = Stream(model), []
    for _ in range(13):
        twin.step(stream.next())
        decided.append(twin.amplifier.report().threshold)
    assert all(tau != tau for tau in decided[:3])
    assert decided[3:7] == [decided[3]] * 4
    assert decided[7:11] == [decided[7]] * 4
    assert len({decided[3], decided[7], decided[11]}) == 3


def test_no_layer_is_eligible_before_min_steps(place: Place) -> None:
    model = bare(NARROW, device=place.device)
    twin = Twin(model, place, min_steps=5, refresh=1, threshold=1e9)
    stream = Stream(model)
    for step in range(1, 7):
        twin.step(stream.next())
        chosen = [layer.selected for layer in twin.amplifier.report().layers]
        assert any(chosen) == (step >= 5)
        assert twin.amplifier.report().threshold == 1e9


def test_layers_that_come_and_go(place: Place) -> None:
    """A layer absent for some steps keeps its state, counts as eligible and is not written."""
    model = bare(NARROW, device=place.device)
    twin = Twin(model, place, min_steps=2, refresh=1, decay=None)
    stream = Stream(model)
    for step in range(9):
        gradients = stream.next()
        if step % 3 == 1:
            gradients = {n: g for n, g in gradients.items() if not n.startswith("body.0")}
        if step % 4 == 2:
            del gradients["head.bias"]  # half of a layer
        twin.step(gradients)


def test_elements_without_number(place: Place) -> None:
    """0-element gradients take no part, wherever they stand."""
    shapes = {"a.w": (0,), "b.w": (9,), "b.v": (0, 4), "c.w": (3, 0), "d.w": (33,), "e.w": (0,)}
    model = bare(shapes, device=place.device)
    twin = Twin(model, place, min_steps=1, refresh=1)
    run(twin, 4)
    steps = {layer.name: layer.steps for layer in twin.amplifier.report().layers}
    assert steps == {"a": 0, "b": 4, "c": 0, "d": 4, "e": 0}


def test_zero_gradients(place: Place) -> None:
    """No variance, no power, no direction: no score, hence never selected."""
    for measure in ("fluctuation", "variance"):
        model = bare({"a.w": (64,), "b.w": (64,)}, device=place.device)
        twin = Twin(model, place, measure=measure, min_steps=1, refresh=1, threshold=1e3)
        for _ in range(4):
            gradients = Stream(model, seed=4).next()
            gradients["a.w"].zero_()
            twin.step(gradients)
        first, second = twin.amplifier.report().layers
        assert not first.selected
        assert second.selected


def test_zero_gradients_have_no_direction(place: Place) -> None:
    model = bare({"a.w": (64,), "b.w": (64,)}, device=place.device)
    twin = Twin(model, place, measure="direction", min_steps=1, refresh=1)
    for _ in range(4):
        gradients = Stream(model, seed=4).next()
        gradients["a.w"].zero_()
        twin.step(gradients)
    assert twin.amplifier.report().layers[0].direction == 0


@pytest.mark.parametrize("threshold", ["mean", "std", "quantile"])
@pytest.mark.parametrize("select", ["below", "above"])
def test_a_single_layer_is_its_own_threshold(place: Place, select: str, threshold: str) -> None:
    """The comparison is strict."""
    model = bare({"a.w": (50,)}, device=place.device)
    amplifier = place.amplifier(model, threshold=threshold, select=select, **QUICK)
    stream = Stream(model)
    for _ in range(4):
        put(model, stream.next())
        amplifier.step()
    report = amplifier.report()
    assert report.threshold == report.layers[0].score
    assert not report.layers[0].selected


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("timing", ["lagged", "exact"])
def test_epoch_refresh(place: Place, decay: float | None, timing: str) -> None:
    model = bare(NARROW, device=place.device)
    twin = Twin(model, place, refresh="epoch", decay=decay, timing=timing, min_steps=2)
    stream = Stream(model)
    for epoch in range(3):
        twin.set_epoch(epoch)
        k = twin.amplifier.report().layers[0].steps if epoch else 0
        assert k == (0 if decay is None else 4 * epoch)
        for _ in range(4):
            twin.set_epoch(epoch)  # the same epoch again: nothing happens
            twin.step(stream.next())
    assert any(layer.selected for layer in twin.amplifier.report().layers)


def test_measures_ignore_a_common_factor(place: Place) -> None:
    """Scores stay when all gradients are multiplied by one constant; ln V moves alike for all."""
    for measure in ("fluctuation", "direction", "variance"):
        scores = []
        for constant in (1.0, 1024.0):
            model = bare(NARROW, device=place.device)
            amplifier = place.amplifier(model, measure=measure, min_steps=100)
            stream = Stream(model)
            for _ in range(4):
                put(model, {n: g * constant for n, g in stream.next().items()})
                amplifier.step()
            layers = [layer for layer in amplifier.report().layers if layer.name != ""]
            scores.append(torch.tensor([layer.score for layer in layers], dtype=torch.float64))
        shift = 2 * torch.tensor(1024.0).log().double() if measure == "variance" else 0.0
        torch.testing.assert_close(scores[1] - shift, scores[0], rtol=1e-6, atol=1e-6)


def test_readings_of_the_scores(place: Place) -> None:
    """Steady layers score below 0, oscillating ones above, uncorrelated ones near 0."""
    model = bare({"steady.w": (4096,), "random.w": (4096,), "flip.w": (4096,)}, device=place.device)
    amplifier = place.amplifier(model)
    stream = Stream(model)
    base = stream.draw(model.steady.w).float().to(place.device)
    for step in range(40):
        noise = stream.draw(model.steady.w).float().to(place.device)
        put(model, {"steady.w": base.clone(), "random.w": noise, "flip.w": base * (-1) ** step})
        amplifier.step()
    steady, random, flip = amplifier.report().layers
    assert steady.fluctuation < -3
    assert abs(random.fluctuation) < 0.2
    assert flip.fluctuation > 2
    assert abs(random.direction) < 0.2
    assert abs(steady.direction) > 0.999
    assert steady.direction * flip.direction < -0.99
