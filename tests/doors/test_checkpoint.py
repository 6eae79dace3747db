"""state_dict and load_state_dict: bit for bit, across backends, all or nothing."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import PLACES, SHAPES, Place, Stream, bare, flat, put, same_bits, same_state, why_not
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from gradamp_fast import Amplifier, Schedule

QUICK: dict[str, Any] = {"min_steps": 2, "refresh": 2, "decay": 0.9}


def advance(model: nn.Module, amplifier: Amplifier, stream: Stream, steps: int) -> None:
    for _ in range(steps):
        put(model, stream.next())
        amplifier.step()


def stored(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file that is read without running any code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("timing", ["lagged", "exact"])
@pytest.mark.parametrize("at", [1, 3, 4])
def test_resumed_run_continues_bit_for_bit(place: Place, at: int, timing: str) -> None:
    models = [bare(SHAPES, device=place.device) for _ in range(2)]
    schedule = Schedule([(2, 9)], unit="step")
    whole, part = (
        place.amplifier(model, timing=timing, schedule=schedule, **QUICK) for model in models
    )
    streams = [Stream(model) for model in models]
    advance(models[0], whole, streams[0], 8)
    advance(models[1], part, streams[1], at)
    state = stored(part.state_dict())
    del part

    resumed = place.amplifier(models[1], timing=timing, schedule=schedule, **QUICK)
    resumed.load_state_dict(state)
    advance(models[1], resumed, streams[1], 8 - at)
    assert repr(resumed.report()) == repr(whole.report())
    assert same_state(resumed.state_dict(), whole.state_dict())
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert same_bits(mine.grad, theirs.grad)


def test_loading_into_an_amplifier_that_has_stepped(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **QUICK)
    advance(model, amplifier, Stream(model), 3)
    state, report = amplifier.state_dict(), repr(amplifier.report())
    advance(model, amplifier, Stream(model, seed=1), 4)
    assert repr(amplifier.report()) != report
    amplifier.load_state_dict(state)
    assert repr(amplifier.report()) == report
    assert same_state(amplifier.state_dict(), state)


def test_a_state_dict_is_a_snapshot(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **QUICK)
    stream = Stream(model)
    advance(model, amplifier, stream, 3)
    state = amplifier.state_dict()
    kept = copy.deepcopy(state)
    advance(model, amplifier, stream, 3)
    assert same_state(state, kept)
    amplifier.load_state_dict(state)
    advance(model, amplifier, stream, 3)
    assert same_state(state, kept)


def test_epoch_factor_and_counters_are_stored(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    options: dict[str, Any] = {"schedule": Schedule([(3, 5)]), "refresh": "epoch"}
    amplifier = place.amplifier(model, **options)
    amplifier.set_epoch(3)
    amplifier.factor = 6.0
    stream = Stream(model)
    advance(model, amplifier, stream, 2)
    put(model, stream.next())
    amplifier.step(found_inf=torch.ones(1, device=place.device))
    state = stored(amplifier.state_dict())
    del amplifier
    again = place.amplifier(model, **options)
    again.load_state_dict(state)
    assert (again.report().steps, again.report().skipped_steps) == (3, 1)
    assert float(again.factor) == 6.0
    put(model, stream.next())
    again.step()  # the epoch is known: no RuntimeError


@pytest.mark.parametrize("other", [p for p in PLACES if why_not(p) is None], ids=str)
def test_across_backends(place: Place, other: Place) -> None:
    """Another backend takes over: same counters, same selection, states within tolerance."""
    first, second = bare(SHAPES, device=place.device), bare(SHAPES, device=other.device)
    amplifier = place.amplifier(first, **QUICK)
    advance(first, amplifier, Stream(first), 5)
    taker = other.amplifier(second, **QUICK)
    taker.load_state_dict(stored(amplifier.state_dict()))
    assert repr(taker.report()) == repr(amplifier.report())
    streams = Stream(first, seed=9), Stream(second, seed=9)
    advance(first, amplifier, streams[0], 3)
    advance(second, taker, streams[1], 3)
    for mine, theirs in zip(amplifier.report().layers, taker.report().layers, strict=True):
        assert mine.name == theirs.name
        assert mine.steps == theirs.steps
        assert mine.selected == theirs.selected
        assert mine.variance == pytest.approx(theirs.variance, rel=2e-5)
        assert mine.score == pytest.approx(theirs.score, abs=1e-4)


def test_backend_and_error_option_are_not_compared() -> None:
    model = bare(SHAPES)
    amplifier = Amplifier(model, backend="torch")
    state = amplifier.state_dict()
    del amplifier
    Amplifier(model, backend="auto", error_if_nonfinite=True).load_state_dict(state)


@pytest.mark.parametrize(
    "options", [{"decay": 0.8}, {"measure": "variance"}, {"min_steps": 3}, {"group_by": "tensor"},
                {"max_norm": 1.0}, {"timing": "exact"}],
    ids=str,
)  # fmt: skip
def test_other_options_are_refused(place: Place, options: dict[str, Any]) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **QUICK)
    advance(model, amplifier, Stream(model), 3)
    state = amplifier.state_dict()
    del amplifier
    other = place.amplifier(model, **{**QUICK, **options})
    advance(model, other, Stream(model, seed=3), 2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=next(iter(options))):
        other.load_state_dict(state)
    assert same_state(other.state_dict(), before)


def test_another_model_is_refused_with_its_layers(place: Place) -> None:
    one = bare({"a.w": (9,), "b.w": (40,), "c.w": (5,)}, device=place.device)
    two = bare({"a.w": (9,), "d.w": (40,), "c.w": (5,)}, device=place.device)
    amplifier, other = place.amplifier(one), place.amplifier(two)
    advance(one, amplifier, Stream(one), 3)
    advance(two, other, Stream(two, seed=3), 2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"(?s)\bb\b.*\bd\b|\bd\b.*\bb\b"):
        other.load_state_dict(amplifier.state_dict())
    assert same_state(other.state_dict(), before)


def test_another_size_is_refused(place: Place) -> None:
    one, two = (bare({"a.w": (n,), "b.w": (40,)}, device=place.device) for n in (9, 10))
    amplifier, other = place.amplifier(one), place.amplifier(two)
    advance(one, amplifier, Stream(one), 3)
    advance(two, other, Stream(two, seed=3), 2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"\ba\b"):
        other.load_state_dict(amplifier.state_dict())
    assert same_state(other.state_dict(), before)


def schema_key(state: dict[str, Any]) -> str:
    return next(key for key in state if "schema" in key or "version" in key)


def test_another_schema_is_refused() -> None:
    model = bare(SHAPES)
    amplifier = Amplifier(model)
    state = amplifier.state_dict()
    with pytest.raises(ValueError, match=r"schema|version"):
        amplifier.load_state_dict({**state, schema_key(state): 10_000})


def test_damaged_states_are_refused(place: Place) -> None:
    """Whatever single part is missing, nothing is loaded."""
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **QUICK)
    advance(model, amplifier, Stream(model), 3)
    state = amplifier.state_dict()
    advance(model, amplifier, Stream(model, seed=1), 3)
    before = copy.deepcopy(amplifier.state_dict())
    for key in state:
        with pytest.raises(ValueError, match=key):
            amplifier.load_state_dict({k: v for k, v in state.items() if k != key})
        assert same_state(amplifier.state_dict(), before), key
    with pytest.raises(ValueError, match=schema_key(state)):
        amplifier.load_state_dict({})


def test_stateful_protocol() -> None:
    from torch.distributed.checkpoint.stateful import Stateful

    assert isinstance(Amplifier(bare(SHAPES)), Stateful)


def test_state_before_any_step_can_be_stored_and_loaded(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, **QUICK)
    state = stored(amplifier.state_dict())
    advance(model, amplifier, Stream(model), 3)
    amplifier.load_state_dict(state)
    assert amplifier.report().steps == 0
    advance(model, amplifier, Stream(model), 3)
    assert amplifier.report().steps == 3


def test_wrapped_models_share_states() -> None:
    """Names are stored without the prefixes that wrappers add."""
    inner = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    put(inner, Stream(inner).next())
    amplifier = Amplifier(inner)
    amplifier.step()
    state = amplifier.state_dict()
    wrapped = nn.Sequential(torch.compile(nn.Linear(3, 4)), nn.Linear(4, 2))
    other = Amplifier(torch.compile(wrapped))
    other.load_state_dict(state)
    assert other.report().steps == 1


def test_everything_is_written_in_place(place: Place) -> None:
    """State keeps its addresses, as a captured graph needs."""

    def addresses() -> list[int]:
        state = amplifier.bound.settled_state()
        return [tensor.data_ptr() for tensor in (state.values, state.sketch, state.parity)]

    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(model, refresh="epoch", decay=None)
    amplifier.set_epoch(0)
    advance(model, amplifier, Stream(model), 2)
    before, state = addresses(), amplifier.state_dict()
    amplifier.set_epoch(1)
    amplifier.load_state_dict(state)
    amplifier.factor = 5.0
    assert addresses() == before
    amplifier.reset()
    assert addresses() == before


def test_large_layers_leave_little_behind(place: Place) -> None:
    """Under 1 % of the gradients' size."""
    model = bare({"a.w": (1 << 20,)}, device=place.device)
    amplifier = place.amplifier(model)
    advance(model, amplifier, Stream(model), 1)
    tensors = [x for x in flat(amplifier.state_dict()).values() if isinstance(x, torch.Tensor)]
    assert 0 < sum(x.numel() * x.element_size() for x in tensors) < 0.01 * 4 * (1 << 20)


