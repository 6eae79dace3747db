"""What the CUDA C++ step has to reach on a GPU, measured and judged. The bars are for an H200.

python -m bench.gpu.bars --out FOLDER               all bars: bars.json, bars.csv and a table
python -m bench.gpu.bars --out FOLDER --only rates  these alone; the others found there are kept

Every subject is checked against the fp64 reference before it is timed; times are the device's,
of CUDA graphs, medians over interleaved rounds. "Cold" goes round through copies of the
gradients that no cache can hold.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from bench import clocks
from bench.baselines import Fused, Subject, amplifier_options
from bench.gpu import traffic
from bench.gpu.subjects import KernelCopy, MemoryCopy, Reading, Scaled, UnscaleAndClip
from bench.gpu.traffic import BF16, FP32, wide
from bench.micro import Effort, Player, Replayed, Task, interleave, verify
from bench.results import describe_machine, percentiles
from bench.shapes import MODELS, Shapes, elements
from bench.verify import Expected
from bench.workload import FACTOR, Buffers, Workload, cache_bytes, copies_for, same_bits
from gradamp_fast import Amplifier

EFFORT = Effort(fewest=9, most=31, seconds=0.4)


@dataclass(frozen=True)
class Bar:
    """One bar in one case; ``passed`` is None where nothing is judged: ``note`` says why."""

    number: int
    case: str
    what: str
    value: float | None
    limit: float | None
    unit: str
    passed: bool | None
    note: str = ""
    part: str = ""  # the function below that measured it


def at_most(number: int, case: str, what: str, value: float, limit: float, unit: str) -> Bar:
    return Bar(number, case, what, value, limit, unit, value <= limit)


def at_least(number: int, case: str, what: str, value: float, limit: float, unit: str) -> Bar:
    return Bar(number, case, what, value, limit, unit, value >= limit)


def beside(number: int, case: str, what: str, value: float, unit: str = "") -> Bar:
    """A second yardstick, told and not judged."""
    return Bar(number, case, what, value, None, unit, None, "for comparison")


def many(count: int) -> Shapes:
    return {f"m{i}.weight": (1 + 37 * i % 3000,) for i in range(count)}


# ---- measuring ------------------------------------------------------------------------


class Scene:
    """Gradients of some shapes, and medians of what is run on them, microseconds."""

    def __init__(
        self, shapes: Shapes, dtype: torch.dtype, fraction: float, keep: bool = False
    ) -> None:
        device = torch.device("cuda")
        copies = copies_for(elements(shapes) * dtype.itemsize, device)
        self.work = Workload(shapes, dtype, device, fraction, copies, keep)

    def fused(self, timing: str, scaled: bool = False) -> Subject:
        """The package's step, once it has given what the reference gives."""
        options = amplifier_options(timing, self.work)
        subject = Scaled(self.work, options) if scaled else Fused(self.work, "cuda", options)
        verify(subject, Expected(self.work, options))
        subject.name = timing
        return subject

    def medians(self, subjects: list[Subject], cache: str) -> dict[str, float]:
        clock = clocks.QueuedCuda(self.work.device, "graph")
        tasks = [Task(s, Replayed(s, self.work), clock) for s in subjects]
        times = interleave(Player(self.work), tasks, cache, EFFORT)
        return {name: percentiles(values)[1] for (name, _), values in times.items()}


def label(model: str, dtype: torch.dtype, fraction: float, cache: str = "cold") -> str:
    return f"{model} {'fp32' if dtype == FP32 else 'bf16'} f={fraction:g} {cache}"


def launches() -> Iterator[Bar]:
    for count in (161, 1000):
        shapes = many(count)
        kinds = (FP32, BF16, torch.float16, torch.float64)
        parameters = [
            torch.nn.Parameter(torch.zeros(shape, dtype=kinds[i % 4], device="cuda"))
            for i, shape in enumerate(shapes.values())
        ]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        model = torch.nn.ParameterList(parameters)
        amplifier = Amplifier(model, backend="cuda")
        for _ in range(3):
            amplifier.step()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            amplifier.step()
            torch.cuda.synchronize()
        cuda = torch.autograd.DeviceType.CUDA
        seen = sum(event.device_type == cuda for event in profile.events())
        case = f"{count} tensors of mixed dtypes"
        yield Bar(1, case, "kernels, copies and memsets", seen, 1, "", seen == 1)


