"""timm, by the recipe of docs/integrations.md: its scaler, its clipping, its optimizers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from stacks import (
    OPTIONS,
    batches,
    by_hand,
    in_two_ways,
    loss_of,
    make_data,
    make_model,
    make_optimizer,
    make_scaler,
    same,
    weights,
)
from torch import Tensor, nn

from gradamp_fast import Amplifier

pytest.importorskip("timm")
from timm.optim import create_optimizer_v2, list_optimizers
from timm.optim.lookahead import Lookahead
from timm.utils import NativeScaler, dispatch_clip_grad


def run(*, half: bool = True, accumulate: int = 1, mode: str = "", **options: Any) -> list[Tensor]:
    """timm's loop with an attached amplifier; ``mode`` is how timm clips."""
    model = make_model()
    optimizer = make_optimizer(model)
    amplifier = Amplifier(model, **{**OPTIONS, **options})
    amplifier.attach(optimizer)
    scaler = NativeScaler(device="cpu")
    scaler._scaler = make_scaler() if half else torch.amp.GradScaler("cpu", enabled=False)
    clipping = {"clip_grad": 0.02, "clip_mode": mode, "parameters": list(model.parameters())}
    for index, (x, y) in enumerate(batches(amplifier), 1):
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = loss_of(model, x, y)
        update = index % accumulate == 0
        scaler(loss / accumulate, optimizer, need_update=update, **(clipping if mode else {}))
        if update:
            optimizer.zero_grad()
    return weights(model)


def by_hand_with_agc(agc_first: bool) -> list[Tensor]:
    model = make_model()
    optimizer = make_optimizer(model)
    amplifier = Amplifier(model, **OPTIONS)
    for x, y in batches(amplifier):
        loss_of(model, x, y).backward()
        if not agc_first:
            amplifier.step()
        dispatch_clip_grad(model.parameters(), 0.02, mode="agc")
        if agc_first:
            amplifier.step()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


@in_two_ways
def test_native_scaler(accumulate: int, norm: dict[str, float]) -> None:
    found = run(accumulate=accumulate, **norm)
    assert same(found, by_hand(half=True, accumulate=accumulate, **norm))


def test_the_scalers_norm_clipping_comes_before() -> None:
    found = run(half=False, mode="norm")
    assert not same(found, by_hand(clip=0.02))


def test_attached_amplification_follows_adaptive_clipping() -> None:
    """In the other order the clipping takes away again what was amplified."""
    assert same(run(half=False, mode="agc"), by_hand_with_agc(agc_first=True))
    assert not same(by_hand_with_agc(agc_first=False), by_hand_with_agc(agc_first=True))


def test_lookahead_is_attached_to_what_it_wraps() -> None:
    """Its own step calls no hooks."""
    model = make_model()
    optimizer = Lookahead(make_optimizer(model))
    amplifier = Amplifier(model)
    amplifier.attach(optimizer)
    for _ in range(3):
        loss_of(model, *make_data()).backward()
        optimizer.step()
    assert amplifier.report().steps == 3


# ---- which of timm's optimizers divide a constant factor out ------------------------


def moved(name: str, factor: float) -> tuple[torch.optim.Optimizer, float]:
    """How far an optimizer moves a matrix when it has got used to gradients of one size."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 6, bias=False)
    optimizer = create_optimizer_v2(layer, opt=name, lr=1e-2, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(1)
    for step in range(200):
        if step == 150:
            before = layer.weight.detach().clone()
        layer.weight.grad = factor * (torch.randn(6, 6, generator=generator) + 0.1)
        optimizer.step()
    return optimizer, float((layer.weight.detach() - before).norm())


def kinds() -> list[str]:
    """One name of each class; not those that need a GPU or second derivatives."""
    layer, found = nn.Linear(6, 6, bias=False), {}
    for name in list_optimizers(exclude_filters=["bnb*", "fused*", "adahessian"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some recommend other packages
            found.setdefault(type(create_optimizer_v2(layer, opt=name, lr=1e-2)), name)
    return list(found.values())


@pytest.mark.filterwarnings("ignore:.*opt_einsum")
@pytest.mark.parametrize("name", kinds())
def test_whoever_divides_a_factor_out_is_warned_of(name: str) -> None:
    with torch.compiler.set_stance("force_eager"):
        optimizer, once = moved(name, 1.0)
        _, amplified = moved(name, 4.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = nn.Linear(6, 6, bias=False)
        optimizer.add_param_group({"params": layer.parameters()})
        Amplifier(layer).attach(optimizer)
    invariant = abs(amplified / once - 1) < 0.05
    assert invariant == any("divides out" in str(w.message) for w in caught)
