"""Results as tables, on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.results import Change, Memory, Results, Row
from bench.scaling import fit
from bench.shapes import TITLES

PACKAGE = ("cuda", "triton", "cpu")  # backends that are meant to be fast, best first
BASELINES = ("loop", "foreach", "compile", "torch", "foreach + clip", "clip_grad_norm_")
LABELS = {"torch": "torch backend"}
OPTIMIZERS = {"sgd": "SGD with momentum", "adamw": "AdamW"}
# Subject, what its time is divided by, and the limit and the aim on a CPU.
UPDATE_BARS = (
    ("alone", "torch", 0.95, 0.85),
    ("amplified", "torch", 1.00, 0.90),
    ("amplified", "attach + torch", 0.75, 0.65),
)
UPDATE_HEADINGS = ("step", "torch, fused", *(f"{a} / {b}" for a, b, *_ in UPDATE_BARS))
PROMISED_UPDATES = (("resnet50", "fp32"), ("gpt2", "fp32"))
CURVES = {
    "elements": ("elements, in 8 tensors, 2 of them amplified", "ns an element"),
    "tensors": ("tensors with 16 M elements in all, all amplified", "ns a tensor"),
    "small": ("tensors of one element, all amplified", "ns a tensor"),
}


@dataclass(frozen=True)
class Comparison:
    """One case in one cache and by one clock: the package's row, and the others by subject."""

    row: Row
    others: dict[str, Row]

    def times_faster(self, subject: str) -> float | None:
        """How many times faster than the subject; None if that was not measured."""
        other = self.others.get(subject)
        return other.median / self.row.median if other else None

    @property
    def of_floor(self) -> float | None:
        """Time, in units of what the bytes alone take."""
        floor = self.others.get("floor")
        return self.row.median / floor.median if floor else None

    @property
    def copy_share(self) -> float | None:
        """Achieved bandwidth, as a share of a copy's."""
        copy = self.others.get("copy")
        return bandwidth(self.row) / bandwidth(copy) if copy else None


def bandwidth(row: Row) -> float:
    """Bytes that have to be moved by the time: GB/s."""
    return row.bytes / row.median / 1e3


def comparisons(results: Results, section: str = "models") -> Iterator[Comparison]:
    """Every row of the package's fast backends, with what it was measured beside."""
    rows = results.find(section=section)
    for row in rows:
        if row.subject in PACKAGE:
            about = row.label, row.elements, row.tensors, row.cache, row.clock
            beside = {
                r.subject: r
                for r in rows
                if (r.label, r.elements, r.tensors, r.cache, r.clock) == about
            }
            yield Comparison(row, beside)


def main_clock(results: Results) -> str:
    """The one that tells what the work itself takes."""
    return "wall" if results.machine["device"] == "cpu" else "graph"


def headlines(results: Results, clock: str) -> list[Comparison]:
    """One for each model, dtype and fast backend: lagged, a quarter amplified, cold."""
    return [
        c
        for c in comparisons(results)
        if (c.row.fraction, c.row.timing, c.row.cache, c.row.clock)
        == (0.25, "lagged", "cold", clock)
    ]


@dataclass(frozen=True)
class Update:
    """Steps of one optimizer on one list of shapes, by subject."""

    rule: str
    rows: dict[str, Row]

    @property
    def about(self) -> str:
        row = next(iter(self.rows.values()))
        return f"{OPTIMIZERS[self.rule]}, {TITLES[row.model]} {row.dtype}"

    def ratio(self, subject: str, other: str) -> float | None:
        """Time of one by that of another; None if either was not measured."""
        if subject not in self.rows or other not in self.rows:
            return None
        return self.rows[subject].median / self.rows[other].median


def updates(results: Results) -> Iterator[Update]:
    for rule in OPTIMIZERS:
        rows = results.find(section=rule, clock=main_clock(results))
        for model, dtype in dict.fromkeys((row.model, row.dtype) for row in rows):
            mine = {row.subject: row for row in rows if (row.model, row.dtype) == (model, dtype)}
            yield Update(rule, mine)


