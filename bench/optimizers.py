"""An optimizer's step: torch's and the package's, alone and amplified, over the same memory.

Parameters, gradients and state are one set, which every subject works on in its turn. It is many
times as large as the cache.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradamp_fast.optim
from bench.baselines import Subject, amplifier_options, give, parameters_of
from bench.micro import DTYPES, Effort, Player, Task, interleave, tasks_of
from bench.results import Failure, Row, percentiles
from bench.shapes import MODELS, Shapes
from bench.verify import STATE_TOLERANCE, Wrong, check_close, factor_of, select_by_hand
from bench.workload import FACTOR, Buffers, Workload, holder
from gradamp_fast import Amplifier, reference
from gradamp_fast.reference.state import State

FRACTION = 0.25
STEPS = 2  # that are checked


@dataclass(frozen=True)
class Rule:
    """An optimizer with its options.

    Attributes:
        moves: numbers an element that a step reads or writes at least.
        updates: whether amplification multiplies the update, not the gradient.
    """

    torchs: type[Optimizer]
    ours: type[Optimizer]
    options: dict[str, Any]
    states: tuple[str, ...]
    moves: int
    updates: bool


RULES = {
    "sgd": Rule(
        torch.optim.SGD, gradamp_fast.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
        ("momentum_buffer",), moves=5, updates=False,
    ),
    "adamw": Rule(
        torch.optim.AdamW, gradamp_fast.optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2},
        ("exp_avg", "exp_avg_sq"), moves=7, updates=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One list of shapes, updated by one rule."""

    model: str
    dtype: str
    rule: str

    def __str__(self) -> str:
        return f"{self.model} {self.dtype} {self.rule}"


def cases(quick: bool) -> list[Case]:
    models = ("resnet18",) if quick else ("resnet50", "gpt2")
    dtypes = ("fp32",) if quick else tuple(DTYPES)
    return [Case(m, dtype, rule) for m in models for dtype in dtypes for rule in RULES]


@dataclass(eq=False)
class Bench:
    """The memory of one case: gradients, parameters and the optimizer's state."""

    shapes: Shapes
    dtype: torch.dtype
    device: torch.device
    rule: Rule

    def __post_init__(self) -> None:
        self.workload = Workload(
            self.shapes, self.dtype, self.device, FRACTION, copies=1, keep=False
        )
        self.parameters = torch.empty_like(self.gradients.flat)
        generator = torch.Generator(self.device).manual_seed(1)
        self.parameters.normal_(0.0, 0.02, generator=generator)
        self.before = self.parameters.clone()
        self.states = {key: torch.zeros_like(self.parameters) for key in self.rule.states}
        self.measured = self._measured()

    @property
    def gradients(self) -> Buffers:
        return self.workload.sets[0]

    def model(self) -> nn.Module:
        """A new one whose parameters lie in the memory of all."""
        model = holder(self.shapes, self.dtype, self.device)
        parameters = parameters_of(self.workload, model)
        for p, flat in zip(parameters, self.workload.views(self.parameters), strict=True):
            p.data = flat.view(p.shape)
        return model

    def optimizer(self, kind: type[Optimizer], model: nn.Module) -> Optimizer:
        """Its state lies in the memory of all; step counts are its own."""
        parameters = parameters_of(self.workload, model)
        options = dict(self.rule.options)
        if kind is self.rule.torchs:
            options["fused"] = True
            if self.device.type == "cuda" and "exp_avg" in self.states:
                options["capturable"] = True
        optimizer: Optimizer = kind(parameters, **options)
        parts = {key: self.workload.views(flat) for key, flat in self.states.items()}
        for index, p in enumerate(parameters):
            state = {key: part[index].view(p.shape) for key, part in parts.items()}
            if "exp_avg" in state:
                state["step"] = torch.zeros((), device=self.device)
            optimizer.state[p] = state
        return optimizer

    def reset(self) -> None:
        self.workload.fill()
        self.parameters.copy_(self.before)
        for flat in self.states.values():
            flat.zero_()

    def amplifier(self, model: nn.Module, backend: str = "auto") -> Amplifier:
        amplifier = Amplifier(
            model, backend=backend, **amplifier_options("lagged", self.workload)
        )  # fmt: skip
        select_by_hand(amplifier, self.workload.layers)
        return amplifier

    def _measured(self) -> State:
        """What the definition's first step measures."""
        amplifier = self.amplifier(self.model(), "torch")
        plan, state = amplifier.bound.plan, amplifier.bound.settled_state()
        place = {name: index for index, name in enumerate(self.shapes)}
        gradients = [self.gradients.flats[place[slot.name]].clone() for slot in plan.slots]
        reference.step(plan, state, amplifier.options.rules(), gradients)
        return state

    def check(self, subject: Step) -> None:
        """After ``STEPS`` steps from the beginning: torch's, in fp64 and tensor by tensor."""
        views = self.workload.views
        eps = torch.finfo(self.dtype).eps
        for name, before, after, gradient, chosen in zip(
            self.shapes, views(self.before), views(self.parameters),
            views(self.gradients.flat), self.workload.selected, strict=True,
        ):  # fmt: skip
            expected = self._updated(before, gradient, subject, chosen)
            moved = float((expected - before.double()).abs().max())
            error = (after.double() - expected).abs() - STEPS * eps * expected.abs()
            if not float(error.max()) <= 16 * eps * moved:
                raise Wrong(f"{name} is off by {float(error.max()) / moved:.1e} of its update")

    def _updated(self, before: Tensor, gradient: Tensor, subject: Step, chosen: bool) -> Tensor:
        p = nn.Parameter(before.double())
        optimizer = self.rule.torchs([p], **self.rule.options)
        group = optimizer.param_groups[0]
        lr, decay = group["lr"], group["weight_decay"]
        for step in range(STEPS):
            p.grad = gradient.double()
            a = subject.multiplier(step) if chosen else 1.0
            if self.rule.updates and subject.in_step:
                group["lr"], group["weight_decay"] = a * lr, decay / a
            else:
                p.grad.mul_(a)
            optimizer.step()
        return p.detach()


