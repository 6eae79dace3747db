"""Growing amplification from outside: optimizers, reports, files, pictures, checkpoints."""

from __future__ import annotations

import csv
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SHAPES, Stream, bare, put, same_state
from test_checkpoint import stored
from torch import nn

import gradamp_fast
from gradamp_fast import Amplifier, fused_amplify
from gradamp_fast.options import DEFAULTS
from gradamp_fast.plot import heatmap
from gradamp_fast.reference.state import GLOBAL_FIELDS, LAYER_FIELDS

# Steps of small gradients along a line: they agree.
STEADY: dict[str, Any] = {"grow": True, "min_steps": 4, "refresh": 2, "factor": 2.0}


def trained(steps: int, lr: float = 1e-5, **options: Any) -> tuple[nn.Module, Amplifier]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    amplifier = Amplifier(model, **{**STEADY, **options})
    optimizer = torch.optim.SGD(model.parameters(), lr)
    amplifier.attach(optimizer)
    x, y = torch.randn(16, 6), torch.randn(16, 3)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        amplifier.record()
    return model, amplifier


# ---- optimizers ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_growing_is_refused_where_it_would_do_nothing(kind: Any) -> None:
    model = nn.Linear(3, 2)
    optimizer = kind(model.parameters(), 1e-3)
    amplifier = Amplifier(model, grow=True)
    with pytest.raises(ValueError, match=f"grow=True does nothing under {kind.__name__}"):
        amplifier.attach(optimizer)
    assert not amplifier.attached
    del amplifier
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.grad.clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"grow=True does nothing under {kind.__name__}"):
            fused_amplify(model, optimizer=optimizer, grow=True)
    assert torch.equal(model.weight.grad, before)


def test_growing_in_one_line() -> None:
    model = bare(SHAPES)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    stream = Stream(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            put(model, stream.next())
            amplifier = fused_amplify(model, optimizer=optimizer, grow=True)
    assert {name: getattr(amplifier.options, name) for name in DEFAULTS[True]} == DEFAULTS[True]
    with pytest.raises(ValueError, match="factor"):
        fused_amplify(model, grow=True, factor=2.0)
    gradamp_fast.reset(model)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_warm_up_is_seen_in_numbers_and_tensors(tensor: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    amplifier = Amplifier(model, **STEADY)
    rate = torch.tensor(1e-6) if tensor else 1e-6
    optimizer = torch.optim.SGD(model.parameters(), rate)
    amplifier.attach(optimizer)
    x, grown = torch.randn(16, 6), []
    for step in range(14):
        lr = 1e-6 * min(step, 9)
        if tensor:
            optimizer.param_groups[0]["lr"].fill_(lr)
        else:
            optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        grown.append(amplifier.report().layers[0].factor)
    assert grown == [1.0] * 11 + [2.0] * 2 + [4.0]


def test_a_warm_up_is_seen_by_the_scaler() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    amplifier = Amplifier(model, **STEADY)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    scaler = gradamp_fast.GradScaler(amplifier, "cpu", init_scale=8.0)
    x, grown = torch.randn(16, 6), []
    for step in range(14):
        optimizer.param_groups[0]["lr"] = 1e-6 * min(step, 9)
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        grown.append(amplifier.report().layers[0].factor)
    assert grown == [1.0] * 11 + [2.0] * 2 + [4.0]
    refused = torch.optim.AdamW(model.parameters(), 1e-6)
    with pytest.raises(ValueError, match="grow=True does nothing under AdamW"):
        scaler.step(refused)


def test_a_warm_up_that_is_given_up_holds_nothing_back() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    amplifier = Amplifier(model, **STEADY)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    handle = amplifier.attach(optimizer)
    x = torch.randn(16, 6)
    for step in range(12):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if step < 6:
            optimizer.param_groups[0]["lr"] *= 1.1
            optimizer.step()
        else:
            handle.remove()
            amplifier.step()
    assert amplifier.report().layers[0].factor == 8.0


def test_release_goes_with_growth_alone() -> None:
    with pytest.raises(RuntimeError, match="grow=True"):
        Amplifier(nn.Linear(2, 2)).release()


# ---- reports and pictures ----------------------------------------------------------------


def test_a_report_tells_what_has_grown(tmp_path: Path) -> None:
    _, amplifier = trained(12)
    report = amplifier.report()
    assert report.grow
    assert [layer.factor for layer in report.layers] == [32.0, 32.0]
    weighted = sum(layer.numel * layer.direction for layer in report.layers)
    assert report.direction == pytest.approx(weighted / sum(x.numel for x in report.layers))
    text = amplifier.summary().splitlines()
    assert "settled" in text[0]
    assert sum("x32" in line for line in text) == 2
    assert text[-2].endswith("2 of 2 layers selected: direction below 0; 0 of 2 settled; "
                             "12 steps, 0 skipped; acts on: gradient")  # fmt: skip
    assert text[-1] == (
        f"gradients agree (direction {report.direction:+.2f}): the learning rate is low"
    )
    report.save(tmp_path / "r.csv")
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["factor"] for row in rows] == ["32.0", "32.0"]
    assert [row["settled"] for row in rows] == ["False", "False"]
    assert float(rows[0]["run_direction"]) == report.direction
    assert float(rows[0]["direction"]) == report.layers[0].direction
    report.save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())[0]["direction"] == report.direction


