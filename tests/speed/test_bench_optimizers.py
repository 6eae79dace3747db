"""The benchmark of optimizers' steps: right before it is timed, written up as it was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from bench import docs, micro, optimizers, report, shapes
from bench.results import Failure, Results, Row, describe_machine
from bench.workload import same_bits

CPU = torch.device("cpu")
EFFORT = micro.Effort(fewest=2, most=3, seconds=0.0)
# A quarter can be chosen: "body" holds a sixth.
SMALL: shapes.Shapes = {
    "stem.weight": (7, 5),
    "wide.weight": (300, 441),
    "body.weight": (167, 165),
    "body.bias": (167,),
    "scale": (),
}


def bench(dtype: str, rule: str) -> optimizers.Bench:
    return optimizers.Bench(SMALL, micro.DTYPES[dtype], CPU, optimizers.RULES[rule])


def measured(
    dtype: str, rule: str, *makers: Callable[[optimizers.Bench], optimizers.Step]
) -> tuple[list[Row], list[Failure]]:
    case = optimizers.Case("resnet50", dtype, rule)
    return optimizers.measure(case, bench(dtype, rule), makers, EFFORT)


@pytest.mark.parametrize("rule", optimizers.RULES)
@pytest.mark.parametrize("dtype", micro.DTYPES)
def test_every_subject_is_right(dtype: str, rule: str) -> None:
    rows, failures = measured(dtype, rule, *optimizers.SUBJECTS)
    assert not failures
    assert [row.subject for row in rows] == ["torch", "alone", "amplified", "attach + torch"]
    numbers = [row.bytes / bench(dtype, rule).workload.gradient_bytes for row in rows]
    least = optimizers.RULES[rule].moves
    assert numbers[:3] == [least] * 3
    assert least + 1.1 < numbers[3] < least + 1.25


def test_all_work_on_the_same_memory() -> None:
    here = bench("fp32", "adamw")
    steps = [make(here) for make in optimizers.SUBJECTS]
    for step in steps:
        assert [p.data_ptr() for p in step.parameters] == [
            view.data_ptr() for view in here.workload.views(here.parameters)
        ]
        assert all(
            step.optimizer.state[p][key].data_ptr() == view.data_ptr()
            for key, flat in here.states.items()
            for p, view in zip(step.parameters, here.workload.views(flat), strict=True)
        )
    optimizers.verify(steps[0], here)
    assert not same_bits([here.parameters], [here.before])


class _Slow(optimizers.Alone):
    """Updates by half as much."""

    name = "slow"

    def __init__(self, bench: optimizers.Bench) -> None:
        super().__init__(bench)
        self.optimizer.param_groups[0]["lr"] *= 0.5


class _Plain(optimizers.Attached):
    """Measures, and amplifies nothing."""

    name = "plain"

    def take(self, *given: Any) -> None:
        super().take(*given)
        self.amplifier.factor = 1.0 + 1e-6


class _Blind(optimizers.Amplified):
    """Amplifies as it should; what it measured is lost."""

    name = "blind"

    def __init__(self, bench: optimizers.Bench) -> None:
        super().__init__(bench)
        step = self.optimizer.step

        def run() -> None:
            step()
            self.amplifier.bound.settled_state().column("variance").zero_()

        self.run = run


@pytest.mark.parametrize("wrong", [_Slow, _Plain, _Blind])
@pytest.mark.parametrize("dtype", micro.DTYPES)
def test_no_number_for_a_wrong_step(dtype: str, wrong: type[optimizers.Step]) -> None:
    rows, failures = measured(dtype, "sgd", optimizers.Torchs, wrong)
    assert {row.subject for row in rows} == {"torch"}
    assert [(failure.subject, failure.wrong) for failure in failures] == [(wrong.name, True)]


def test_ratios_stand_in_the_tables() -> None:
    rows, _ = measured("fp32", "adamw", *optimizers.SUBJECTS)
    results = Results(describe_machine(CPU), quick=True, rows=rows)
    ratio = rows[2].median / rows[3].median
    bars = {bar.what: bar for bar in report.bars(results)}
    bar = bars["amplified / attach + torch: AdamW, ResNet-50 fp32"]
    assert (bar.value, bar.limit, bar.aim) == (ratio, 0.75, 0.65)
    assert f"| {ratio:.2f}x |" in "\n".join(docs.PARTS["optimizers"](results))