# ---- what was promised --------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A promise, and what was measured."""

    what: str
    value: float
    unit: str
    limit: float
    at_most: bool
    aim: float | None = None

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    @property
    def promise(self) -> str:
        sign = "≤" if self.at_most else "≥"
        aim = f" (aim {self.aim:g})" if self.aim else ""
        return f"{sign} {self.limit:g} {self.unit}{aim}"


def bars(results: Results) -> Iterator[Bar]:
    """The promises for the CPU, as far as they were measured."""
    if results.machine["device"] != "cpu":
        return
    cases = {(c.row.model, c.row.dtype): c for c in headlines(results, "wall")}
    if (case := cases.get(("resnet50", "fp32"))) is not None:
        if (ratio := case.times_faster("loop")) is not None:
            yield Bar("faster than the plain loop, ResNet-50 fp32", ratio, "x", 4.5, False, 6)
        if (ratio := case.times_faster("compile")) is not None:
            what = "faster than torch.compile of the same result, ResNet-50 fp32"
            yield Bar(what, ratio, "x", 1.5, False)
    for model in ("resnet18", "resnet50", "vit_b_16"):
        for dtype in ("fp32", "bf16"):
            if (case := cases.get((model, dtype))) and (ratio := case.of_floor) is not None:
                what = f"time of the bytes, {TITLES[model]} {dtype}"
                yield Bar(what, ratio, "x", 1.5, True, 1.3)
    for row in results.find(section="small", tensors=161, subject="cpu"):
        yield Bar(f"161 one-element tensors, {row.cache}", row.median, "µs", 20, True)
    for update in updates(results):
        row = next(iter(update.rows.values()))
        for subject, other, limit, aim in UPDATE_BARS:
            ratio = update.ratio(subject, other)
            if ratio is not None and (row.model, row.dtype) in PROMISED_UPDATES:
                yield Bar(f"{subject} / {other}: {update.about}", ratio, "x", limit, True, aim)
    for memory in results.memory:
        if (memory.model, memory.dtype) == ("vit_b_16", "fp32"):
            what = "state and workspace, share of the gradients of ViT-B/16 fp32"
            yield Bar(what, 100 * share(memory), "%", 2, True)
        what = f"growth of memory in later steps, {TITLES[memory.model]} {memory.dtype}"
        yield Bar(what, memory.growth / 2**20, "MiB", 1, True)


def share(memory: Memory) -> float:
    """State and workspace in units of the gradients."""
    return (memory.state + memory.workspace) / memory.gradients


# ---- tables -------------------------------------------------------------------------


def duration(microseconds: float) -> str:
    if microseconds < 1_000:
        return f"{microseconds:.1f} µs"
    if microseconds < 1_000_000:
        return f"{microseconds / 1e3:.2f} ms"
    return f"{microseconds / 1e6:.2f} s"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def case_cells(case: Comparison, baselines: Sequence[str]) -> list[str]:
    row = case.row
    return [
        TITLES.get(row.model, row.model),
        row.dtype,
        f"{row.amplified:.2f}",
        row.timing,
        row.subject,
        row.cache,
        row.clock,
        duration(row.median),
        f"{duration(row.p10)} - {duration(row.p90)}",
        times(case.of_floor),
        "" if case.copy_share is None else f"{case.copy_share:.0%}",
        *(times(case.times_faster(name)) for name in baselines),
    ]


def case_headings(baselines: Sequence[str]) -> list[str]:
    fixed = "gradients,dtype,f,timing,backend,cache,clock,median,p10 - p90,of floor,of copy"
    return [*fixed.split(","), *(LABELS.get(name, name) for name in baselines)]


def measured_baselines(results: Results, section: str = "models") -> list[str]:
    """Those that were measured, in their order."""
    there = {row.subject for row in results.find(section=section)}
    return [name for name in BASELINES if name in there]


