"""The controls of the experiments: layers selected at random, and a choice that is shuffled."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from cases import Place, Stream, bare, put
from torch import nn

from bench.accuracy import controls
from gradamp_fast import Amplifier, reference

QUICK = {"min_steps": 1, "refresh": 1, "decay": 0.5}
MANY = {f"m{index:02}.w": (3,) for index in range(40)}


def selections(amplifier: Amplifier, model: nn.Module, steps: int) -> list[tuple[bool, ...]]:
    """After each of the steps; the same gradients for the same number of steps."""
    stream, out = Stream(model), []
    for _ in range(steps):
        put(model, stream.next())
        amplifier.step()
        out.append(tuple(layer.selected for layer in amplifier.report().layers))
    return out


# ---- measure="random" ---------------------------------------------------------------


def drawn(place: Place, steps: int, **options: Any) -> list[tuple[bool, ...]]:
    model = bare(MANY, device=place.device)
    amplifier = place.amplifier(model, **{"measure": "random", **QUICK, **options})
    return selections(amplifier, model, steps)


def test_a_quantile_is_the_share_that_is_drawn(place: Place) -> None:
    """Of 40 layers those below the 0.25 quantile: rank 9.75 of 39, so ten, anew each time."""
    chosen = drawn(place, 6, threshold="quantile", quantile=0.25)
    assert [sum(row) for row in chosen] == [10] * 6
    assert len(set(chosen)) == 6


def test_the_seed_says_which(place: Place) -> None:
    runs = [drawn(place, 3, threshold=0.5, **given) for given in ({}, {"seed": 0}, {"seed": 1})]
    assert runs[0] == runs[1] != runs[2]


def test_the_draw_stands_between_decisions(place: Place) -> None:
    model = bare(MANY, device=place.device)
    amplifier = place.amplifier(model, measure="random", min_steps=1, refresh=3, threshold=0.5)
    stream = Stream(model)
    for step in range(1, 10):
        put(model, stream.next())
        amplifier.step()
        report = amplifier.report()
        below = [layer.score < report.threshold for layer in report.layers]
        assert [layer.selected for layer in report.layers] == (below if step >= 3 else [False] * 40)


def test_draws_are_uniform_and_independent() -> None:
    """Of 400 layers over 500 decisions: each within five standard deviations of what it must be."""
    for seed in (0, 1, 2**32 - 1):
        numbers = torch.arange(1, 501, dtype=torch.float64)
        draws = torch.stack([reference.draws(400, seed, number) for number in numbers])
        assert draws.min() > 0
        assert draws.max() < 1
        low = (draws < 0.25).double()
        deviation = (0.25 * 0.75) ** 0.5
        for axis in (0, 1):
            count = draws.shape[axis]
            assert (low.mean(axis) - 0.25).abs().max() < 5 * deviation / count**0.5
        centred = draws - draws.mean()
        for left, right in (
            (centred[:-1], centred[1:]),
            (centred[:, :-1], centred[:, 1:]),
            (centred[:-1, 1:], centred[1:, :-1]),
        ):
            correlation = (left * right).mean() / centred.square().mean()
            assert correlation.abs() < 5 / left.numel() ** 0.5


def test_a_resumed_run_draws_on(place: Place) -> None:
    options = {"measure": "random", "threshold": 0.5, "seed": 3, **QUICK}
    model = bare(MANY, device=place.device)
    whole = selections(place.amplifier(model, **options), model, 6)
    model = bare(MANY, device=place.device)
    first = place.amplifier(model, **options)
    selections(first, model, 4)
    stored = first.state_dict()
    del first
    second = place.amplifier(model, **options)
    second.load_state_dict(stored)
    assert selections(second, model, 2) == whole[4:]


# ---- one factor, and equal doses ----------------------------------------------------


def test_one_factor_is_one_layer(place: Place) -> None:
    model = network().to(place.device)
    amplifier = controls.make(model, {"backend": place.backend, "grow": True, "one_factor": True})
    put(model, Stream(model).next())
    amplifier.step()
    (layer,) = amplifier.report().layers
    assert layer.numel == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("select", ["below", "above"])
def test_a_dose_is_of_elements_by_score(place: Place, select: str) -> None:
    """Linear layers have 12 elements and norms 6: 192 in all, of which 80, or 84 with the slack."""
    model = network().to(place.device)
    options = {"backend": place.backend, "measure": "direction", "select": select, **QUICK}
    amplifier, stream = controls.make(model, options | {"dose": 80 / 192}), Stream(model)
    for _ in range(4):
        put(model, stream.next())
        amplifier.step()
    layers = amplifier.report().layers
    sign = -1 if select == "below" else 1  # the steadiest have the highest direction
    wanted, left = set(), 84
    for layer in sorted(layers, key=lambda layer: sign * layer.direction):
        if layer.numel <= left:
            wanted.add(layer.name)
            left -= layer.numel
    assert {layer.name for layer in layers if layer.selected} == wanted
    assert sum(layer.numel for layer in layers if layer.selected) == 84


def test_a_dose_waits_until_layers_may_be_selected(place: Place) -> None:
    model = network().to(place.device)
    options = {"backend": place.backend, "dose": 0.5, "min_steps": 5, "refresh": 2}
    seen = selections(controls.make(model, options), model, 6)
    assert not any(any(chosen) for chosen in seen[:2])
    assert any(seen[-1])


# ---- shuffled -----------------------------------------------------------------------


def network() -> nn.Module:
    """Twelve linear layers, eight norms."""
    return nn.Sequential(
        *(nn.Linear(3, 3) for _ in range(12)), *(nn.LayerNorm(3) for _ in range(8))
    )


def per_type(model: nn.Module, selected: tuple[bool, ...]) -> Counter[str]:
    return Counter(
        type(module).__name__ for module, chosen in zip(model, selected, strict=True) if chosen
    )


def test_as_many_of_each_type_but_others(place: Place) -> None:
    model = network().to(place.device)
    options = {"backend": place.backend, "threshold": "quantile", "quantile": 0.4, **QUICK}
    chosen = selections(controls.make(model, options), model, 8)
    shuffled = selections(controls.make(model, options | {"shuffle": 5}), model, 8)
    assert [per_type(model, a) for a in chosen] == [per_type(model, b) for b in shuffled]
    assert sum(a != b for a, b in zip(chosen, shuffled, strict=True)) >= 6
    assert shuffled == selections(controls.make(model, options | {"shuffle": 5}), model, 8)
    assert shuffled != selections(controls.make(model, options | {"shuffle": 6}), model, 8)


def test_what_is_multiplied_is_what_was_shuffled(place: Place) -> None:
    model = network().to(place.device)
    options = {"backend": place.backend, "threshold": "quantile", "quantile": 0.4, **QUICK}
    amplifier, stream = controls.make(model, options | {"shuffle": 5}), Stream(model)
    selected = [False] * len(model)
    for _ in range(5):
        given = stream.next()
        put(model, {name: gradient.clone() for name, gradient in given.items()})
        amplifier.step()
        for name, parameter in model.named_parameters():
            factor = 2.0 if selected[int(name.partition(".")[0])] else 1.0
            assert torch.equal(parameter.grad, given[name] * factor)
        selected = [layer.selected for layer in amplifier.report().layers]
    assert any(selected)


def test_a_shuffled_choice_stands_until_the_next(place: Place) -> None:
    """Skipped steps count neither as steps nor as decisions."""
    model = network().to(place.device)
    options = {"backend": place.backend, "min_steps": 1, "refresh": 3, "shuffle": 0}
    amplifier, stream = controls.make(model, options), Stream(model)
    seen = []
    for step in range(12):
        gradients = stream.next()
        if step in (3, 4, 7):
            gradients["0.weight"][0, 0] = torch.nan
        put(model, gradients)
        amplifier.step()
        seen.append(tuple(layer.selected for layer in amplifier.report().layers))
    assert seen[2] == seen[3] == seen[4] == seen[5] == seen[6] == seen[7]
    assert seen[8] == seen[9] == seen[10]
    assert len({seen[1], seen[2], seen[8], seen[11]}) == 4


def test_epochs_are_shuffled(place: Place) -> None:
    for decay in (None, 0.9):
        rows = {}
        for shuffle in (None, 1):
            model = network().to(place.device)
            options = {"backend": place.backend, "min_steps": 1, "refresh": "epoch", "decay": decay}
            if shuffle is not None:
                options["shuffle"] = shuffle
            amplifier, stream, rows[shuffle] = controls.make(model, options), Stream(model), []
            for epoch in range(4):
                amplifier.set_epoch(epoch)
                for _ in range(3):
                    put(model, stream.next())
                    amplifier.set_epoch(epoch)
                    amplifier.step()
                layers = amplifier.report().layers
                rows[shuffle].append(tuple(layer.selected for layer in layers))
        plain, shuffled = rows[None], rows[1]
        assert [per_type(model, a) for a in plain] == [per_type(model, b) for b in shuffled]
        assert plain[1:] != shuffled[1:]


@pytest.mark.parametrize("options", [{"timing": "exact"}, {"group_by": "tensor"}], ids=str)
def test_what_cannot_be_shuffled(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="shuffle"):
        controls.make(network(), {"shuffle": 0, **options})