class Step(Subject):
    """An optimizer's step.

    Attributes:
        in_step: whether it amplifies in its own pass.
    """

    amplifies = False
    in_step = False

    def __init__(self, bench: Bench, kind: type[Optimizer]) -> None:
        self.model = bench.model()
        self.parameters = parameters_of(bench.workload, self.model)
        self.optimizer = bench.optimizer(kind, self.model)
        self.run = self.optimizer.step

    def take(self, buffers: Buffers, factor: float) -> None:
        give(self.parameters, buffers)

    def multiplier(self, step: int) -> float:
        """Of the chosen layers' gradients as they were at first, or of their updates."""
        return 1.0

    def moves(self, rule: Rule, amplified: float) -> float:
        """Numbers an element."""
        return rule.moves


class Torchs(Step):
    """torch's own, ``fused=True``."""

    name = "torch"
    leaves_out = "amplification"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench, bench.rule.torchs)


class Alone(Step):
    """The package's, without an amplifier."""

    name = "alone"
    leaves_out = "amplification"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench, bench.rule.ours)


class WithAmplifier(Step):
    """Measures, decides and multiplies as well."""

    def __init__(self, bench: Bench, kind: type[Optimizer]) -> None:
        super().__init__(bench, kind)
        self.amplifier = bench.amplifier(self.model)
        with warnings.catch_warnings():  # that AdamW divides the factor out
            warnings.simplefilter("ignore")
            self.amplifier.attach(self.optimizer)

    def take(self, buffers: Buffers, factor: float) -> None:
        super().take(buffers, factor)
        self.amplifier.factor = factor


class Amplified(WithAmplifier):
    """The package's, in its own pass."""

    name = "amplified"
    in_step = True

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench, bench.rule.ours)

    def multiplier(self, step: int) -> float:
        return factor_of(step)


class Attached(WithAmplifier):
    """An amplifier's own pass over the gradients, then torch's step."""

    name = "attach + torch"
    amplifies = True

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench, bench.rule.torchs)

    def multiplier(self, step: int) -> float:
        """Its second step gives the gradients back as they were."""
        return FACTOR if step % 2 == 0 else 1.0

    def moves(self, rule: Rule, amplified: float) -> float:
        return rule.moves + 1 + amplified


SUBJECTS: tuple[Callable[[Bench], Step], ...] = (Torchs, Alone, Amplified, Attached)


def verify(subject: Step, bench: Bench) -> None:
    """Raises ``Wrong`` where an update or a measured value is not the definition's."""
    bench.reset()
    for step in range(STEPS):
        subject.take(bench.gradients, factor_of(step))
        subject.run()
        if step == 0 and isinstance(subject, WithAmplifier):
            state = subject.amplifier.bound.settled_state()
            for name, tolerance in STATE_TOLERANCE.items():
                check_close(name, state.column(name), bench.measured.column(name), tolerance)
    bench.check(subject)


def run_case(case: Case, device: torch.device, effort: Effort) -> tuple[list[Row], list[Failure]]:
    """Verifies every subject of a case, then times those that passed."""
    bench = Bench(MODELS[case.model](), DTYPES[case.dtype], device, RULES[case.rule])
    return measure(case, bench, SUBJECTS, effort)


def measure(
    case: Case, bench: Bench, makers: Iterable[Callable[[Bench], Step]], effort: Effort
) -> tuple[list[Row], list[Failure]]:
    """Rows for the subjects that are right, failures for the others."""
    tasks: list[Task] = []
    failures: list[Failure] = []
    for make in makers:
        subject = make(bench)
        try:
            verify(subject, bench)
            tasks += tasks_of(subject, bench.workload)
        except Wrong as wrong:
            failures.append(Failure(str(case), subject.name, str(wrong), wrong=True))
        except RuntimeError as error:
            reason = f"it cannot be captured in a CUDA graph: {error}"
            failures.append(Failure(str(case), subject.name, reason, wrong=False))
    bench.reset()
    gc.collect()
    times = interleave(Player(bench.workload), tasks, "cold", effort)
    steps = {task.subject.name: task.subject for task in tasks}
    return list(_rows(case, bench, steps, times)), failures


def _rows(
    case: Case, bench: Bench, steps: dict[str, Subject], times: dict[tuple[str, str], list[float]]
) -> Iterator[Row]:
    workload = bench.workload
    for (name, clock), values in times.items():
        step = steps[name]
        assert isinstance(step, Step)
        p10, median, p90 = percentiles(values)
        moves = step.moves(bench.rule, workload.amplified_fraction)
        yield Row(
            section=case.rule,
            model=case.model,
            elements=workload.elements,
            tensors=len(workload.shapes),
            dtype=case.dtype,
            fraction=FRACTION,
            amplified=workload.amplified_fraction,
            timing="lagged",
            subject=name,
            leaves_out=step.leaves_out,
            cache="cold",
            clock=clock,
            bytes=round(moves * workload.gradient_bytes),
            runs=len(values),
            p10=p10,
            median=median,
            p90=p90,
        )
