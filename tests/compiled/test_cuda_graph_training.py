"""Whole training steps in a CUDA graph: replays train as eager steps do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Place, same_bits, why_not
from torch import Tensor, nn

from gradamp_fast import Amplifier

pytestmark = pytest.mark.gpu

PLACES = (Place("cuda", "cuda"), Place("triton", "cuda"))
QUICK = {"min_steps": 2, "refresh": 2, "decay": 0.9}
WARM, REPLAYS = 3, 8


@pytest.fixture(params=PLACES, ids=str)
def gpu(request: pytest.FixtureRequest) -> Place:
    if reason := why_not(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


class Training:
    """Static inputs, and a step over them that can be captured."""

    def __init__(self, place: Place, scaled: bool) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)]
        self.model = nn.Sequential(*layers).cuda()
        self.amplifier: Amplifier = place.amplifier(self.model, **QUICK)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, fused=scaled)
        self.inputs = torch.zeros(8, 12, device="cuda")
        self.scale = torch.full((1,), 256.0, device="cuda") if scaled else None
        self.found_inf = torch.zeros(1, device="cuda") if scaled else None
        if scaled:  # as GradScaler hands them to a fused optimizer
            self.optimizer.grad_scale = self.scale
            self.optimizer.found_inf = self.found_inf
        self.stream = torch.cuda.Stream()
        self.generator = torch.Generator().manual_seed(1)

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = (self.model(self.inputs) - self.inputs[:, :4].sin()).square().mean()
        if self.scale is not None:
            loss = loss * self.scale.squeeze()
            self.found_inf.zero_()
        loss.backward()
        self.amplifier.step(self.scale, self.found_inf, unscale=False)
        self.optimizer.step()

    def run(self, step: Callable[[], None], count: int) -> None:
        for number in range(count):
            self.inputs.copy_(torch.randn(8, 12, generator=self.generator))
            if number == 4 and self.scale is not None:
                self.inputs[0, 0] = torch.inf
            with torch.cuda.stream(self.stream):
                self.stream.wait_stream(torch.cuda.default_stream())
                step()
            torch.cuda.current_stream().wait_stream(self.stream)

    def outcome(self) -> tuple[list[Tensor], str]:
        return [p.detach().clone() for p in self.model.parameters()], repr(self.amplifier.report())


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_replays_train_as_eager_steps_do(gpu: Place, scaled: bool) -> None:
    """Inputs change between replays; with a scale one of them overflows."""
    eager, graphed = Training(gpu, scaled), Training(gpu, scaled)
    eager.run(eager.step, WARM)
    eager.run(eager.step, REPLAYS)

    graphed.run(graphed.step, WARM)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=graphed.stream):
        graphed.step()
    graphed.run(graph.replay, REPLAYS)

    assert graphed.amplifier.report().steps == WARM + REPLAYS
    assert graphed.amplifier.report().skipped_steps == scaled
    assert any(row.selected for row in graphed.amplifier.report().layers)
    weights, report = graphed.outcome()
    expected_weights, expected_report = eager.outcome()
    assert report == expected_report
    assert all(same_bits(a, b) for a, b in zip(weights, expected_weights, strict=True))


def test_prepared_without_a_step(gpu: Place) -> None:
    """``prepare()`` is enough: the first amplified step is a replay."""
    training = Training(gpu, scaled=False)
    training.run(lambda: training.model(training.inputs).square().mean().backward(), 2)
    training.amplifier.prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=training.stream):
        training.step()
    assert training.amplifier.report().steps == 0
    training.run(graph.replay, 3)
    assert training.amplifier.report().steps == 3


def test_captured_again_with_gradients_elsewhere(gpu: Place) -> None:
    """A graph has the addresses of its own capture; a second one has those of then."""
    training = Training(gpu, scaled=False)
    training.run(training.step, WARM)
    graphs = []
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=training.stream):
            training.step()
    for graph in graphs:
        training.run(graph.replay, 2)
    assert training.amplifier.report().steps == WARM + 4
    eager = Training(gpu, scaled=False)
    eager.run(eager.step, WARM + 4)
    assert all(
        same_bits(a, b) for a, b in zip(training.outcome()[0], eager.outcome()[0], strict=True)
    )
