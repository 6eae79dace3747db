"""One training that does it all at once: AMP, two optimizers, a growing model, DCP, closures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as checkpoints
from cases import Place
from factors import LAGGED
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import gradamp_fast
from gradamp_fast import Amplifier

STEPS, GROWS_AT, SAVES_AT, RATE = 12, 4, 7, 0.05
OPTIONS: dict[str, Any] = {"measure": "direction", "min_steps": 2, "refresh": 2, "decay": 0.9}


class Network(nn.Module):
    """A body that gains a block in mid-run, and a head with an optimizer of its own."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleList(nn.Linear(6, 6) for _ in range(blocks))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body:
            x = block(x).tanh()
        return self.head(x)


class Training:
    """Everything that a checkpoint has to bring back."""

    def __init__(self, place: Place, door: str, blocks: int, **options: Any) -> None:
        self.place = place
        self.model = Network(blocks).to(place.device)
        self.body = torch.optim.SGD(self.model.body.parameters(), lr=RATE, momentum=0.9)
        self.head = torch.optim.SGD(self.model.head.parameters(), lr=RATE, momentum=0.5)
        self.amplifier: Amplifier = place.amplifier(self.model, **options)
        if door == "attach":
            self.scaler = torch.amp.GradScaler(place.device, init_scale=1024.0)
            for optimizer in (self.body, self.head):
                self.amplifier.attach(optimizer)
        else:
            self.scaler = gradamp_fast.GradScaler(self.amplifier, place.device, init_scale=1024.0)
        self.scaler.scale(torch.ones((), device=place.device))
        self.factors: list[dict[str, float]] = []

    def loss(self, step: int) -> Tensor:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(self.place.device)
        with torch.autocast(self.place.device, torch.bfloat16):
            out = self.model(x)
        return (out.float() - x[:, :3]).square().mean()

    def grow(self) -> None:
        block = nn.Linear(6, 6).to(self.place.device)
        nn.init.eye_(block.weight)
        nn.init.zeros_(block.bias)
        self.model.body.append(block)
        self.body.add_param_group({"params": block.parameters()})

    def step(self, number: int) -> None:
        if number == GROWS_AT:
            self.grow()
        for optimizer in (self.body, self.head):
            optimizer.zero_grad()
        named = dict(self.model.named_parameters())
        raw = dict(
            zip(named, torch.autograd.grad(self.loss(number), [*named.values()]), strict=True)
        )
        self.scaler.scale(self.loss(number)).backward()
        self.scaler.step(self.body)
        self.scaler.step(self.head)
        self.scaler.update()
        self.factors.append(
            {n: round(float((p.grad / raw[n]).median()), 3) for n, p in named.items()}
        )

    def save(self, folder: Path) -> None:
        """Optimizers by torch's distributed checkpoint, which makes their state by a step."""
        model, optimizers = get_state_dict(self.model, [self.body, self.head])
        checkpoints.save({"model": model, "optimizers": optimizers}, checkpoint_id=folder)
        rest = {"amplifier": self.amplifier.state_dict(), "scaler": self.scaler.state_dict()}
        torch.save(rest, folder / "rest.pt")

    def load(self, folder: Path) -> None:
        model, optimizers = get_state_dict(self.model, [self.body, self.head])
        stored = {"model": model, "optimizers": optimizers}
        checkpoints.load(stored, checkpoint_id=folder)
        set_state_dict(
            self.model,
            [self.body, self.head],
            model_state_dict=stored["model"],
            optim_state_dict=stored["optimizers"],
        )
        rest = torch.load(folder / "rest.pt", weights_only=True)
        self.amplifier.load_state_dict(rest["amplifier"])
        self.scaler.load_state_dict(rest["scaler"])


def run(place: Place, door: str, options: dict[str, Any], folder: Path | None = None) -> Training:
    training = Training(place, door, 2, **options)
    for number in range(STEPS):
        if folder is not None and number == SAVES_AT:
            training.save(folder)
            training = Training(place, door, 2, **options)
            training.grow()  # optimizers are loaded with the groups that they were saved with
            training.load(folder)
        training.step(number)
    return training


both_doors = pytest.mark.parametrize("door", ["scaler", "attach"])


@pytest.mark.filterwarnings("ignore:.*torch.distributed is")
@both_doors
@pytest.mark.parametrize("options", [OPTIONS, LAGGED], ids=["direction", "random"])
def test_a_resumed_run_is_the_run(
    place: Place, tmp_path: Path, options: dict[str, Any], door: str
) -> None:
    whole, resumed = run(place, door, options), run(place, door, options, tmp_path)
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert whole.amplifier.report() == resumed.amplifier.report()
    assert whole.factors[SAVES_AT:] == resumed.factors


@both_doors
def test_every_step_amplifies_what_is_selected(place: Place, door: str) -> None:
    """From its second step on everything; one step counts for both optimizers."""
    training = run(place, door, LAGGED)
    assert training.amplifier.report().steps == STEPS
    for number, found in enumerate(training.factors):
        new = {"body.2.weight", "body.2.bias"} if number == GROWS_AT else set()
        expected = {n: 1.0 if number == 0 or n in new else 2.0 for n in found}
        assert found == pytest.approx(expected, rel=1e-2), number


def test_a_last_phase_with_closures(place: Place) -> None:
    """LBFGS polishes the head of the trained model, after its optimizers are gone."""
    training = run(place, "scaler", LAGGED)
    model, amplifier = training.model, training.amplifier
    model.body.requires_grad_(False)
    polish = torch.optim.LBFGS(
        model.head.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe"
    )
    amplifier.attach(polish)
    before, calls, losses = amplifier.report().steps, 0, []

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        polish.zero_grad()
        loss = training.loss(99)
        loss.backward()
        losses.append(float(loss))
        return loss

    for _ in range(2):
        polish.step(closure)
    # The first call belongs to the round that the optimizers of before began.
    assert amplifier.report().steps - before == calls - 1
    assert losses[-1] < losses[0]
    assert all(p.grad is None or not p.requires_grad for p in model.body.parameters())
