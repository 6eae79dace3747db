"""One small training, written out, that every training stack has to equal bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import same_bits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradamp_fast import Amplifier, Schedule

# Layers, steps and epochs differ in what happens to them, and so would every mistake.
OPTIONS: dict[str, Any] = {
    "factor": 4.0,
    "decay": 0.9,
    "min_steps": 2,
    "refresh": 2,
    "schedule": Schedule([(0, 1), (2, 3, 3.0), (3, 4)], unit="epoch"),
}
EPOCHS, BATCH = 4, 4

# As it is; and with all that a stack can put between backward and step.
in_two_ways = pytest.mark.parametrize(
    ("accumulate", "norm"), [(1, {}), (2, {"max_norm": 0.5})], ids=["plain", "accumulated"]
)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def make_data() -> tuple[Tensor, Tensor]:
    """Inputs [24, 6] and targets [24, 3]: six batches an epoch."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 6, generator=generator), 3 * torch.randn(24, 3, generator=generator)


def make_loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*make_data()), BATCH)


def batches(amplifier: Amplifier) -> Iterator[tuple[Tensor, Tensor]]:
    """Those of the whole training; the amplifier is told of each epoch."""
    for epoch in range(EPOCHS):
        amplifier.set_epoch(epoch)
        yield from zip(*(part.split(BATCH) for part in make_data()), strict=True)


def make_optimizer(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **options)


def make_scaler() -> torch.amp.GradScaler:
    """After every fifth step its scale grows until fp16 overflows, once or twice."""
    return torch.amp.GradScaler("cpu", init_scale=256.0, growth_factor=2048.0, growth_interval=5)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x).float(), y)


def by_hand(
    *, accumulate: int = 1, clip: float | None = None, half: bool = False, **options: Any
) -> list[Tensor]:
    """Weights after the training with every call in its place.

    ``clip`` is torch's and comes last; ``half`` is fp16 autocast with a GradScaler.
    """
    model = make_model()
    optimizer = make_optimizer(model)
    scaler = make_scaler() if half else torch.amp.GradScaler("cpu", enabled=False)
    amplifier = Amplifier(model, **{**OPTIONS, **options})
    for index, (x, y) in enumerate(batches(amplifier), 1):
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = loss_of(model, x, y)
        scaler.scale(loss / accumulate).backward()
        if index % accumulate == 0:
            scaler.unscale_(optimizer)
            amplifier.step()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return weights(model)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def check_fused(model: nn.Module, amplifier: Amplifier) -> None:
    """A fused optimizer unscales within its step: the same training but for rounding.

    The amplifier's step is what skips an overflow there.
    """
    for mine, theirs in zip(weights(model), by_hand(half=True), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    report = amplifier.report()
    assert 0 < report.skipped_steps < report.steps
