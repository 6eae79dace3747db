"""What is promised on a GPU: no synchronisation, no allocation, capture, streams, one launch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import SHAPES, Place, Stream, bare, put, same_bits, why_not
from torch import Tensor, nn

from gradamp_fast import Amplifier, Schedule

pytestmark = pytest.mark.gpu

COMPILED = (Place("cuda", "cuda"), Place("triton", "cuda"))
QUICK = {"min_steps": 1, "refresh": 2, "decay": 0.9}
SETTINGS = [{}, {"timing": "exact"}, {"max_norm": 0.5}, {"threshold": "quantile"}]


@pytest.fixture(params=COMPILED, ids=str)
def gpu(request: pytest.FixtureRequest) -> Place:
    if reason := why_not(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def warm(place: Place, **options: object) -> tuple[nn.Module, Amplifier, list[dict[str, Tensor]]]:
    """A model with fixed gradient tensors, three steps taken; and gradients for later."""
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **{**QUICK, **options})
    stream = Stream(model)
    put(model, stream.next())
    for _ in range(3):
        refill(model, stream.next())
        amplifier.step()
    return model, amplifier, [stream.next() for _ in range(6)]


def refill(model: nn.Module, gradients: dict[str, Tensor]) -> None:
    """New values in the gradients' old memory."""
    for name, parameter in model.named_parameters():
        parameter.grad.copy_(gradients[name])


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_no_synchronisation(gpu: Place, options: dict, no_synchronisation: None) -> None:
    model, amplifier, later = warm(gpu, **options)
    scale, found_inf = (torch.ones(1, device="cuda") for _ in range(2))
    found_inf.zero_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for gradients in later:
        refill(model, gradients)
        amplifier.step(grad_scale=scale, found_inf=found_inf)
    amplifier.factor = 3.0


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_no_allocation(gpu: Place, options: dict) -> None:
    model, amplifier, later = warm(gpu, **options)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for gradients in later:
        refill(model, gradients)
        amplifier.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_replay_equals_eager(gpu: Place, options: dict) -> None:
    """Bit for bit, with new gradient values, while step number and schedule advance."""
    schedule = Schedule([(4, 7)], unit="step")
    eager, by_hand, later = warm(gpu, schedule=schedule, **options)
    model, amplifier, _ = warm(gpu, schedule=schedule, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        amplifier.step()
    for gradients in later:
        refill(model, gradients)
        refill(eager, gradients)
        graph.replay()
        by_hand.step()
        for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            assert same_bits(mine.grad, theirs.grad)
    assert repr(amplifier.report()) == repr(by_hand.report())
    assert amplifier.report().steps == 9


def test_steps_on_several_streams_are_ordered(gpu: Place) -> None:
    eager, by_hand, later = warm(gpu)
    model, amplifier, _ = warm(gpu)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for index, gradients in enumerate(later):
        refill(eager, gradients)
        by_hand.step()
        stream = side if index % 2 else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            refill(model, gradients)
            amplifier.step()
        torch.cuda.current_stream().wait_stream(stream)
    assert repr(amplifier.report()) == repr(by_hand.report())


@pytest.mark.parametrize("timing", ["lagged", "exact"])
def test_one_launch(gpu: Place, timing: str) -> None:
    model, amplifier, later = warm(gpu, timing=timing)
    refill(model, later[0])
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        amplifier.step()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e.name for e in on_device if not e.name.startswith(("Memcpy", "Memset"))]
    assert len(kernels) == 1, kernels
    assert gpu.backend == "triton" or len(on_device) == 1, [e.name for e in on_device]
