"""DistributedDataParallel: every process decides alike, and its gradients stay where they are."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import run, run_script
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradamp_fast
from gradamp_fast import Amplifier

if not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
QUICK: dict[str, Any] = {"min_steps": 2, "refresh": 2, "decay": 0.9}


class Branches(nn.Module):
    """Uses the branches that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(24, 200)
        self.left = nn.Linear(200, 30)
        self.right = nn.Linear(200, 30)

    def forward(self, x: Tensor, used: str = "both") -> Tensor:
        x = self.stem(x).relu()
        out = self.left(x) if used != "right" else 0.0
        return out + self.right(x) if used != "left" else out


def branches() -> Branches:
    torch.manual_seed(3)
    return Branches()


def batches(rank: int, processes: int, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """This process's, and all processes' together."""
    generator = torch.Generator().manual_seed(5)
    whole = [torch.randn(8 * processes, 24, generator=generator) for _ in range(steps)]
    return [batch[8 * rank : 8 * rank + 8] for batch in whole], whole


def backward(model: nn.Module, batch: Tensor, **used: str) -> None:
    model(batch, **used).square().mean().backward()


def places(parameter: nn.Parameter) -> tuple[int, int, tuple[int, ...]]:
    gradient = parameter.grad
    assert gradient is not None
    return gradient.untyped_storage().data_ptr(), gradient.data_ptr(), gradient.stride()


def digest(model: nn.Module, amplifier: Amplifier) -> str:
    """Of all that every process must have alike: gradients and state, bit for bit."""
    out = hashlib.sha256()
    state = amplifier.state_dict()
    for tensor in (
        *(p.grad for p in model.parameters() if p.grad is not None),
        state["state"],
        *state["sketches"].values(),
    ):
        out.update(tensor.detach().numpy().tobytes())
    return out.hexdigest()


def bucket_views(rank: int, processes: int) -> str:
    """Gradients are views of DDP's buckets, and those of one process with the whole batch."""
    model, alone = branches(), branches()
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    amplifier, single = Amplifier(parallel, **QUICK), Amplifier(alone, **QUICK)
    mine, whole = batches(rank, processes, 6)
    for batch, everything in zip(mine, whole, strict=True):
        parallel.zero_grad(set_to_none=False)
        backward(parallel, batch)
        before = [places(p) for p in model.parameters()]
        assert len({storage for storage, _, _ in before}) == 1
        amplifier.step()
        assert [places(p) for p in model.parameters()] == before
        alone.zero_grad()
        backward(alone, everything)
        single.step()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    chosen = [row.selected for row in amplifier.report().layers]
    assert chosen == [row.selected for row in single.report().layers]
    assert True in chosen
    assert False in chosen
    return digest(model, amplifier)


def accumulated(rank: int, processes: int) -> str:
    """no_sync() on all micro-batches but the last, then one step."""
    model = branches()
    parallel = DistributedDataParallel(model)
    amplifier = Amplifier(parallel, **QUICK)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    handle = amplifier.attach(optimizer)
    mine, _ = batches(rank, processes, 12)
    for first, second in zip(mine[::2], mine[1::2], strict=True):
        optimizer.zero_grad()
        with parallel.no_sync():
            backward(parallel, first)
        backward(parallel, second)
        optimizer.step()
    assert amplifier.report().steps == 6
    handle.remove()
    return digest(model, amplifier)


def unused(rank: int, processes: int) -> str:
    """A branch that some processes do not use, and one that none does."""
    model = branches()
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    amplifier = Amplifier(parallel, **QUICK)
    mine, _ = batches(rank, processes, 6)
    for step, batch in enumerate(mine):
        parallel.zero_grad()
        backward(parallel, batch, used="left" if rank or step >= 4 else "right")
        assert (model.right.weight.grad is None) == (step >= 4)
        amplifier.step()
    steps = {row.name: row.steps for row in amplifier.report().layers}
    assert steps == {"stem": 6, "left": 6, "right": 4}
    return digest(model, amplifier)


def compiled(rank: int, processes: int) -> str:
    """The drop-in sees one model, whatever is wrapped around it."""
    model = branches()
    parallel = DistributedDataParallel(torch.compile(model, backend="eager"))
    around = torch.compile(parallel, backend="eager")
    mine, _ = batches(rank, processes, 6)
    amplifiers = set()
    for step, batch in enumerate(mine):
        wrapped = (parallel, around, model)[step % 3]
        parallel.zero_grad()
        backward(parallel if wrapped is model else wrapped, batch)
        amplifiers.add(gradamp_fast.fused_amplify(wrapped, **QUICK))
    [amplifier] = amplifiers
    assert amplifier.report().steps == 6
    assert set(amplifier.state_dict()["layers"]) == {"stem", "left", "right"}
    return digest(model, amplifier)


def during_backpropagation(rank: int, processes: int) -> str:
    """placement="backward": what a process amplifies is what all of them together would."""
    options = {**QUICK, "placement": "backward", "measure_every": 2, "min_steps": 1, "refresh": 1}
    model, alone = branches(), branches()
    parallel = DistributedDataParallel(model)
    amplifier, single = Amplifier(parallel, **options), Amplifier(alone, **options)
    mine, whole = batches(rank, processes, 10)
    plain = branches()
    differing = 0
    for batch, everything in zip(mine, whole, strict=True):
        for module, x in ((parallel, batch), (alone, everything), (plain, everything)):
            module.zero_grad()
            backward(module, x)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        differing += not torch.allclose(alone.stem.weight.grad, plain.stem.weight.grad)
        amplifier.step()
        single.step()
    assert differing > 0
    return digest(model, amplifier)


def stored(rank: int, processes: int, folder: str) -> str:
    """Through torch.distributed.checkpoint, from one wrapper into another, bit for bit."""
    model, second = branches(), branches()
    parallel = DistributedDataParallel(model)
    amplifier = Amplifier(parallel, **QUICK)
    other = DistributedDataParallel(torch.compile(second, backend="eager"))
    again = Amplifier(other, **QUICK)
    mine, _ = batches(rank, processes, 6)
    for step, batch in enumerate(mine):
        parallel.zero_grad()
        backward(parallel, batch)
        if step == 3:
            dcp.save({"amplifier": amplifier}, checkpoint_id=f"{folder}/checkpoint")
            dcp.load({"amplifier": again}, checkpoint_id=f"{folder}/checkpoint")
        if step >= 3:  # DDP itself does not add up in the same order twice
            for p, q in zip(model.parameters(), second.parameters(), strict=True):
                q.grad = None if p.grad is None else p.grad.clone()
            again.step()
        amplifier.step()
    assert digest(second, again) == digest(model, amplifier)
    return digest(model, amplifier)


CHECKS = (bucket_views, accumulated, unused, compiled, during_backpropagation)


def all_checks(rank: int, processes: int, folder: str) -> dict[str, str]:
    found = {check.__name__: check(rank, processes) for check in CHECKS}
    return {**found, "stored": stored(rank, processes, folder)}


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_all_processes_have_the_same_bits(processes: int, tmp_path: Path) -> None:
    first, *others = run(all_checks, processes, tmp_path, processes, str(tmp_path))
    assert all(other == first for other in others)


def test_a_failure_in_one_process_is_told(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="only here"):
        run(failing, 2, tmp_path)


def failing(rank: int) -> None:
    assert rank == 0, "only here"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("ddp", 50), ("fsdp2", 100)])
def test_example(name: str, steps: int, tmp_path: Path) -> None:
    first, second = run_script(ROOT / "examples" / f"{name}.py", 2, tmp_path)
    assert "of 3 layers selected" in first
    assert f"{steps} steps, 0 skipped" in first
    assert second == ""