def rates() -> Iterator[Bar]:
    for dtype in (FP32, BF16):
        for model, shapes, share in (
            ("8 x 4096^2", wide(8), 0.90),
            ("gpt2", MODELS["gpt2"](), 0.90),
            ("resnet50", MODELS["resnet50"](), 0.75),
            ("resnet18", MODELS["resnet18"](), None),
        ):
            for fraction in (0.25, 1.0):
                scene = Scene(shapes, dtype, fraction)
                moved = 1.0 + scene.work.amplified_fraction
                copies = [kind(scene.work, moved) for kind in (MemoryCopy, KernelCopy)]
                for cache in ("cold", "warm") if share is None else ("cold",):
                    took = scene.medians([scene.fused("lagged"), *copies], cache)
                    case, ours = label(model, dtype, fraction, cache), took["lagged"]
                    node, kernel = took[MemoryCopy.name], took[KernelCopy.name]
                    if share is None:
                        yield at_most(2, case, "lagged - copy", ours - node, 6.0, "us")
                        yield beside(2, case, "lagged - kernel copy", ours - kernel, "us")
                    else:
                        yield at_least(2, case, "copy / lagged", node / ours, share, "")
                        yield beside(2, case, "kernel copy / lagged", kernel / ours)
        scene = Scene(wide(16), dtype, 0.0)
        reading: list[Subject] = [Reading(scene.work, name) for name in ("sum", "amax")]
        took = scene.medians([scene.fused("lagged"), *reading], "cold")
        ratio = took["lagged"] / min(took["sum"], took["amax"])
        limit = 1.05 if dtype == FP32 else 1.10
        yield at_most(2, label("16 x 4096^2", dtype, 0.0), "lagged / reduction", ratio, limit, "")


def exactness() -> Iterator[Bar]:
    for dtype in (FP32, BF16):
        scene = Scene(MODELS["resnet18"](), dtype, 0.25)
        for cache in ("cold", "warm"):
            took = scene.medians([scene.fused("lagged"), scene.fused("exact")], cache)
            more = took["exact"] - took["lagged"]
            yield at_most(4, label("resnet18", dtype, 0.25, cache), "exact - lagged", more, 5, "us")


def clipping() -> Iterator[Bar]:
    for model in ("resnet50", "gpt2"):
        for dtype in (FP32, BF16):
            scene = Scene(MODELS[model](), dtype, 0.25, keep=True)
            options = amplifier_options("clip", scene.work)
            theirs = UnscaleAndClip(scene.work, options["max_norm"])
            took = scene.medians([scene.fused("clip", scaled=True), theirs], "cold")
            ratio = took["clip"] / took[theirs.name]
            yield at_most(5, label(model, dtype, 0.25), f"ours / {theirs.name}", ratio, 0.65, "")


def host_time() -> Iterator[Bar]:
    for model, shapes in (("resnet50", MODELS["resnet50"]()), ("1000 tensors", many(1000))):
        scene = Scene(shapes, FP32, 0.0)
        subject = scene.fused("lagged")
        subject.take(scene.work.sets[0], FACTOR)
        clock = clocks.EagerCuda(scene.work.device)
        host = percentiles([clock(subject.run)["host"] for _ in range(300)][50:])[1]
        limit = 10.0 + 0.05 * len(shapes)
        yield at_most(6, f"{model}: {len(shapes)} tensors", "host time", host, limit, "us")


def misaligned(work: Workload) -> Buffers:
    """The first set's values, each gradient one element behind where it was."""
    flat = torch.empty(work.sets[0].flat.numel() + 1, dtype=work.dtype, device=work.device)
    flats = work.views(flat[1:])
    for mine, theirs in zip(flats, work.sets[0].flats, strict=True):
        mine.copy_(theirs)
    shapes = work.shapes.values()
    return Buffers(flat, [f.view(s) for f, s in zip(flats, shapes, strict=True)], flats)


