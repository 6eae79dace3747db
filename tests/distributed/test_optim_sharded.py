"""The fused optimizers over DTensors: what one process with the whole model makes of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
from distributed import run
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gradamp_fast import Amplifier, optim

if not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

QUICK: dict[str, Any] = {"measure": "direction", "min_steps": 2, "refresh": 2, "decay": 0.9}
WAYS: list[dict[str, Any]] = [
    {},
    {"timing": "exact", "factor": 4.0},
    {"max_norm": 0.05},
    {"match_norm": True, "exclude": ["2.*"]},
    {"grow": True, "refresh": 1},
]
KINDS: list[tuple[Any, dict[str, Any]]] = [
    (optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    (optim.AdamW, {"lr": 0.01}),
]


def make_model() -> nn.Sequential:
    """The last layer's bias has no elements in the second of two processes."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 16), nn.Linear(16, 1)).double()


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 24, generator=generator, dtype=torch.float64)


def train(model: nn.Module, optimizer: Any, rank: int, processes: int, steps: range) -> None:
    each = 16 // processes
    for step in steps:
        optimizer.zero_grad()
        here = batch(step)[each * rank : each * (rank + 1)]
        (model(here) - here[:, :1]).square().mean().backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(model: nn.Module, optimizer: Any, amplifier: Amplifier, alone: Any) -> None:
    other, its_optimizer, its_amplifier = alone
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(whole(p.detach()), q.detach(), rtol=1e-6, atol=1e-9)
        state, expected = optimizer.state[p], its_optimizer.state[q]
        assert state.keys() == expected.keys()
        for key, value in state.items():
            assert isinstance(value, DTensor) == (isinstance(p, DTensor) and key != "step")
            torch.testing.assert_close(whole(value), expected[key], rtol=1e-6, atol=1e-9)
    reports = amplifier.report(), its_amplifier.report()
    for mine, theirs in zip(*(report.layers for report in reports), strict=True):
        assert (mine.name, mine.steps, mine.acts_on) == (theirs.name, theirs.steps, theirs.acts_on)
        assert (mine.selected, mine.factor) == (theirs.selected, theirs.factor)


def several(rank: int, processes: int, backend: str, wrap: str) -> int:
    os.environ["GRADAMP_BACKEND"] = backend
    acted = 0
    for kind, given in KINDS:
        for options in WAYS:
            alone, model = make_model(), make_model()
            if wrap == "fsdp":
                fully_shard(model)
                module: nn.Module = model
            else:
                module = DistributedDataParallel(model)
            made = []
            for m in (alone, module):
                optimizer = kind(m.parameters(), **given)
                amplifier = Amplifier(m, **{**QUICK, **options}, backend=backend)
                amplifier.attach(optimizer)
                made.append((optimizer, amplifier))
            train(alone, made[0][0], 0, 1, range(7))
            train(module, made[1][0], rank, processes, range(7))
            compare(model, *made[1], (alone, *made[0]))
            acted += any(layer.selected for layer in made[0][1].report().layers)
    return acted


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("wrap", ["fsdp", "ddp"])
def test_equal_to_one_process(backend: str, wrap: str, tmp_path: Path) -> None:
    acted = run(several, 2, tmp_path, 2, backend, wrap)
    assert acted[0] == acted[1] > 4


def stored(rank: int, processes: int, folder: str) -> None:
    """Through torch.distributed.checkpoint in mid-run, bit for bit, and without an amplifier."""
    for number, (kind, given) in enumerate(KINDS):
        for amplified in (True, False):
            results = []
            for resumes in (False, True):
                model = fully_shard(make_model())
                optimizer = kind(model.parameters(), **given)
                amplifier = Amplifier(model, **QUICK, timing="exact")
                if amplified:
                    amplifier.attach(optimizer)
                train(model, optimizer, rank, processes, range(4))
                if resumes:
                    where = f"{folder}/{number}{amplified}"
                    before, of_optimizer = get_state_dict(model, optimizer)
                    checkpoints.save(
                        {"model": before, "optimizer": of_optimizer}, checkpoint_id=where
                    )
                    kept = amplifier.state_dict()
                    model = fully_shard(make_model())
                    optimizer = kind(model.parameters(), **given)
                    del amplifier
                    amplifier = Amplifier(model, **QUICK, timing="exact")
                    if amplified:
                        amplifier.attach(optimizer)
                    before, of_optimizer = get_state_dict(model, optimizer)
                    found = {"model": before, "optimizer": of_optimizer}
                    checkpoints.load(found, checkpoint_id=where)
                    set_state_dict(
                        model,
                        optimizer,
                        model_state_dict=found["model"],
                        optim_state_dict=found["optimizer"],
                    )
                    amplifier.load_state_dict(kept)
                train(model, optimizer, rank, processes, range(4, 7))
                results.append([whole(p.detach()) for p in model.parameters()])
            assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    run(stored, 2, tmp_path, 2, str(tmp_path))
