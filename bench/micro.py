"""One step against its baselines, on the gradients of real models.

A case is verified, then timed: all subjects in turn, round after round, so that what else the
machine does falls on all of them alike.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bench import baselines, clocks
from bench.baselines import Fused, Subject, amplifier_options
from bench.results import Failure, Row, percentiles
from bench.shapes import MODELS, elements
from bench.verify import Expected, Wrong, factor_of
from bench.workload import FACTOR, Buffers, Workload, cache_bytes, copies_for
from gradamp_fast import backends

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPILED = ("resnet50", "gpt2")  # compiling takes as long as everything else of a case
SLOW = 30_000_000  # elements: beyond, what takes seconds a run on a CPU is left out
HUGE = 500_000_000  # elements: beyond, only the default case, and on a CPU only in fp32


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds, and seconds that a subject may use for them."""

    fewest: int
    most: int
    seconds: float


QUICK = Effort(fewest=3, most=15, seconds=0.25)
FULL = Effort(fewest=5, most=41, seconds=0.8)


@dataclass(frozen=True)
class Case:
    """One list of shapes, with one way of stepping."""

    model: str
    dtype: str
    fraction: float
    timing: str  # "lagged", "exact" or "clip"

    def __str__(self) -> str:
        return f"{self.model} {self.dtype} f={self.fraction:g} {self.timing}"

    @property
    def headline(self) -> bool:
        return self.fraction == 0.25 and self.timing == "lagged"


def cases(device: torch.device, quick: bool) -> list[Case]:
    """What is measured; on a CPU every combination for one model, and one of each other."""
    if quick:
        return [Case("resnet18", dtype, 0.25, "lagged") for dtype in DTYPES]
    everything = [
        Case(model, dtype, fraction, timing)
        for model, dtype, timing, fraction in itertools.product(
            MODELS, DTYPES, ("lagged", "exact", "clip"), (0.0, 0.25, 1.0)
        )
    ]
    return [case for case in everything if _suits(case, device)]


def _suits(case: Case, device: torch.device) -> bool:
    huge = elements(MODELS[case.model]()) > HUGE
    if device.type == "cuda":
        return case.headline or not huge
    return case.model == "resnet50" or (case.headline and not (huge and case.dtype == "bf16"))


def subjects(case: Case, workload: Workload, quick: bool) -> Iterator[Callable[[], Subject]]:
    """What is timed in a case, made one by one: compiling takes its time."""
    options = amplifier_options(case.timing, workload)
    on_cpu = workload.device.type == "cpu"
    slow = on_cpu and workload.elements > SLOW
    for name in backends.NAMES:
        too_slow = name == "torch" and (slow or quick or not case.headline)
        if backends.unavailable(name, workload.device) is None and not too_slow:
            yield lambda name=name: Fused(workload, name, options)  # type: ignore[misc]
    if case.timing == "clip":
        yield lambda: baselines.ForeachClip(workload, options["max_norm"])
    else:
        if not (slow and case.dtype == "bf16"):
            yield lambda: baselines.Loop(workload)
        yield lambda: baselines.Foreach(workload)
        if case.headline and case.model in COMPILED and not quick:
            yield lambda: baselines.Compiled(workload)
    yield lambda: baselines.ClipGradNorm(workload)
    yield lambda: baselines.Copy(workload)
    yield lambda: baselines.Floor(workload, floor_share(case, workload))


def floor_share(case: Case, workload: Workload) -> float:
    """What of the gradients has to be written: clipping multiplies all of them."""
    return 1.0 if case.timing == "clip" else workload.amplified_fraction


class Player:
    """Runs subjects on the sets of a workload and keeps the values where they are."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.turns = itertools.cycle(workload.sets)

    def take(self, subject: Subject, buffers: Buffers) -> None:
        subject.take(buffers, 1.0 / FACTOR if buffers.amplified else FACTOR)

    def done(self, subject: Subject, buffers: Buffers) -> None:
        if self.workload.pristine is not None and subject.amplifies:
            buffers.flat.copy_(self.workload.pristine)
        elif subject.amplifies:
            buffers.amplified = not buffers.amplified

    def play(self, subject: Subject, buffers: Buffers, clock: clocks.Clock) -> dict[str, float]:
        self.take(subject, buffers)
        times = clock(subject.run)
        self.done(subject, buffers)
        return times

    def cold(self, subject: Subject, clock: clocks.Clock) -> dict[str, float]:
        """On the set whose turn it is: no cache holds it any more."""
        return self.play(subject, next(self.turns), clock)

    def warm(self, subject: Subject, clock: clocks.Clock) -> dict[str, float]:
        """On the set that the subject has just worked on."""
        self.play(subject, self.workload.sets[0], clock)
        return self.play(subject, self.workload.sets[0], clock)


class Replayed(Subject):
    """A subject's run as CUDA graphs, one for each set of gradients."""

    def __init__(self, subject: Subject, workload: Workload) -> None:
        self.subject, self.name = subject, subject.name
        self.amplifies, self.of_norm = subject.amplifies, subject.of_norm
        self.graphs: dict[int, clocks.Run] = {}
        for buffers in workload.sets:
            subject.take(buffers, FACTOR)
            self.graphs[id(buffers)] = clocks.capture(subject.run)

    def take(self, buffers: Buffers, factor: float) -> None:
        self.subject.take(buffers, factor)
        self.run = self.graphs[id(buffers)]

    def check(self, expected: Expected) -> None:
        """Only what it writes is compared: its statistics go on from the steps before."""


