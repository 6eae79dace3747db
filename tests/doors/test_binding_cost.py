"""What is bound is kept up with without a walk of the model in every step."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch
from cases import Place, bare
from factors import sgd

LAYERS = 600


def timed(step: Callable[[], None], before: Callable[[], None], count: int) -> float:
    """Median time of a step."""
    times = []
    for _ in range(count):
        before()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return sorted(times)[count // 2]


@pytest.mark.parametrize("door", ["step", "attach"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_tenth_without_gradients(backend: str, door: str) -> None:
    """Others each time: at most twice the usual step."""
    place = Place(backend, "cpu")
    model = bare({f"l{i}.w": (3,) for i in range(LAYERS)})
    amplifier = place.amplifier(model, min_steps=2, refresh=2)
    optimizer = sgd(model.parameters(), foreach=True)
    if door == "attach":
        amplifier.attach(optimizer)
    run = amplifier.step if door == "step" else optimizer.step
    parameters = list(model.parameters())
    gradients = [torch.ones_like(p) for p in parameters]
    generator = random.Random(0)

    def all_of_them() -> None:
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g

    def nine_tenths() -> None:
        all_of_them()
        for index in generator.sample(range(LAYERS), LAYERS // 10):
            parameters[index].grad = None

    count = 5 if backend == "torch" else 15
    for _ in range(3):
        usual, partial = timed(run, all_of_them, count), timed(run, nine_tenths, count)
        if partial <= 2 * usual:
            return
    pytest.fail(f"a step took {partial * 1e3:.2f} ms instead of {usual * 1e3:.2f} ms")


class Counting(torch.nn.Module):
    """Counts how often it is walked."""

    walks = 0

    def named_modules(self, *args: object, **kwargs: object):  # type: ignore[override,no-untyped-def]
        type(self).walks += 1
        return super().named_modules(*args, **kwargs)  # type: ignore[arg-type]


def test_walks_are_rare(place: Place) -> None:
    """A step whose gradients come and go walks the model once in a hundred steps, not each time."""
    model = Counting()
    for index in range(10):
        model.add_module(f"l{index}", torch.nn.Linear(2, 2, device=place.device))
    amplifier = place.amplifier(model)
    optimizer = sgd(model.parameters())
    amplifier.attach(optimizer)
    parameters = list(model.parameters())
    for step in range(30):
        for index, p in enumerate(parameters):
            p.grad = None if (index + step) % 7 == 0 else torch.ones_like(p)
        optimizer.step()
        if step == 9:
            settled = Counting.walks
    assert Counting.walks - settled <= 2
