"""How long a call takes: of the wall's, the host's and the device's time, and in a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

Run = Callable[[], object]


class Clock(Protocol):
    """Times one call; microseconds by name of what was measured."""

    def __call__(self, run: Run) -> dict[str, float]: ...


class Wall:
    """On the CPU: what a call takes when torch's threads are awake, as a backward pass leaves them.

    Waking one takes as long as a small step.
    """

    GRAIN = 32_768  # elements that torch gives a thread at least

    def __init__(self) -> None:
        self.work = torch.zeros(2 * self.GRAIN * torch.get_num_threads())

    def __call__(self, run: Run) -> dict[str, float]:
        self.work.add_(1.0)
        start = time.perf_counter_ns()
        run()
        return {"wall": (time.perf_counter_ns() - start) / 1e3}


@dataclass(frozen=True)
class EagerCuda:
    """From an idle device: until the call returns ("host"), and until its work is done ("wall")."""

    device: torch.device

    def __call__(self, run: Run) -> dict[str, float]:
        torch.cuda.synchronize(self.device)
        start = time.perf_counter_ns()
        run()
        returned = time.perf_counter_ns()
        torch.cuda.synchronize(self.device)
        done = time.perf_counter_ns()
        return {"host": (returned - start) / 1e3, "wall": (done - start) / 1e3}


class QueuedCuda:
    """Behind a wait so long that the host's time does not show: what the device takes.

    Gives nothing where the host takes longer than the longest wait.
    """

    CYCLES = 2_000  # of the device's clock in a microsecond, rounded up
    LONGEST = 200_000.0  # microseconds

    def __init__(self, device: torch.device, name: str) -> None:
        self.device, self.name = device, name
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.host = 10_000.0  # microseconds that the host takes, as far as is known

    def __call__(self, run: Run) -> dict[str, float]:
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(int(min(2 * self.host + 100, self.LONGEST)) * self.CYCLES)
        begun = time.perf_counter_ns()
        self.events[0].record()
        run()
        self.events[1].record()
        self.host = (time.perf_counter_ns() - begun) / 1e3
        still_waiting = not self.events[0].query()
        torch.cuda.synchronize(self.device)
        if not still_waiting:
            return {}
        return {self.name: self.events[0].elapsed_time(self.events[1]) * 1e3}


def capture(run: Run) -> Run:
    """The call as a CUDA graph, without making it; what comes back replays the graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def quantile(values: list[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