def alignment() -> Iterator[Bar]:
    for dtype in (FP32, BF16):
        for fraction in (0.0, 0.25, 1.0):
            scene = Scene(wide(8), dtype, fraction)
            subject, aligned, shifted = (
                scene.fused("lagged"),
                scene.work.sets[0],
                misaligned(scene.work),
            )
            clock = clocks.QueuedCuda(scene.work.device, "graph")
            times: dict[bool, list[float]] = {False: [], True: []}
            graphs = {}
            for odd, buffers in ((False, aligned), (True, shifted)):
                subject.take(buffers, FACTOR)
                graphs[odd] = clocks.capture(subject.run)
            for round_ in range(30):
                subject.take(aligned, 1.0 / FACTOR if round_ % 2 else FACTOR)
                for odd, graph in graphs.items():
                    times[odd] += clock(graph).values()
            note = "" if same_bits(aligned.flats, shifted.flats) else "results differ"
            ratio = percentiles(times[True][5:])[1] / percentiles(times[False][5:])[1]
            case = label("8 x 4096^2", dtype, fraction)
            yield Bar(
                6, case, "misaligned / aligned", ratio, 1.10, "", ratio <= 1.10 and not note, note
            )


def dram_bytes() -> Iterator[Bar]:
    """Ends with the first case that cannot be counted: the others could not be either."""
    for case, (_, _, _, timing) in traffic.CASES.items():
        found = traffic.count(case)
        least = 1.0 + found.amplified
        if timing == "lagged":
            limit = 1.03 * least
        elif found.gradients <= cache_bytes(torch.device("cuda")) / 2:
            limit = 1.05 * least
        else:
            limit = 1.0 + 2.0 * found.amplified
        what = "DRAM bytes / gradients'"
        if found.moved is None:
            yield Bar(3, case, what, None, limit, "", None, found.note)
            return
        yield at_most(3, case, what, found.moved / found.gradients, limit, "")


# ---- the whole ------------------------------------------------------------------------

PARTS = {
    part.__name__: part
    for part in (launches, host_time, rates, exactness, clipping, alignment, dram_bytes)
}


def show(bar: Bar) -> str:
    verdict = {True: "passed", False: "MISSED", None: "not judged:"}[bar.passed]
    value, limit = ("-" if x is None else f"{x:.3f}" for x in (bar.value, bar.limit))
    return (
        f"{bar.number}  {bar.case:34} {bar.what:30} {value:>9} {limit:>8} {bar.unit:2} "
        f"{verdict} {bar.note}"
    )


def measured(names: list[str]) -> Iterator[Bar]:
    for name in names:
        try:
            for bar in PARTS[name]():
                yield replace(bar, part=name)
        except Exception as error:  # the other bars are measured all the same
            note = f"{type(error).__name__}: {error}"
            yield Bar(0, name, "stopped", None, None, "", False, note, name)


def earlier(folder: Path, names: list[str]) -> list[Bar]:
    """What other parts left in the folder."""
    file = folder / "bars.json"
    bars = json.loads(file.read_text())["bars"] if file.exists() else []
    return [Bar(**bar) for bar in bars if bar["part"] not in names]


def save(bars: list[Bar], machine: dict[str, Any], folder: Path) -> None:
    """After every bar: the run may be cut off."""
    record = {"machine": machine, "bars": [asdict(bar) for bar in bars]}
    (folder / "bars.json").write_text(json.dumps(record, indent=1) + "\n")
    with (folder / "bars.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Bar)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(bar) for bar in bars)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the results")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts (default: all)")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.bars: NO GPU: torch finds no CUDA device here; nothing was measured")
        return 2
    machine = describe_machine(torch.device("cuda"))
    given.out.mkdir(parents=True, exist_ok=True)
    names = given.only or list(PARTS)
    before, bars = earlier(given.out, names), []
    for bar in measured(names):
        bars.append(bar)
        print(show(bar), flush=True)
        save(before + bars, machine, given.out)
    passed, missed = (sum(bar.passed is verdict for bar in bars) for verdict in (True, False))
    print(f"{passed} passed, {missed} missed, {len(bars) - passed - missed} not judged")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
