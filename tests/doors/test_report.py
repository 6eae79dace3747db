"""What can be seen of a run: summary, history, CSV and JSON, scalars for a writer."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SHAPES, Place, Stream, bare, put
from torch import nn

from gradamp_fast import Amplifier, Schedule
from gradamp_fast.reference.state import State
from gradamp_fast.report.history import LIMIT

QUICK = {"min_steps": 2, "refresh": 2, "factor": 3.0}


def stepped(steps: int, **options: Any) -> tuple[nn.Module, Amplifier]:
    model = bare(SHAPES)
    amplifier = Amplifier(model, **{**QUICK, **options})
    stream = Stream(model)
    for _ in range(steps):
        put(model, stream.next())
        amplifier.step()
    return model, amplifier


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each device-to-host copy of the state."""
    made: list[int] = []
    original = State.on_host

    def on_host(state: State) -> State:
        made.append(1)
        return original(state)

    monkeypatch.setattr(State, "on_host", on_host)
    return made


class Writer:
    def __init__(self) -> None:
        self.written: dict[str, tuple[float, int]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        assert tag not in self.written
        self.written[tag] = scalar_value, global_step


# ---- the report ---------------------------------------------------------------------


def test_share_and_age_of_the_selection(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **QUICK)
    stream = Stream(model)
    selections = []
    for _ in range(9):
        put(model, stream.next())
        amplifier.step()
        selections.append([layer.selected for layer in amplifier.report().layers])
    for index, layer in enumerate(amplifier.report().layers):
        chosen = [selection[index] for selection in selections]
        amplified = sum(chosen[:-1])  # lagged: a step follows the selection before it
        assert layer.amplified_steps == amplified
        assert layer.amplified_share == pytest.approx(amplified / 9)
        changes = [i for i in range(9) if chosen[i] != ([False, *chosen])[i]]
        if changes:
            assert layer.steps_since_change == 9 - changes[-1]
        else:
            assert layer.steps_since_change is None


def test_a_report_tells_its_epoch_and_rule() -> None:
    _, amplifier = stepped(3, measure="direction", select="above")
    assert amplifier.report().epoch is None
    amplifier.set_epoch(4)
    report = amplifier.report()
    assert (report.epoch, report.measure, report.select) == (4, "direction", "above")


# ---- summary ------------------------------------------------------------------------


def test_the_summary_is_plain_text_without_a_terminal(copies: list[int]) -> None:
    _, amplifier = stepped(6)
    text = amplifier.summary()
    assert len(copies) == 1
    assert "\x1b" not in text
    lines = text.splitlines()
    assert len({line.index("x3") for line in lines if "x3" in line}) == 1
    for word in ("elements", "variance", "temporal", "fluctuation", "direction", "score"):
        assert word in lines[0]
    for word in ("threshold", "amplified", "share", "since"):
        assert word in lines[0]
    for layer in amplifier.report().layers:
        assert any(line.startswith(layer.name or "(root)") for line in lines)
    assert "6 steps, 0 skipped" in lines[-2]
    assert "fluctuation below" in lines[-2]
    assert "gradients agree" in lines[-1]


def test_the_summary_before_any_decision() -> None:
    _, amplifier = stepped(0)
    assert "no decision yet; 0 steps, 0 skipped" in amplifier.summary()


def test_outside_the_schedule_a_selected_layer_is_multiplied_by_one() -> None:
    _, amplifier = stepped(6, schedule=Schedule([(0, 5)], unit="step"))
    assert "x1" in amplifier.summary()
    assert "x3" not in amplifier.summary()


@pytest.mark.parametrize("width", [200, 100, 80])
def test_the_summary_on_a_terminal_fits_it(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    _, amplifier = stepped(6)
    text = amplifier.summary()
    assert "\x1b[" in text
    from rich.text import Text

    plain = Text.from_ansi(text).plain
    assert max(map(len, plain.splitlines())) <= width
    for layer in amplifier.report().layers:
        assert f" {layer.name or '(root)'} " in plain
    assert ("temporal" in plain) == (width > 80)
    assert "change" in plain


def test_thousands_of_layers_are_shown_as_plain_text() -> None:
    console = pytest.importorskip("rich.console")
    many = Amplifier(nn.ModuleList(nn.Linear(1, 1) for _ in range(3000))).report()
    shown = console.Console(file=io.StringIO(), force_terminal=True, width=40)
    shown.print(many)
    assert "".join(shown.file.getvalue().split()) == "".join(str(many).split())


def test_the_summary_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, amplifier = stepped(6)
    assert amplifier.summary() == str(amplifier.report())


# ---- history ------------------------------------------------------------------------


def test_record_copies_only_when_it_records(copies: list[int]) -> None:
    model, amplifier = stepped(0)
    stream = Stream(model)
    for _ in range(20):
        put(model, stream.next())
        amplifier.step()
        history = amplifier.record(every=6)
    assert len(copies) == 3
    assert [report.steps for report in history] == [6, 12, 18]
    assert len(copies) == 3
    assert history[-1].layers[0].name == amplifier.report().layers[0].name
    assert [report.steps for report in history[1:]] == [12, 18]


def test_an_entry_does_not_change_afterwards() -> None:
    model, amplifier = stepped(5)
    history = amplifier.record()
    before = history[0]
    put(model, Stream(model).next())
    amplifier.step()
    assert history[0] == before
    assert amplifier.report() != before


def test_the_history_is_bounded_and_covers_the_whole_run() -> None:
    _, amplifier = stepped(1)
    for call in range(1, 3 * LIMIT):
        amplifier.bound.settled_state().scalar("step").fill_(call)
        history = amplifier.record()
    steps = [report.steps for report in history]
    assert len(steps) < LIMIT
    assert steps == list(range(4, 3 * LIMIT, 4))


def test_reset_empties_the_history() -> None:
    _, amplifier = stepped(2)
    history = amplifier.record()
    amplifier.reset()
    assert len(history) == 0
    amplifier.record()
    assert [report.steps for report in history] == [0]


def test_every_is_checked() -> None:
    _, amplifier = stepped(0)
    for every in (0, 2.5, "epoch"):
        with pytest.raises(ValueError, match="every="):
            amplifier.record(every=every)  # type: ignore[arg-type]


# ---- CSV and JSON -------------------------------------------------------------------


def test_json_and_csv_hold_the_reports(tmp_path: Path) -> None:
    model, amplifier = stepped(1)
    amplifier.record()
    put(model, Stream(model).next())
    amplifier.step()
    history = amplifier.record()
    history.save(tmp_path / "run.json")
    stored = json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)
    assert [report["steps"] for report in stored] == [1, 2]
    assert stored[0]["threshold"] is None
    assert stored[0]["layers"][0]["fluctuation"] is None
    assert stored[1]["layers"][1]["name"] == history[1].layers[1].name
    assert stored[1]["layers"][1]["variance"] == history[1].layers[1].variance

    history.save(str(tmp_path / "run.csv"))
    with (tmp_path / "run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(history[0].layers)
    assert rows[-1]["run_steps"] == rows[-1]["steps"] == "2"
    assert float(rows[-1]["variance"]) == history[-1].layers[-1].variance
    assert rows[0]["epoch"] == ""

    amplifier.report().save(tmp_path / "now.csv")
    assert (tmp_path / "now.csv").read_text().count("\n") == 1 + len(history[0].layers)


def test_the_ending_says_the_format(tmp_path: Path) -> None:
    _, amplifier = stepped(0)
    with pytest.raises(ValueError, match=r"must end in \.csv or \.json"):
        amplifier.report().save(tmp_path / "run.txt")


# ---- scalars ------------------------------------------------------------------------


def test_scalars_are_written_in_one_copy(copies: list[int]) -> None:
    _, amplifier = stepped(6)
    writer = Writer()
    amplifier.log_to(writer, 123)
    assert len(copies) == 1
    report = amplifier.report()
    layer = report.layers[1]
    assert writer.written[f"gradamp/{layer.name}/fluctuation"] == (layer.fluctuation, 123)
    assert writer.written["gradamp/(root)/variance"] == (0.0, 123)  # of one element
    assert writer.written["gradamp/threshold"] == (report.threshold, 123)
    selected = sum(layer.selected for layer in report.layers)
    assert writer.written["gradamp/amplified_layers"] == (selected, 123)


def test_what_is_not_known_yet_is_not_written() -> None:
    _, amplifier = stepped(1)
    writer = Writer()
    amplifier.log_to(writer, 0)
    assert all(math.isfinite(value) for value, _ in writer.written.values())
    assert "gradamp/threshold" not in writer.written
    assert "gradamp/stem/variance" in writer.written
    assert "gradamp/stem/fluctuation" not in writer.written


def test_a_writer_needs_add_scalar() -> None:
    _, amplifier = stepped(0)
    with pytest.raises(TypeError, match="add_scalar"):
        amplifier.log_to(print, 0)  # type: ignore[arg-type]


def test_tensorboard_takes_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    _, amplifier = stepped(4)
    with SummaryWriter(str(tmp_path)) as writer:
        amplifier.log_to(writer, 4)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    [scalar] = events.Scalars("gradamp/body.0/score")
    expected = {layer.name: layer.score for layer in amplifier.report().layers}["body.0"]
    assert scalar.step == 4
    torch.testing.assert_close(scalar.value, expected, rtol=1e-6, atol=0)