def verify(subject: Subject, expected: Expected) -> None:
    """Takes the reference's steps, on the first set. Raises ``Wrong`` where they differ."""
    workload = expected.workload
    buffers = workload.sets[0]
    for step in range(expected.steps):
        subject.take(buffers, factor_of(step))
        subject.run()
        if subject.amplifies:
            expected.check_gradients(step, buffers.flats, subject.of_norm)
        else:
            expected.check_untouched(buffers.flats)
    subject.check(expected)
    if workload.pristine is not None:
        buffers.flat.copy_(workload.pristine)
    elif expected.steps == 1 and subject.amplifies:
        buffers.amplified = not buffers.amplified
        subject.take(buffers, factor_of(1))
        subject.run()
        buffers.amplified = False


@dataclass(frozen=True)
class Task:
    """A subject, the form of it that is run, and the clock that times it."""

    subject: Subject
    form: Subject
    clock: clocks.Clock


def tasks_of(subject: Subject, workload: Workload) -> Iterator[Task]:
    """One on a CPU; on a GPU one for each clock. Raises RuntimeError if it cannot be captured."""
    device = workload.device
    if device.type != "cuda":
        yield Task(subject, subject, clocks.Wall())
        return
    yield Task(subject, subject, clocks.EagerCuda(device))
    yield Task(subject, subject, clocks.QueuedCuda(device, "device"))
    yield Task(subject, Replayed(subject, workload), clocks.QueuedCuda(device, "graph"))


Times = dict[tuple[str, str], list[float]]  # by subject and clock: microseconds


def interleave(player: Player, tasks: Sequence[Task], cache: str, effort: Effort) -> Times:
    """All tasks in turn, round after round, until each has had its share of time."""
    play = player.cold if cache == "cold" else player.warm
    times: Times = {}
    spent = [0.0] * len(tasks)
    for number in range(-1, effort.most):  # the first round warms up
        for index, task in enumerate(tasks):
            if number >= effort.fewest and spent[index] > effort.seconds:
                continue
            start = time.perf_counter()
            measured = play(task.form, task.clock)
            spent[index] += time.perf_counter() - start
            for name, value in measured.items() if number >= 0 else ():
                times.setdefault((task.subject.name, name), []).append(value)
    return times


def caches(workload: Workload) -> tuple[str, ...]:
    """A set much larger than the cache is never warm."""
    fits = workload.gradient_bytes <= 4 * cache_bytes(workload.device)
    return ("cold", "warm") if fits else ("cold",)


def least_bytes(subject: Subject, case: Case, workload: Workload) -> int:
    """What the subject has to move at least."""
    read = workload.gradient_bytes
    if isinstance(subject, baselines.Copy):
        return 2 * read
    if isinstance(subject, baselines.Floor):
        return round((1 + 2 * floor_share(case, workload)) * read)
    if isinstance(subject, Fused):
        return round((1 + floor_share(case, workload)) * read)
    return 0


def run_case(
    case: Case, device: torch.device, effort: Effort, quick: bool = False
) -> tuple[list[Row], list[Failure]]:
    """Verifies every subject of a case, then times those that passed."""
    shapes = MODELS[case.model]()
    dtype = DTYPES[case.dtype]
    copies = copies_for(elements(shapes) * dtype.itemsize, device)
    keep = case.timing == "clip"
    workload = Workload(shapes, dtype, device, case.fraction, copies, keep)
    return measure("models", case, workload, subjects(case, workload, quick), effort)


def measure(
    section: str,
    case: Case,
    workload: Workload,
    makers: Iterable[Callable[[], Subject]],
    effort: Effort,
) -> tuple[list[Row], list[Failure]]:
    """Rows for the subjects that are right, failures for the others."""
    expected = Expected(workload, amplifier_options(case.timing, workload))
    tasks: list[Task] = []
    failures: list[Failure] = []
    for make in makers:
        subject = make()
        try:
            verify(subject, expected)
            for task in tasks_of(subject, workload):
                if task.form is not subject:
                    verify(task.form, expected)
                tasks.append(task)
        except Wrong as wrong:
            failures.append(Failure(str(case), subject.name, str(wrong), wrong=True))
            workload.fill()
        except RuntimeError as error:
            reason = f"it cannot be captured in a CUDA graph: {error}"
            failures.append(Failure(str(case), subject.name, reason, wrong=False))
    del expected
    gc.collect()
    rows = []
    for cache in caches(workload):
        times = interleave(Player(workload), tasks, cache, effort)
        for (name, clock), values in times.items():
            subject = next(task.subject for task in tasks if task.subject.name == name)
            p10, median, p90 = percentiles(values)
            rows.append(
                Row(
                    section=section,
                    model=case.model,
                    elements=workload.elements,
                    tensors=len(workload.shapes),
                    dtype=case.dtype,
                    fraction=case.fraction,
                    amplified=workload.amplified_fraction,
                    timing=case.timing,
                    subject=name,
                    leaves_out=subject.leaves_out,
                    cache=cache,
                    clock=clock,
                    bytes=least_bytes(subject, case, workload),
                    runs=len(values),
                    p10=p10,
                    median=median,
                    p90=p90,
                )
            )
    return rows, failures
