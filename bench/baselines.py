"""What a step is compared with. Each says what it leaves out.

Every subject of a benchmark takes one set of gradients, and then runs: only ``run`` is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from bench.verify import NEVER, WEIGHT, Expected, Wrong, check_close, select_by_hand
from bench.workload import Buffers, Workload, holder
from gradamp_fast import Amplifier, reference
from gradamp_fast.model.plan import bucket_log2


class Subject:
    """Something to be timed.

    Attributes:
        name: in the results.
        leaves_out: what of a step it does not do; "" for one that does all.
        amplifies: its run multiplies the selected gradients by the factor.
        of_norm: relative error allowed to a global norm.
        run: what is timed.
    """

    name: str
    leaves_out: ClassVar[str] = ""
    amplifies: bool = True
    of_norm: float = 1e-5
    run: Callable[[], object]

    def take(self, buffers: Buffers, factor: float) -> None:
        """Makes the next runs work on these gradients with this factor."""
        raise NotImplementedError

    def check(self, expected: Expected) -> None:
        """Raises ``Wrong`` if what the last runs measured is not what the reference measures."""
        raise NotImplementedError


def parameters_of(workload: Workload, model: Module | None = None) -> list[Parameter]:
    """The model's parameters (a new model's) in the order of the shapes."""
    model = model or holder(workload.shapes, workload.dtype, workload.device)
    named = dict(model.named_parameters())
    return [named[name] for name in workload.shapes]


def give(parameters: list[Parameter], buffers: Buffers) -> None:
    for parameter, gradient in zip(parameters, buffers.gradients, strict=True):
        parameter.grad = gradient


class Fused(Subject):
    """The package itself, with one of its backends."""

    def __init__(self, workload: Workload, backend: str, options: dict[str, Any]) -> None:
        self.name = backend
        self.model = holder(workload.shapes, workload.dtype, workload.device)
        self.parameters = parameters_of(workload, self.model)
        self.amplifier = Amplifier(self.model, backend=backend, **options)
        select_by_hand(self.amplifier, workload.layers)
        self.run = self.amplifier.step

    def take(self, buffers: Buffers, factor: float) -> None:
        give(self.parameters, buffers)
        self.amplifier.factor = factor

    def check(self, expected: Expected) -> None:
        expected.check_state(self.amplifier.bound.settled_state())


class Baseline(Subject):
    """Has the gradients as a list, the factor on the device, and running statistics."""

    statistic: ClassVar[str]
    gradients: list[Tensor]

    def __init__(self, workload: Workload) -> None:
        self.chosen = [i for i, chosen in enumerate(workload.selected) if chosen]
        self.factor = torch.ones((), dtype=workload.dtype, device=workload.device)
        self.running = torch.zeros(len(workload.shapes), device=workload.device)
        self.tolerance = 1e-4 if workload.dtype == torch.float32 else 2e-2
        self.take(workload.sets[0], 1.0)
        self.run = self.step

    def take(self, buffers: Buffers, factor: float) -> None:
        self.gradients = buffers.flats
        self.selected = [buffers.flats[i] for i in self.chosen]
        self.factor.fill_(factor)

    def step(self) -> None:
        raise NotImplementedError

    def check(self, expected: Expected) -> None:
        expected.check_running(self.statistic, self.running, self.tolerance)


class Loop(Baseline):
    """One gradient after the other, as one writes it first."""

    name = "loop"
    leaves_out = "sketch, fluctuation and direction, decision; accuracy of the gradients' dtype"
    statistic = "variance"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.variances = [
            torch.zeros((), dtype=workload.dtype, device=workload.device) for _ in workload.shapes
        ]
        self.means = [torch.zeros_like(variance) for variance in self.variances]
        self.is_chosen = workload.selected

    def step(self) -> None:
        for gradient, variance, mean, chosen in zip(
            self.gradients, self.variances, self.means, self.is_chosen, strict=True
        ):
            variance.lerp_(gradient.var(correction=0), WEIGHT)
            mean.lerp_(gradient.mean(), WEIGHT)
            if chosen:
                gradient.mul_(self.factor)

    def check(self, expected: Expected) -> None:
        self.running = torch.stack(self.variances).float()
        super().check(expected)


def norm_error(workload: Workload) -> float:
    """Relative error allowed to torch's norm of the largest tensor.

    On a CPU torch adds squares in fp32, and its error was seen to grow with the elements: 1e-5 at
    1 M, 4e-4 at 10 M, 4e-3 at 50 M, 1.1e-2 at 100 M. On a GPU it adds in blocks.
    """
    if workload.device.type == "cuda":
        return 1e-4
    return 1e-4 + 2e-10 * max(map(prod, workload.shapes.values()))


class Foreach(Baseline):
    """The fewest foreach calls: norms and multiplication."""

    name = "foreach"
    leaves_out = "mean, and so variance; sketch, fluctuation and direction, decision"
    statistic = "norm"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.tolerance = norm_error(workload) + 4 * torch.finfo(workload.dtype).eps

    def step(self) -> None:
        norms = torch.stack(torch._foreach_norm(self.gradients))
        self.running.lerp_(norms.float(), WEIGHT)
        if self.selected:
            torch._foreach_mul_(self.selected, self.factor)


class Compiled(Baseline):
    """``torch.compile`` of everything but the decision, in two functions over all gradients.

    The first takes sums, sums of squares and signed sums of every bucket in one pass over the
    gradients, and multiplies: which ones is known when it is compiled. The second works on all
    buckets at once. As one function the compiler makes of both what is three times as slow.
    """

    name = "compile"
    leaves_out = "decision; the shift that keeps the variance accurate where the mean is large"
    statistic = "variance"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        device = workload.device
        logs = [bucket_log2(g.numel()) for g in self.gradients]
        self.order = sorted(range(len(logs)), key=lambda i: logs[i])  # buckets of one come first
        self.logs = [logs[i] for i in self.order]
        self.ones = self.logs.count(0)
        sizes = [self.gradients[i].numel() for i in self.order]
        buckets = [-(-size >> log2) for size, log2 in zip(sizes, self.logs, strict=True)]
        self.signs = reference.signs(max(sizes), device).to(workload.dtype)
        self.variances = torch.zeros(len(sizes), dtype=torch.float64, device=device)
        self.state = (
            torch.cat([self.signs[:size] for size in sizes[: self.ones]]),
            torch.zeros(sum(buckets), device=device),
            self.variances,
            torch.tensor(buckets, device=device).cumsum(0) - 1,
            torch.tensor(sizes, device=device),
            torch.tensor(1.0, dtype=torch.float64, device=device),
        )
        self.sketch_sums = torch.zeros((4, len(sizes)), dtype=torch.float64, device=device)
        torch._dynamo.reset()  # nothing that was compiled for another list of shapes
        self.measure = torch.compile(self._measure, fullgraph=True, dynamic=False)
        self.update: Callable[..., Tensor] = torch.compile(
            self._update, fullgraph=True, dynamic=False
        )

    def step(self) -> None:
        self.sketch_sums = self.update(*self.measure(self.gradients, self.factor), *self.state)

    def _measure(self, gradients: list[Tensor], factor: Tensor) -> tuple[Tensor, ...]:
        """The small gradients one after the other, and the statistics of the others' buckets."""
        ordered = [gradients[i] for i in self.order]
        small = torch.cat(ordered[: self.ones])
        parts = [
            bucket_statistics(gradient, self.signs, 1 << log2)
            for gradient, log2 in zip(ordered[self.ones :], self.logs[self.ones :], strict=True)
        ]
        sums, squares, signed = (torch.cat(part) for part in zip(*parts, strict=True))
        for i in self.chosen:
            gradients[i].mul_(factor)
        return small, sums, squares, signed

    @staticmethod
    def _update(
        small: Tensor,
        sums: Tensor,
        squares: Tensor,
        signed: Tensor,
        signs: Tensor,
        means: Tensor,
        running: Tensor,
        ends: Tensor,
        sizes: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """Running means and variances in place; sums over each gradient's buckets: [4, tensors]."""
        x = small.float()
        s = torch.cat((x * signs, signed)).double()
        h = means.double()
        after = h + weight * (s - h)
        moments = (torch.cat((x, sums)).double(), torch.cat((x * x, squares)).double())
        columns = torch.stack((*moments, s * s, s * h, h * h, after * after))
        at_ends = columns.cumsum(1)[:, ends]
        totals = at_ends.diff(dim=1, prepend=at_ends.new_zeros(len(columns), 1))
        mean = totals[0] / sizes
        running.lerp_(totals[1] / sizes - mean * mean, WEIGHT)
        means.copy_(after)
        return totals[2:]

    def check(self, expected: Expected) -> None:
        back = torch.tensor(self.order, device=self.running.device).argsort()
        self.running = self.variances[back]
        super().check(expected)
        # With a weight of 1 the running means are the last step's buckets.
        power = self.sketch_sums[0, back]
        check_close("power of the sketch", power, expected.power, self.tolerance)


def bucket_statistics(gradient: Tensor, signs: Tensor, length: int) -> list[Tensor]:
    """Of each bucket: sum, sum of squares and signed sum, fp32 [buckets] each."""
    n = gradient.numel()
    x = gradient.float()
    signed = gradient * signs[:n]
    full = n // length * length
    rows, signed_rows = x[:full].view(-1, length), signed[:full].float().view(-1, length)
    sums = [rows.sum(1), (rows * rows).sum(1), signed_rows.sum(1)]
    if full == n:
        return sums
    rest = x[full:]
    last = [rest.sum(), (rest * rest).sum(), signed[full:].float().sum()]
    return [torch.cat((a, b.reshape(1))) for a, b in zip(sums, last, strict=True)]


class ClipGradNorm(Subject):
    """``clip_grad_norm_``: norms of all gradients, and all multiplied by one coefficient."""

    name = "clip_grad_norm_"
    leaves_out = "everything but a global norm: a yardstick of similar work; its coefficient is 1"
    amplifies = False

    def __init__(self, workload: Workload) -> None:
        self.of_norm = norm_error(workload)
        self.parameters = parameters_of(workload)
        self.norm = torch.zeros(())
        self.run = self.step

    def take(self, buffers: Buffers, factor: float) -> None:
        give(self.parameters, buffers)

    def step(self) -> None:
        self.norm = torch.nn.utils.clip_grad_norm_(self.parameters, float("inf"))

    def check(self, expected: Expected) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.stack([g.double().norm() for g in gradients]).norm()
        check_close(
            "global norm", self.norm, norm, self.of_norm + 4 * torch.finfo(gradients[0].dtype).eps
        )


class ForeachClip(Foreach):
    """Norms and multiplication by foreach, then ``clip_grad_norm_``."""

    name = "foreach + clip"

    def __init__(self, workload: Workload, max_norm: float) -> None:
        # Sums in fp32; norm and coefficient in the gradients' dtype, and one more rounding.
        self.of_norm = norm_error(workload) + 4 * torch.finfo(workload.dtype).eps
        self.parameters = parameters_of(workload)
        self.max_norm = max_norm
        super().__init__(workload)

    def take(self, buffers: Buffers, factor: float) -> None:
        super().take(buffers, factor)
        give(self.parameters, buffers)

    def step(self) -> None:
        super().step()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)


