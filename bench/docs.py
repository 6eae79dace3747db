"""The measured parts of docs/benchmarks.md, written from stored results.

A part stands between ``<!-- bench: NAME -->`` and ``<!-- end -->``; the rest of the document is
written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from bench.report import (
    BASELINES,
    CURVES,
    LABELS,
    UPDATE_BARS,
    UPDATE_HEADINGS,
    Comparison,
    bars,
    comparisons,
    curve_lines,
    duration,
    headlines,
    machine_line,
    main_clock,
    measured_baselines,
    share,
    spread,
    times,
    updates,
)
from bench.results import Results, Row
from bench.shapes import TITLES

NOTHING = "Not measured yet: `python -m bench`, then `python -m bench --docs`."
_PART = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FAR = 1.3  # times the floor: worth naming
SHOWN = 5  # rows of a long table; the rest is in the CSV file


def write(path: Path, all_results: Sequence[Results]) -> None:
    """Replaces every part of the document. Raises KeyError for a part that does not exist."""

    def replaced(found: re.Match[str]) -> str:
        make = PARTS[found[2]]
        texts = [text for results in all_results if (text := "\n".join(make(results)).strip())]
        return f"{found[1]}\n{(chr(10) * 2).join(texts) if texts else NOTHING}\n\n{found[3]}"

    path.write_text(_PART.sub(replaced, path.read_text()))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table with an empty line behind it; nothing without rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if not lines:
        return []
    ruler = "|" + " --- |" + " ---: |" * (len(headings) - 1)
    return ["| " + " | ".join(headings) + " |", ruler, *lines, ""]


def with_lines(page: str, name: str, lines: Iterable[str]) -> str:
    """The page with these lines between ``<!-- NAME -->`` and ``<!-- end -->``."""
    begin, end = f"<!-- {name} -->\n", "<!-- end -->"
    before, _, rest = page.partition(begin)
    after = rest.partition(end)[2]
    if not after:
        raise ValueError(f"the page holds no {begin.strip()} followed by {end}")
    return f"{before}{begin}\n{chr(10).join(lines)}\n{end}{after}"


def _device(results: Results) -> str:
    return "GPU" if results.machine["device"] == "cuda" else "CPU"


# ---- parts --------------------------------------------------------------------------


def conditions(results: Results) -> Iterator[str]:
    machine = results.machine
    yield f"- **{_device(results)}**: {machine_line(results)}."
    details = [f"{machine['cores']} cores", f"{machine['memory'] / 2**30:.0f} GiB of memory"]
    if "instructions" in machine:
        details.append(f"{machine['instructions']} kernels on the CPU")
    details += [machine["system"], f"Python {machine['python']}"]
    if machine["load"] is not None:
        details.append(f"load {machine['load']:.2f} when it began")
    yield f"  {', '.join(details)}{', `--quick`' if results.quick else ''}."


def summary(results: Results) -> Iterator[str]:
    """A few lines that stand by themselves."""
    clock = main_clock(results)
    machine = results.machine
    cases = [c for c in headlines(results, clock) if c.row.model == "resnet50"]
    for case in cases:
        ratios = [
            f"{case.times_faster(name):.1f} times as fast as {LABELS.get(name, name)}"
            for name in BASELINES
            if name in case.others
        ]
        yield (
            f"- `{case.row.subject}` backend, gradients of ResNet-50 in {case.row.dtype}, a "
            f"quarter amplified: {duration(case.row.median)} a step, {case.of_floor:.2f} times "
            f"what moving the bytes takes; {', '.join(ratios)}."
        )
    for training in results.training:
        yield (
            f"- Training {training.model} ({training.batch}): {training.overhead[1]:+.1f} % a step "
            f"({training.overhead[0]:+.1f} to {training.overhead[2]:+.1f})."
        )
    if cases or results.training:
        yield f"- Measured on {machine['name']}, {machine['threads']} threads, cold caches."


def promises(results: Results) -> Iterator[str]:
    rows = [
        (b.what, f"{b.value:.3g} {b.unit}", b.promise, "yes" if b.met else "**no**")
        for b in bars(results)
    ]
    yield from table(("what", "measured", "promised", "met"), rows)


def models(results: Results) -> Iterator[str]:
    clocks = (
        ("wall",) if results.machine["device"] == "cpu" else ("wall", "host", "device", "graph")
    )
    for clock in clocks:
        yield from _cases(results, headlines(results, clock))


def combinations(results: Results) -> Iterator[str]:
    mine = [
        c
        for c in comparisons(results)
        if (c.row.model, c.row.fraction) == ("resnet50", 0.25)
        and (c.row.cache, c.row.clock) == ("cold", main_clock(results))
    ]
    yield from _cases(results, mine)


def warm(results: Results) -> Iterator[str]:
    mine = [
        c
        for c in comparisons(results)
        if (c.row.cache, c.row.clock) == ("warm", main_clock(results))
        and (c.row.fraction, c.row.timing) == (0.25, "lagged")
    ]
    yield from _cases(results, mine)


def _cases(results: Results, cases: Sequence[Comparison]) -> Iterator[str]:
    baselines = [b for b in measured_baselines(results) if any(b in c.others for c in cases)]
    headings = ("gradients", "f", "timing", "backend", "clock", "median (p10 - p90)", "of floor")
    rows = [
        (
            f"{TITLES[c.row.model]} {c.row.dtype}",
            f"{c.row.amplified:.2f}",
            c.row.timing,
            c.row.subject,
            c.row.clock,
            _median(c.row),
            times(c.of_floor),
            *(times(c.times_faster(name)) for name in baselines),
        )
        for c in cases
    ]
    yield from table((*headings, *(LABELS.get(name, name) for name in baselines)), rows)


def optimizers(results: Results) -> Iterator[str]:
    rows = [
        (u.about, _median(u.rows["torch"]), *(times(u.ratio(a, b)) for a, b, *_ in UPDATE_BARS))
        for u in updates(results)
        if "torch" in u.rows
    ]
    yield from table(UPDATE_HEADINGS, rows)


def _median(row: Row) -> str:
    return f"{duration(row.median)} ({duration(row.p10)} - {duration(row.p90)})"


def curves(results: Results) -> Iterator[str]:
    rows = [
        (CURVES[section][0], subject, duration(intercept), f"{slope:.3g} {CURVES[section][1]}")
        for section, subject, _, intercept, slope in curve_lines(results)
    ]
    yield from table(("against", "subject", "at 0", "slope"), rows)


def training(results: Results) -> Iterator[str]:
    rows = [
        (t.model, t.batch, spread(t.plain, "ms"), spread(t.overhead, "%"), spread(t.inside, "ms"))
        for t in results.training
    ]
    yield from table(("model", "batch", "plain step", "overhead", "in the call"), rows)


def memory(results: Results) -> Iterator[str]:
    rows = [
        (
            f"{TITLES[m.model]} {m.dtype}",
            f"{m.gradients / 2**20:.1f} MiB",
            f"{m.state / 2**20:.2f} MiB",
            f"{m.workspace / 2**20:.2f} MiB",
            f"{share(m):.2%}",
            f"{m.growth / 2**10:.0f} KiB",
        )
        for m in results.memory
    ]
    headings = ("model", "gradients", "state", "workspace", "share", "growth in later steps")
    yield from table(headings, rows)


def slower(results: Results) -> Iterator[str]:
    """Where a baseline was as fast or faster, and where the floor is far."""
    clock = main_clock(results)
    found = [
        c
        for section in ("models", *CURVES)
        for c in comparisons(results, section)
        if c.row.clock == clock
    ]
    beaten = [
        (c, name, ratio)
        for c in found
        for name in BASELINES
        if (ratio := c.times_faster(name)) is not None and ratio < 1.0
    ]
    far = [c for c in found if c.of_floor is not None and c.of_floor > FAR]
    if not found:
        return
    yield f"On the {_device(results)}, of {len(found)} cases:"
    yield ""
    yield from table(
        (
            "slower than a baseline",
            "backend",
            "cache",
            "baseline",
            "time of ours / of the baseline",
        ),
        [
            (_name(c), c.row.subject, c.row.cache, LABELS.get(name, name), f"{1 / ratio:.2f}")
            for c, name, ratio in sorted(beaten, key=lambda item: item[2])
        ],
    ) or ["No baseline was faster.", ""]
    if not far:
        yield f"None took more than {FAR:g} times the floor."
        return
    far.sort(key=lambda c: -(c.of_floor or 0.0))
    dtypes = ", ".join(sorted({c.row.dtype for c in far}))
    yield f"{len(far)} took more than {FAR:g} times the floor ({dtypes}). The farthest from it:"
    yield ""
    yield from table(
        ("gradients", "backend", "cache", "of floor"),
        [(_name(c), c.row.subject, c.row.cache, times(c.of_floor)) for c in far[:SHOWN]],
    )


def _name(case: Comparison) -> str:
    row = case.row
    return f"{TITLES.get(row.model, row.model)} {row.dtype}, f = {row.fraction:g}, {row.timing}"


PARTS: dict[str, Callable[[Results], Iterator[str]]] = {
    part.__name__: part
    for part in (
        conditions,
        summary,
        promises,
        models,
        combinations,
        warm,
        optimizers,
        curves,
        training,
        memory,
        slower,
    )
}
