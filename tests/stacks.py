"""One small training, written out, that every training stack has to equal bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from cases import same_bits
from torch import Tensor, nn

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


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def make_data() -> tuple[Tensor, Tensor]:
    """Inputs [24, 6] and targets [24, 3]: six batches an epoch."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 6, generator=generator), 3 * torch.randn(24, 3, generator=generator)


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
    batches = list(zip(*(part.split(BATCH) for part in make_data()), strict=True))
    for epoch in range(EPOCHS):
        amplifier.set_epoch(epoch)
        for index, (x, y) in enumerate(batches, 1):
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