class Bytes(Subject):
    """Moves bytes and computes next to nothing: what memory alone takes."""

    amplifies = False

    def __init__(self, workload: Workload, share: float) -> None:
        self.share = share
        self.take(workload.sets[0], 1.0)

    def take(self, buffers: Buffers, factor: float) -> None:
        self.flat = buffers.flat
        words = self.flat[: self.flat.numel() // 2 * 2]
        self.integers, floats = words.view(torch.int32), words.view(torch.float32)
        self.part = floats[: round(self.share * floats.numel())]

    def check(self, expected: Expected) -> None:
        before = expected.workload.sets[0].flat
        if self.flat.data_ptr() != before.data_ptr():
            raise Wrong("it worked on other gradients")


class Copy(Bytes):
    """A copy of all gradients to elsewhere."""

    name = "copy"
    leaves_out = "everything: as many bytes read as there are, and as many written"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload, 0.0)
        self.elsewhere = torch.empty_like(self.flat)
        self.run = lambda: self.elsewhere.copy_(self.flat)

    def check(self, expected: Expected) -> None:
        super().check(expected)
        if not torch.equal(self.elsewhere.view(torch.uint8), self.flat.view(torch.uint8)):
            raise Wrong("the copy differs")


class Floor(Bytes):
    """One flat read of everything, then a read and write of a share of it."""

    name = "floor"
    leaves_out = "everything: the bytes that a step has to move"

    def __init__(self, workload: Workload, share: float) -> None:
        super().__init__(workload, share)
        self.run = self.step

    def step(self) -> None:
        self.largest = self.integers.amax()
        self.part.mul_(1.0)  # of finite numbers: no bit changes

    def check(self, expected: Expected) -> None:
        super().check(expected)
        if not torch.equal(self.largest, self.flat.view(torch.int32).max()):
            raise Wrong("not every byte was read")


def amplifier_options(timing: str, workload: Workload) -> dict[str, Any]:
    """Options of a case; ``timing`` is "lagged", "exact" or "clip"."""
    options: dict[str, Any] = {"refresh": NEVER}
    if timing == "exact":
        options["timing"] = "exact"
    if timing == "clip":  # half the norm before amplification: the coefficient is below 1
        options["max_norm"] = 0.5 * 0.01 * workload.elements**0.5
    return options
