"""The cases of ``bench.micro`` one by one, for pytest-benchmark: ``pytest bench``."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import micro
from bench.baselines import Subject, amplifier_options
from bench.shapes import MODELS, elements
from bench.verify import Expected
from bench.workload import Workload, copies_for

DEVICES = ("cpu", "cuda")
SUBJECTS = ("cuda", "triton", "cpu", "loop", "foreach", "clip_grad_norm_", "copy", "floor")


@pytest.fixture(scope="module", params=DEVICES)
def verified(request: pytest.FixtureRequest) -> tuple[micro.Player, dict[str, Subject]]:
    """ResNet-18 in fp32, a quarter amplified, and the subjects that gave what they should."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device(request.param)
    case = micro.Case("resnet18", "fp32", 0.25, "lagged")
    shapes = MODELS[case.model]()
    copies = copies_for(4 * elements(shapes), device)
    workload = Workload(shapes, torch.float32, device, case.fraction, copies, keep=False)
    expected = Expected(workload, amplifier_options(case.timing, workload))
    subjects = {}
    for make in micro.subjects(case, workload, quick=True):
        subject = make()
        micro.verify(subject, expected)
        subjects[subject.name] = subject
    return micro.Player(workload), subjects


@pytest.mark.parametrize("name", SUBJECTS)
def test_cold(
    name: str, verified: tuple[micro.Player, dict[str, Subject]], benchmark: BenchmarkFixture
) -> None:
    player, subjects = verified
    if name not in subjects:
        pytest.skip(f"{name} does not run here")
    subject, turns = subjects[name], player.turns
    benchmark.group = f"ResNet-18 fp32, lagged, f = 0.25, cold, {player.workload.device}"

    def take() -> None:
        buffers = next(turns)
        player.take(subject, buffers)
        player.done(subject, buffers)

    def run() -> None:
        subject.run()
        if player.workload.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, setup=take, rounds=20, warmup_rounds=2)
