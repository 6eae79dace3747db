"""Accelerate, by the recipe of docs/integrations.md, against the same training written out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import (
    EPOCHS,
    OPTIONS,
    batches,
    by_hand,
    check_fused,
    in_two_ways,
    loss_of,
    make_loader,
    make_model,
    make_optimizer,
    make_scaler,
    same,
    weights,
)
from torch import Tensor

from gradamp_fast import Amplifier

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def _forget_the_last_accelerator() -> Iterator[None]:
    """Accelerators share their state; each test begins with its own."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Training:
    """What stands before the loop."""

    def __init__(self, attach: bool = True, accumulate: int = 1, **options: Any) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = make_model()
        self.model, self.optimizer, self.data = self.accelerator.prepare(
            model, make_optimizer(model), make_loader()
        )
        self.amplifier = Amplifier(self.model, **{**OPTIONS, **options})
        if attach:
            self.amplifier.attach(self.optimizer)
        self.accelerator.register_for_checkpointing(self.amplifier)

    def run(self, first: int = 0, stop: int = EPOCHS, how: str = "") -> list[Tensor]:
        """Epochs of it; ``how`` says what stands between backward and step."""
        for epoch in range(first, stop):
            self.amplifier.set_epoch(epoch)
            for x, y in self.data:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(loss_of(self.model, x, y))
                    if how == "everywhere" or (how == "synced" and self.accelerator.sync_gradients):
                        self.amplifier.step()
                    if how and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        return weights(self.model)


@in_two_ways
def test_attached(accumulate: int, norm: dict[str, float]) -> None:
    training = Training(accumulate=accumulate, **norm)
    assert same(training.run(), by_hand(accumulate=accumulate, **norm))
    assert training.amplifier.report().steps == EPOCHS * 6 // accumulate


def test_called_where_gradients_are_synchronised() -> None:
    expected = by_hand(accumulate=2, clip=0.5)
    assert same(Training(attach=False, accumulate=2).run(how="synced"), expected)


def test_called_for_each_micro_batch_it_is_wrong() -> None:
    found = Training(attach=False, accumulate=2).run(how="everywhere")
    assert not same(found, by_hand(accumulate=2, clip=0.5))


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    first = Training()
    first.run(stop=2)
    first.accelerator.save_state(tmp_path)
    for forget in (False, True):
        AcceleratorState._reset_state(True)
        second = Training()
        second.accelerator.load_state(tmp_path)
        if forget:
            second.amplifier.reset()
        assert same(second.run(first=2), by_hand()) != forget


@pytest.mark.parametrize("fused", [False, True])
def test_half_precision(fused: bool) -> None:
    """Accelerate's optimizer unscales within its step, and leaves out those that overflow."""
    Accelerator(cpu=True)
    model, scaler = make_model(), make_scaler()
    optimizer = AcceleratedOptimizer(make_optimizer(model, fused=fused), scaler=scaler)
    amplifier = Amplifier(model, **OPTIONS)
    amplifier.attach(optimizer)
    left_out = 0
    for x, y in batches(amplifier):
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, x, y)
        scaler.scale(loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        left_out += optimizer.step_was_skipped
    if fused:
        check_fused(model, amplifier)
    else:
        report = amplifier.report()
        assert left_out > 0
        assert same(weights(model), by_hand(half=True))
        assert (report.steps, report.skipped_steps) == (EPOCHS * 6 - left_out, 0)
