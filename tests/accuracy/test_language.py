"""The experiment on a character transformer: what it runs, stores and says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")

from bench.accuracy import __main__ as command
from bench.accuracy import language, language_runs
from bench.accuracy.language_runs import CONTEXT, Row, Run
from bench.accuracy.lines import append_record, read_records

ABOUT = {"device": "a CPU, of sorts", "torch": "2.0", "commit": "abc", "date": "2026-01-01"}
TUNED = 1e-3


def row(run: Run, loss: float) -> Row:
    factor = 8.0 if run.grow else 1.0
    numbers = {"loss": loss, "factor": factor, "settled": 1.0, "seconds": 60.0}
    return Row(**asdict(run), **numbers, characters=10**7, **ABOUT)


def tuned() -> list[Row]:
    return [row(run, 2.0 + abs(run.rate / TUNED - 1)) for run in language.tuning()]


def made() -> list[Row]:
    """Growing is better by 1 at the lowest rate, worse by 0.5 at the highest, else the same."""
    lifts = {(TUNED / 64, True): -1.0, (TUNED * 8, True): 0.5}
    return tuned() + [
        row(run, 3.0 + run.seed % 100 / 1000 + lifts.get((run.rate, run.grow), 0.0))
        for run in language.arms(TUNED)
    ]


def test_the_text_is_split_by_file() -> None:
    text = language_runs.text()
    lengths = [len(text.train), len(text.validation), len(text.test)]
    assert lengths[0] > 5 * max(lengths[1:])
    assert all(length > 100_000 for length in lengths)
    assert int(torch.cat((text.train, text.validation, text.test)).max()) == text.vocabulary - 1
    held = language_runs.held_out(text.test)
    assert held.shape == (language_runs.HELD_OUT, CONTEXT + 1)
    assert held.tolist() == language_runs.held_out(text.test).tolist()


def test_the_rate_rises_and_falls() -> None:
    rates = [language_runs.rate_at(Run(2.0, False, 0, "test"), s) for s in range(600)]
    assert max(rates) == pytest.approx(2.0, rel=0.01)
    assert rates.index(max(rates)) in (59, 60)
    assert 0 < rates[-1] < 0.01
    assert 0 < rates[0] < 0.05


@pytest.mark.slow
def test_arms_differ_by_growth_alone() -> None:
    runs = {grow: Run(1e-5, grow, 3, "test") for grow in (False, True)}
    rows = {grow: language_runs.execute(run, ABOUT, steps=2) for grow, run in runs.items()}
    assert rows[False].loss == rows[True].loss  # nothing grows in two steps
    assert rows[False].run == runs[False]
    assert rows[True].factor == 1.0
    other = language_runs.execute(Run(1e-5, False, 4, "test"), ABOUT, steps=2)
    assert other.loss != rows[False].loss


def test_the_tuning_comes_first() -> None:
    rows = tuned()
    assert language.best(rows[:-1]) is None
    assert language.best(rows) == TUNED
    runs = language.arms(TUNED)
    assert len(set(runs)) == len(runs) == 5 * 3 * 2
    assert {run.seed for run in runs}.isdisjoint(run.seed for run in language.tuning())
    assert {run.part for run in runs} == {"test"}


def test_contrasts_by_hand() -> None:
    found = language.contrasts(made(), TUNED)
    values = [interval.value for interval in found.values() if interval is not None]
    assert values == pytest.approx([-1.0, -1.0, 0.0, 0.5])
    page = "\n".join(language.part(made()))
    assert "30 of 30 runs on fresh seeds" in page
    assert "| growing, best/64 | 2.002 [" in page
    assert "by 8.0 to 8.0, 100% settled" in page
    assert "| growing, 8 x best - plain, 8 x best | +0.500 [" in page


def test_what_is_missing_is_not_told() -> None:
    assert list(language.part([])) == [language.NOTHING]
    assert "fresh seeds" not in "\n".join(language.part(tuned()[:2]))
    assert "contrast" not in "\n".join(language.part(tuned()))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stdlib.csv"
    monkeypatch.setattr(language, "execute", lambda run, about: row(run, 2.0 + run.rate + run.seed))
    monkeypatch.setattr(language, "TUNE_SEEDS", range(1))
    command.main(["language", "--out", str(tmp_path)])
    rows = read_records(path, Row)
    assert [r.run for r in rows] == [*language.tuning(), *language.arms(language.RATES[0])]
    assert "fresh seeds" in (tmp_path / "stdlib.md").read_text()
    document = tmp_path / "accuracy.md"
    document.write_text("by hand\n<!-- language -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(language, "DOCUMENT", document)
    command.main(["language", "--docs", "--out", str(tmp_path)])
    text = document.read_text()
    assert text.startswith("by hand\n<!-- language -->\n\nPlain, tuned")
    assert "old" not in text
    append_record(path, rows[0])
    assert len(read_records(path, Row)) == len(rows) + 1