def test_names_are_the_models_own_whatever_is_wrapped_around_it() -> None:
    """A plain model's snapshot goes on in a wrapped one, and back."""

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 2))

    def wrapped() -> nn.Module:
        model = network()
        model[0] = checkpoint_wrapper(model[0])
        model[1] = torch.compile(model[1], backend="eager")
        model[2] = nn.DataParallel(model[2])
        return torch.compile(nn.DataParallel(model), backend="eager")

    kinds = (network, wrapped)
    reports = {}
    for first in kinds:
        for second in kinds:
            generator = torch.Generator().manual_seed(1)
            state = None
            for make in (first, second):
                model = make()
                amplifier = Amplifier(model, **QUICK)
                if state is not None:
                    amplifier.load_state_dict(stored(state))
                for _ in range(3):
                    for parameter in model.parameters():
                        parameter.grad = torch.randn(parameter.shape, generator=generator)
                    amplifier.step()
                state = amplifier.state_dict()
            assert list(state["layers"]) == ["0", "1.0", "2"]
            reports[first, second] = repr(amplifier.report())
    assert len(set(reports.values())) == 1


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_distributed_checkpoint_in_one_process(tmp_path: Path) -> None:
    model = bare(SHAPES)
    options: dict[str, Any] = {"schedule": Schedule([(0, 3, 4.0)]), **QUICK}
    whole = Amplifier(model, **options)
    whole.set_epoch(2)
    stream = Stream(model)
    advance(model, whole, stream, 3)
    dcp.save({"amplifier": whole}, checkpoint_id=tmp_path)
    state = whole.state_dict()
    advance(model, whole, stream, 2)
    dcp.load({"amplifier": whole}, checkpoint_id=tmp_path)
    assert same_state(whole.state_dict(), state)
    del whole
    again = Amplifier(model, **options)
    dcp.load({"amplifier": again}, checkpoint_id=tmp_path)
    assert same_state(again.state_dict(), state)
