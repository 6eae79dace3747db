"""The growing experiment: what it runs, stores and says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.accuracy import __main__ as command
from bench.accuracy import grow, grow_report
from bench.accuracy.grow_nets import NETWORKS, SIDE
from bench.accuracy.grow_runs import SCHEDULES, Row, Run, read
from bench.accuracy.lines import append_record

RUN = Run("mlp", "momentum", 32, "linear", 600, 0.008, False, 0)
ROW = Row(
    **vars(RUN),
    accuracy=0.9,
    factor=1.0,
    settled=0.0,
    seconds=1.5,
    device="a CPU, of sorts",
    torch="2.0",
    commit="abc",
    date="2026-01-01",
)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    logits = NETWORKS[name](10)(torch.randn(4, 1, SIDE, SIDE))
    assert logits.shape == (4, 10)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str) -> None:
    rates = [SCHEDULES[name](step / 100) for step in range(1, 100)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) > 0.97


def test_both_arms_of_every_cell() -> None:
    for runs in (list(grow.table()), list(grow.edge())):
        assert len(set(runs)) == len(runs)
        assert {replace(r, grow=not r.grow) for r in runs} == set(runs)


def test_a_line_cut_off_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "grow.csv"
    append_record(path, ROW)
    append_record(path, replace(ROW, seed=1))
    path.write_bytes(path.read_bytes()[:-10])
    assert read(path) == [ROW]
    append_record(path, replace(ROW, grow=True))
    assert read(path) == [ROW, replace(ROW, grow=True)]
    path.write_text("another,heading\n1,2\n")
    with pytest.raises(ValueError, match="other columns than network"):
        read(path)


def rows(differences: dict[float, float]) -> list[Row]:
    """Plain at 90 % and growing by that many points more, at each rate, for three seeds."""
    return [
        replace(ROW, rate=rate, seed=seed, grow=grows, accuracy=0.9 + seed / 1000 + grows * d / 100)
        for rate, d in differences.items()
        for seed in range(3)
        for grows in (False, True)
    ]


def test_the_edge_counts_harm() -> None:
    page = grow_report.edge(rows({0.001: 3.0, 0.01: -1.4, 0.1: -2.0}))
    assert "1 of 3 cells end more than 1.5 points below plain" in page
    assert "for 1 of these the paired interval excludes 0" in page
    assert "From the lowest rate 1 of 1 settings end within 2 points" in page
    assert "| mlp, momentum, batch 32, linear, 0.1 | 90.1 ± 0.2 | 88.1 ± 0.2 | -2.0 |" in page


def test_a_seed_that_one_arm_lacks_counts_for_neither() -> None:
    one_more = replace(ROW, rate=0.1, seed=7, accuracy=0.1)
    (of,) = grow_report.cells([*rows({0.1: 1.0}), one_more]).values()
    assert of[0].plain == pytest.approx((90.0, 90.1, 90.2))
    assert of[0].difference == pytest.approx(1.0)


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row in rows({0.001: 3.0, 0.01: 0.0}):
        append_record(tmp_path / "digits.csv", row)
    assert command.main(["grow", "--report", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "digits.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert "| mlp, momentum | 0.001: 90.1 ± 0.2 → 93.1 ± 0.2 |" in page


def test_the_document_is_filled_from_what_is_stored(tmp_path: Path) -> None:
    document = tmp_path / "growing.md"
    document.write_text("by hand\n<!-- grow: table -->\nold\n<!-- end -->\n"
                        "<!-- grow: edge -->\n<!-- end -->\nby hand too\n")  # fmt: skip
    grow_report.write(document, {"table": rows({0.001: 3.0, 0.01: 0.0}), "edge": []})
    once = document.read_text()
    assert "| mlp, momentum | 0.001: 90.1 ± 0.2 → 93.1 ± 0.2 |" in once
    assert f"<!-- grow: edge -->\n\n{grow_report.NOTHING}\n\n<!-- end -->\nby hand too" in once
    assert "old" not in once
    grow_report.write(document, {"table": rows({0.001: 3.0, 0.01: 0.0}), "edge": []})
    assert document.read_text() == once
