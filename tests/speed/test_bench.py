"""The benchmarks themselves: verified before they are timed, stored, compared, written up."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console

from bench import __main__ as command
from bench import baselines, docs, figures, micro, report, scaling, shapes
from bench.results import Failure, Memory, Results, Row, Training, compare, describe_machine
from bench.verify import Expected, Wrong
from bench.workload import Workload, choose_layers, same_bits

CPU = torch.device("cpu")
EFFORT = micro.Effort(fewest=2, most=3, seconds=0.0)
# Buckets of all three lengths, one of them with a rest; a scalar; odd sizes.
SMALL: shapes.Shapes = {
    "stem.weight": (7, 5),
    "stem.bias": (7,),
    "wide.weight": (300, 441),
    "body.weight": (67, 65),
    "body.bias": (67,),
    "scale": (),
    "head.weight": (1000, 9),
}


def workload(dtype: str, fraction: float, keep: bool = False, copies: int = 2) -> Workload:
    return Workload(SMALL, micro.DTYPES[dtype], CPU, fraction, copies, keep)


def measured(
    case: micro.Case, makers: list[Callable[[], baselines.Subject]] | None = None
) -> tuple[list[Row], list[Failure], Workload]:
    work = workload(case.dtype, case.fraction, keep=case.timing == "clip")
    found = micro.subjects(case, work, quick=True) if makers is None else makers
    rows, failures = micro.measure("models", case, work, found, EFFORT)
    return rows, failures, work


# ---- what is measured on ------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg19", "vit_b_16"])
def test_shapes_are_those_of_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models", exc_type=(ImportError, RuntimeError))
    with torch.device("meta"):
        model = getattr(models, name)()
    named = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert list(shapes.MODELS[name]().items()) == named


def test_sizes_of_the_language_models() -> None:
    assert shapes.elements(shapes.MODELS["gpt2"]()) == 124_439_808
    assert 1.0e9 < shapes.elements(shapes.MODELS["llama_1b"]()) < 1.2e9


@pytest.mark.parametrize("name", list(shapes.MODELS))
def test_a_quarter_of_the_elements(name: str) -> None:
    model = shapes.MODELS[name]()
    chosen = choose_layers(model, 0.25)
    held = shapes.elements({n: s for n, s in model.items() if n.rpartition(".")[0] in chosen})
    assert 0.2 < held / shapes.elements(model) <= 0.25
    assert not choose_layers(model, 0.0)


# ---- verified, then timed -----------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "timing", "fraction"),
    [
        *itertools.product(["fp32", "bf16"], ["lagged", "exact", "clip"], [0.25]),
        ("fp32", "lagged", 0.0),
        ("bf16", "clip", 1.0),
    ],
)
def test_every_subject_is_right_and_leaves_the_values(
    dtype: str, timing: str, fraction: float
) -> None:
    before = workload(dtype, fraction).sets[0].flats
    rows, failures, work = measured(micro.Case("small", dtype, fraction, timing))
    assert not failures
    assert {row.subject for row in rows} >= {"clip_grad_norm_", "copy", "floor"}
    assert {row.cache for row in rows} == {"cold", "warm"}
    assert all(0 < row.p10 <= row.median <= row.p90 and row.runs == 2 for row in rows)
    for buffers in work.sets:
        assert buffers.amplified or same_bits(buffers.flats, before)


@pytest.mark.slow
def test_the_compiled_baseline_is_right() -> None:
    work = workload("fp32", 0.25)
    subject = baselines.Compiled(work)
    micro.verify(subject, Expected(work, baselines.amplifier_options("lagged", work)))


class _Off(baselines.Foreach):
    """Multiplies once too often."""

    name = "off"

    def step(self) -> None:
        super().step()
        self.gradients[-1].mul_(1.0001)


class _Blind(baselines.Foreach):
    """Multiplies as it should, and measures nothing."""

    name = "blind"

    def step(self) -> None:
        torch._foreach_mul_(self.selected, self.factor)


@pytest.mark.parametrize("subject", [_Off, _Blind])
def test_no_number_for_a_wrong_result(subject: type[baselines.Foreach]) -> None:
    work = workload("fp32", 0.25)
    case = micro.Case("small", "fp32", 0.25, "lagged")
    makers = [lambda: baselines.Copy(work), lambda: subject(work)]
    rows, failures = micro.measure("models", case, work, makers, EFFORT)
    assert {row.subject for row in rows} == {"copy"}
    assert same_bits(work.sets[0].flats, workload("fp32", 0.25).sets[0].flats)
    assert [(failure.subject, failure.wrong) for failure in failures] == [(subject.name, True)]
    shown = io.StringIO()
    results = Results(describe_machine(CPU), True, rows, failures)
    report.show(results, Console(file=shown, width=250))
    assert f"not timed: {case}, {subject.name}" in shown.getvalue()
    assert shown.getvalue().count(subject.name) == 1


def test_one_step_is_checked_of_what_is_huge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.verify.TWO_STEPS", 1)
    before = workload("fp32", 1.0).sets[0].flats
    work = workload("fp32", 1.0)
    expected = Expected(work, baselines.amplifier_options("lagged", work))
    assert expected.steps == 1
    micro.verify(baselines.Loop(work), expected)
    assert same_bits(work.sets[0].flats, before)
    with pytest.raises(Wrong, match="step 1"):
        micro.verify(_Off(work), expected)


def test_cases_of_a_cpu() -> None:
    every = micro.cases(CPU, quick=False)
    assert len(every) == len(set(every))
    assert {case.model for case in every} == set(shapes.MODELS)
    assert len([case for case in every if case.model == "resnet50"]) == 18
    assert len(micro.cases(CPU, quick=True)) == 2


# ---- curves -------------------------------------------------------------------------


def test_a_point_of_every_curve() -> None:
    points = {point.section: point for point in scaling.points(CPU, quick=False)[::-1]}
    assert set(points) == set(report.CURVES)
    for section in ("elements", "small"):
        point = next(p for p in scaling.points(CPU, quick=True) if p.section == section)
        rows, failures = scaling.run_point(point, CPU, EFFORT)
        assert not failures
        assert {row.section for row in rows} == {section}


def test_fit() -> None:
    line = scaling.fit([(x, 3.0 + 0.5 * x) for x in (1, 10, 1000, 100_000)])
    assert line.intercept == pytest.approx(3.0)
    assert line.slope == pytest.approx(0.5)


# ---- results ------------------------------------------------------------------------


@pytest.fixture
def results() -> Results:
    """Everything a run can hold, without running it."""
    row = Row(
        section="models",
        model="resnet50",
        elements=25_557_032,
        tensors=161,
        dtype="fp32",
        fraction=0.25,
        amplified=0.2497,
        timing="lagged",
        subject="cpu",
        leaves_out="",
        cache="cold",
        clock="wall",
        bytes=128_000_000,
        runs=5,
        p10=3900.0,
        median=4000.0,
        p90=4100.0,
    )

    def beside(subject: str, median: float, moved: int = 0) -> Row:
        return dataclasses.replace(
            row, subject=subject, median=median, p10=median, p90=median, bytes=moved
        )

    rows = [row, beside("loop", 24_000.0), beside("foreach", 3_200.0)]
    rows += [beside("copy", 6_000.0, 204_000_000), beside("floor", 3_800.0, 153_000_000)]
    for n in (1, 161, 4000):
        small = dataclasses.replace(row, section="small", model=f"{n} x 1", elements=n, tensors=n)
        rows.append(dataclasses.replace(small, median=5.0 + 0.06 * n))
    return Results(
        describe_machine(CPU),
        quick=False,
        rows=rows,
        failures=[Failure("case", "subject", "reason", wrong=False)],
        training=[Training("Net", "8", 10, 3, (1, 2, 3), (1, 2, 3), (-1, 2.5, 3), (0.1, 0.2, 0.3))],
        memory=[Memory("vit_b_16", "fp32", 346_270_624, 2_348_720, 747_776, 0)],
    )


def test_results_survive_their_files(results: Results, tmp_path: Path) -> None:
    stored, table = results.save(tmp_path)
    assert Results.load(stored) == results
    data = json.loads(stored.read_text())
    assert set(data) == {f.name for f in dataclasses.fields(Results)}
    assert {"name", "threads", "torch", "commit", "date"} <= set(data["machine"])
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(results.rows)
    assert float(lines[0]["median"]) == 4000.0
    stored.write_text(json.dumps(data | {"schema": 0}))
    with pytest.raises(ValueError, match="schema 0"):
        Results.load(stored)


def slower(results: Results, times: float) -> Results:
    rows = [
        dataclasses.replace(r, p10=r.p10 * times, median=r.median * times, p90=r.p90 * times)
        if r.subject == "loop"
        else r
        for r in results.rows
    ]
    return dataclasses.replace(results, rows=rows)


@pytest.mark.parametrize(("times", "regressions"), [(1.5, ["loop"]), (1.05, []), (0.5, [])])
def test_compare(results: Results, tmp_path: Path, times: float, regressions: list[str]) -> None:
    now = slower(results, times)
    found = [change.row.subject for change in compare(results, now) if change.regression]
    assert found == regressions
    old, _ = results.save(tmp_path / "old")
    now.save(tmp_path / "new")
    arguments = ["--compare", str(old), "--out", str(tmp_path / "new")]
    assert command.main(arguments) == int(bool(regressions))


def test_tables_say_what_was_measured(results: Results) -> None:
    shown = io.StringIO()
    report.show(results, Console(file=shown, width=250))
    text = shown.getvalue()
    for expected in ("4.00 ms", "6.00x", "1.05x", "0.80x", "94%", "2.5 % (-1.0 - 3.0)"):
        assert expected in text, expected
    met = {bar.what: bar.met for bar in report.bars(results)}
    assert met["faster than the plain loop, ResNet-50 fp32"]
    assert met["161 one-element tensors, cold"]
    assert not any("compile" in what for what in met)


def test_the_document_is_written_from_results(results: Results, tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    parts = "\n\n".join(f"<!-- bench: {part} -->\nold\n<!-- end -->" for part in docs.PARTS)
    document.write_text(f"# By hand\n\n{parts}\n")
    docs.write(document, [])
    assert document.read_text().count(docs.NOTHING) == len(docs.PARTS)
    docs.write(document, [results])
    text = document.read_text()
    assert text.startswith("# By hand\n")
    assert "old" not in text.split()
    assert "| ResNet-50 fp32, f = 0.25, lagged | cpu | cold | foreach | 1.25 |" in text
    docs.write(document, [results])
    assert document.read_text() == text


def test_the_document_has_every_part() -> None:
    text = command.DOCUMENT.read_text()
    assert all(f"<!-- bench: {part} -->" in text for part in docs.PARTS)


def test_figures(results: Results, tmp_path: Path) -> None:
    written = figures.draw(results, tmp_path)
    assert [path.name for path in written] == ["cpu-bandwidth.png", "cpu-speedup.png"]
    assert all(path.stat().st_size > 5_000 for path in written)
    nothing = dataclasses.replace(results, rows=[])
    assert figures.draw(nothing, tmp_path) == []


def test_unknown_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["modls"])
    assert "choose from models, optimizers, scaling, training, memory" in capsys.readouterr().err


def test_the_table_of_state_sizes_is_that_of_the_models() -> None:
    pytest.importorskip("torchvision")
    from bench import state_size

    page = (Path(__file__).parents[2] / "docs" / "how-it-works.md").read_text()
    assert state_size.page_with_table(page) == page
    shares = [float(row[-1].rstrip("%")) for row in state_size.rows()]
    assert shares[0] < 1 < 10 < shares[-1]


def test_the_calls_on_large_models_are_verified_before_they_are_timed() -> None:
    from bench import large

    assert all(took > 0 for took in large.microseconds(40, repeats=1).values())
    assert all(holds(call()) for _, call, holds in large.calls(40))