def curve_lines(results: Results) -> Iterator[tuple[str, str, str, float, float]]:
    """Curve, subject, cache, intercept (µs) and slope (ns) for what was measured at 3 points."""
    clock = main_clock(results)
    for section in CURVES:
        rows = results.find(section=section, clock=clock)
        for subject, cache in dict.fromkeys((r.subject, r.cache) for r in rows):
            mine = [r for r in rows if (r.subject, r.cache) == (subject, cache)]
            if cache == "cold" and subject != "copy" and len(mine) >= 3:
                x = [r.elements if section == "elements" else r.tensors for r in mine]
                line = fit(list(zip(x, (r.median for r in mine), strict=True)))
                yield section, subject, cache, line.intercept, 1e3 * line.slope


def spread(values: tuple[float, float, float], unit: str, digits: int = 1) -> str:
    """Median, and p10 to p90."""
    p10, median, p90 = (f"{value:.{digits}f}" for value in values)
    return f"{median} {unit} ({p10} - {p90})"


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def machine_line(results: Results) -> str:
    """The conditions, in one line."""
    machine = results.machine
    parts = [
        str(machine["name"]),
        f"{machine['threads']} threads",
        f"{machine['cache'] / 2**20:.0f} MiB last-level cache",
        f"torch {machine['torch']}",
    ]
    if machine["device"] == "cuda":
        parts += [f"CUDA {machine['cuda']}", f"driver {machine['driver']}"]
    parts += [f"gradamp_fast {machine['gradamp_fast']} at {machine['commit']}", machine["date"]]
    return ", ".join(parts)


def show(results: Results, console: Console) -> None:
    """All tables of what was measured."""
    console.print(machine_line(results))
    baselines = measured_baselines(results)
    cells = [case_cells(case, baselines) for case in comparisons(results)]
    if cells:
        title = "Steps on the gradients of models; under a baseline: how many times faster"
        console.print(_table(title, case_headings(baselines), cells))
    steps = [
        (
            u.about,
            duration(u.rows["torch"].median),
            *(times(u.ratio(a, b)) for a, b, *_ in UPDATE_BARS),
        )
        for u in updates(results)
        if "torch" in u.rows
    ]
    if steps:
        console.print(_table("Optimizers: a step, by torch's", UPDATE_HEADINGS, steps))
    lines = [
        (CURVES[section][0], subject, duration(intercept), f"{slope:.3g} {CURVES[section][1]}")
        for section, subject, _, intercept, slope in curve_lines(results)
    ]
    if lines:
        title = "How cost grows: the fitted line, cold"
        console.print(_table(title, ("against", "subject", "at 0", "slope"), lines))
    if results.training:
        rows = [
            (
                t.model,
                t.batch,
                spread(t.plain, "ms"),
                spread(t.overhead, "%"),
                spread(t.inside, "ms"),
            )
            for t in results.training
        ]
        title = "Whole training steps: median (p10 - p90)"
        console.print(_table(title, ("model", "batch", "plain", "overhead", "in the call"), rows))
    promises = [
        (bar.what, f"{bar.value:.3g} {bar.unit}", bar.promise, "met" if bar.met else "MISSED")
        for bar in bars(results)
    ]
    if promises:
        console.print(_table("Promises", ("what", "measured", "promised", ""), promises))
    for failure in results.failures:
        console.print(f"not timed: {failure.case}, {failure.subject}: {failure.reason}")


def show_changes(changes: Sequence[Change], console: Console) -> None:
    """What became slower or faster by a tenth, and how many did not."""
    rows = [
        (
            f"{change.row.label}, {change.row.cache}, {change.row.clock}",
            change.row.subject,
            duration(change.old),
            duration(change.new),
            f"{change.ratio:.2f}x",
            "REGRESSION" if change.regression else "",
        )
        for change in changes
        if change.regression or not 1 / 1.1 < change.ratio < 1.1
    ]
    if rows:
        headings = ("case", "subject", "old", "new", "new / old", "")
        console.print(_table("Medians that moved", headings, rows))
    console.print(f"{len(changes) - len(rows)} of {len(changes)} medians moved by less than 10 %")