@pytest.mark.parametrize(
    ("direction", "words"),
    [
        (0.31, ["gradients agree (direction +0.31): the learning rate is low"]),
        (0.1, ["no trend (direction +0.10)"]),
        (-0.1, ["no trend (direction -0.10)"]),
        (-0.2, ["gradients turn back (direction -0.20)"]),
        (math.nan, []),
    ],
)
def test_the_thermometer(direction: float, words: list[str]) -> None:
    """With or without growth."""
    model = bare({"a.w": (64,), "b.w": (64,)})
    amplifier = Amplifier(model)
    if not math.isnan(direction):
        state = amplifier.bound.settled_state()
        state.column("steps").fill_(5.0)
        state.column("agreement").fill_(direction)
    report = amplifier.report()
    assert report.direction == pytest.approx(direction, nan_ok=True)
    assert str(report).splitlines()[-1:] == (words or [str(report).splitlines()[-1]])
    assert any("gradients" in line or "trend" in line for line in str(report).splitlines()) == (
        words != []
    )


class Writer:
    def __init__(self) -> None:
        self.written: dict[str, float] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.written[tag] = scalar_value


def test_scalars() -> None:
    _, amplifier = trained(12)
    writer = Writer()
    amplifier.log_to(writer, 12)
    assert writer.written["gradamp/0/factor"] == 32.0
    assert writer.written["gradamp/0/settled"] == 0
    assert writer.written["gradamp/direction"] == amplifier.report().direction


def test_a_terminal_that_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    from rich.text import Text

    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    _, amplifier = trained(12)
    lines = Text.from_ansi(amplifier.summary()).plain.splitlines()
    assert max(map(len, lines)) <= 80
    assert "gradients agree" in lines[-1]
    assert any("x32" in line and "no" in line for line in lines)


def test_a_map_of_factors(tmp_path: Path) -> None:
    _, amplifier = trained(12)
    heatmap(amplifier.record(), tmp_path / "factors.png", show="factor")
    assert (tmp_path / "factors.png").stat().st_size > 1000
    _, fixed = trained(12, grow=False)
    heatmap(fixed.record(), tmp_path / "fixed.png", show="factor")
    assert (tmp_path / "fixed.png").stat().st_size > 1000


# ---- checkpoints ---------------------------------------------------------------------------


def of_schema_2(state: dict[str, Any]) -> dict[str, Any]:
    """The same without what came later."""
    fields, numbers = LAYER_FIELDS[:10], GLOBAL_FIELDS[:8]
    values = state["state"]
    rows = values[len(GLOBAL_FIELDS) :].view(-1, len(state["fields"]))[:, : len(fields)]
    options = {n: v for n, v in state["options"].items() if n not in ("grow", "max_factor")}
    return {
        **{key: value for key, value in state.items() if key != "members"},
        "schema": 2,
        "fields": list(fields),
        "globals": list(numbers),
        "options": options,
        "state": torch.cat((values[: len(numbers)], rows.reshape(-1))),
    }


def test_a_checkpoint_from_before_growth() -> None:
    model, again = bare(SHAPES), bare(SHAPES)
    quick = {"min_steps": 2, "refresh": 2, "decay": 0.9}
    amplifier, other = Amplifier(model, **quick), Amplifier(again, **quick)
    stream = Stream(model)
    for _ in range(5):
        put(model, stream.next())
        amplifier.step()
    old = of_schema_2(stored(amplifier.state_dict()))
    other.load_state_dict(old)
    for _ in range(3):
        gradients = stream.next()
        for of, which in ((model, amplifier), (again, other)):
            put(of, {name: g.clone() for name, g in gradients.items()})
            which.step()
    assert same_state(amplifier.state_dict(), other.state_dict())
    growing = Amplifier(bare(SHAPES), **quick, grow=True, measure="fluctuation", threshold="mean")
    with pytest.raises(ValueError, match="grow was False and is True"):
        growing.load_state_dict(old)
    assert growing.report().steps == 0


def test_a_damaged_checkpoint_loads_nothing() -> None:
    _, amplifier = trained(12)
    state = amplifier.state_dict()
    for broken in (
        {**state, "fields": state["fields"][:-1]},
        {**state, "state": state["state"][:-1]},
        {**state, "schema": 1},
    ):
        with pytest.raises(ValueError, match=r"schema|damaged"):
            amplifier.load_state_dict(broken)
    assert same_state(amplifier.state_dict(), state)
