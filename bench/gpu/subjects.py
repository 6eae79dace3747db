"""What the step is held against on a GPU, beside the baselines of every device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.baselines import Bytes, Fused, Subject, give, parameters_of
from bench.workload import Buffers, Workload


class SameBytes(Bytes):
    """Moves ``share`` times the gradients' bytes: half of that read, half written."""

    leaves_out = "everything"

    def __init__(self, workload: Workload, share: float) -> None:
        super().__init__(workload, 0.0)
        self.count = round(share / 2 * self.integers.numel())
        self.elsewhere = torch.empty_like(self.integers[: self.count])
        self.run = self.move

    def move(self) -> Tensor:
        raise NotImplementedError


class MemoryCopy(SameBytes):
    """The driver's own copy, which a graph holds as a node of its own kind."""

    name = "copy"

    def move(self) -> Tensor:
        return self.elsewhere.copy_(self.integers[: self.count])


class KernelCopy(SameBytes):
    """A kernel that reads, turns the bits and writes: what the processors themselves can move.

    torch makes no kernel of a copy from contiguous to contiguous memory.
    """

    name = "kernel copy"

    def move(self) -> Tensor:
        return torch.bitwise_not(self.integers[: self.count], out=self.elsewhere)


class Reading(Bytes):
    """A flat reduction that reads everything."""

    leaves_out = "everything"

    def __init__(self, workload: Workload, name: str) -> None:
        super().__init__(workload, 0.0)
        self.name = name
        reductions: dict[str, Callable[[], Tensor]] = {
            "sum": lambda: self.flat.sum(dtype=torch.float32),
            "amax": lambda: self.integers.amax(),
        }
        self.run = reductions[name]


class Scaled(Fused):
    """The package's step with ``grad_scale`` and ``found_inf``."""

    def __init__(self, workload: Workload, options: dict[str, object]) -> None:
        super().__init__(workload, "cuda", options)
        scale, found_inf = (torch.ones(1, device=workload.device) for _ in range(2))
        found_inf.zero_()
        self.run = lambda: self.amplifier.step(grad_scale=scale, found_inf=found_inf)


class UnscaleAndClip(Subject):
    """What ``GradScaler.unscale_`` and ``clip_grad_norm_`` do on the device.

    torch has no ``unscale_`` for bf16 on CUDA: there the division is a foreach multiplication, and
    nothing looks for infinities.
    """

    leaves_out = "statistics and amplification"

    def __init__(self, workload: Workload, max_norm: float) -> None:
        self.parameters, self.max_norm = parameters_of(workload), max_norm
        self.inverse, self.found_inf = (torch.ones(1, device=workload.device) for _ in range(2))
        self.found_inf.zero_()
        bf16 = workload.dtype == torch.bfloat16
        self.unscale = self.multiply if bf16 else self.check_and_unscale
        self.name = "foreach_mul_ + clip" if bf16 else "unscale_ + clip"
        self.factor = torch.ones((), device=workload.device, dtype=workload.dtype)
        self.run = self.step

    def take(self, buffers: Buffers, factor: float) -> None:
        self.gradients = buffers.gradients
        give(self.parameters, buffers)

    def multiply(self) -> None:
        torch._foreach_mul_(self.gradients, self.factor)

    def check_and_unscale(self) -> None:
        torch._amp_foreach_non_finite_check_and_unscale_(
            self.gradients, self.found_inf, self.inverse
        )

    def step(self) -> None:
        self.unscale()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm, foreach=True)
