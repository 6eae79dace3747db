"""Where Python hands over to the compiled extension: what is checked there, and how it is told."""

from __future__ import annotations

import threading
from array import array
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from gradamp_fast import Amplifier, _extension
from gradamp_fast.backends.compiled import LISTS, for_kernel
from gradamp_fast.options import Options
from gradamp_fast.reference.state import GLOBAL_FIELDS, LAYER_FIELDS


@pytest.fixture
def given() -> dict[str, Any]:
    """What one layer of 5,000 elements is handed over with."""
    if _extension.load() is None:
        pytest.skip(str(_extension.reason()))
    return {
        "parameters": [Parameter(torch.zeros(5000))],
        "watched": [],
        "tensors": [(0, 5000, 4, 0, 0)],  # layer, numel, bucket_log2, first_bucket, first_word
        "num_layers": 1,
        "options": for_kernel(Options().rules()),
        "values": torch.zeros(len(GLOBAL_FIELDS) + len(LAYER_FIELDS), dtype=torch.float64),
        "sketch": torch.zeros(2, 320),
        "parity": torch.zeros(1, dtype=torch.int32),
        "members": bytearray(1),
        "lacking": array("q", [-1]),
    }


def bind(given: dict[str, Any]) -> Any:
    return _extension.load().Stepper(**given)


def test_what_the_rules_give_is_taken(given: dict[str, Any]) -> None:
    bind(given)
    bind({**given, "tensors": [(0, 5000, 9, 0, 64)]})  # a part of a larger tensor


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ((0, 5000, 0, 0, 0), "5000 elements has bucket_log2 0; the bucket rule gives .* 4 or more"),
        ((-1, 5000, 0, 0, 0), "bucket_log2 0"),  # excluded ones are cut into the same buckets
        ((0, 5000, 5, 0, 0), "bucket_log2 5; the bucket rule gives 0, 4 or 9"),
        ((0, 5000, -1, 0, 0), "bucket_log2 -1"),
        ((0, -1, 4, 0, 0), "numel -1"),
        ((0, 5000, 4, 16, 0), "buckets 16 to 329 in a sketch of 320"),
        ((0, 5000, 4, -16, 0), "buckets -16"),
        ((1, 5000, 4, 0, 0), "ascending layer"),
    ],
)
def test_tensors_that_break_a_rule(given: dict[str, Any], tensor: Any, message: str) -> None:
    if tensor[0] == -1:
        given["parity"], given["members"] = given["parity"][:0], bytearray()
    with pytest.raises(ValueError, match=message):
        bind({**given, "tensors": [tensor]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("values", torch.zeros(len(GLOBAL_FIELDS) + len(LAYER_FIELDS))),
        ("values", torch.zeros(len(GLOBAL_FIELDS), dtype=torch.float64)),
        ("sketch", torch.zeros(320, 2).t()),
        ("sketch", torch.zeros(640)),
        ("parity", torch.zeros(1, dtype=torch.int64)),
        ("parity", torch.zeros(2, dtype=torch.int32)),
        ("parity", torch.zeros(1, dtype=torch.int32, device="meta")),
        ("members", bytearray(2)),
        ("members", array("q", [0])),
        ("lacking", array("q", [-1, -1])),
        ("lacking", array("b", [-1])),
    ],
)
def test_state_of_another_shape(given: dict[str, Any], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        bind({**given, name: value})


def test_sums_of_another_shape(given: dict[str, Any]) -> None:
    stepper = bind(given)
    gradient = [torch.ones(5000)]
    for sums in (torch.zeros(2, 7, dtype=torch.float64), torch.zeros(2, 8)):
        with pytest.raises(ValueError, match="`sums`"):
            stepper.step_gradients(gradient, None, None, True, True, True, sums, None, [])


def test_a_refused_step_leaves_nothing_for_the_next(given: dict[str, Any]) -> None:
    """Neither a gradient that was taken before the one that was refused, nor the turn."""
    given["parameters"] *= 2
    given["tensors"] = [(0, 5000, 4, 0, 0), (1, 5000, 4, 320, 0)]
    given["num_layers"] = 2
    given["values"] = torch.zeros(len(GLOBAL_FIELDS) + 2 * len(LAYER_FIELDS)).double()
    given["sketch"], given["parity"] = torch.zeros(2, 640), torch.zeros(2, dtype=torch.int32)
    given["members"], given["lacking"] = bytearray(2), array("q", [-1, -1])
    stepper, flat, crooked = bind(given), torch.ones(5000), torch.ones(10_000)[::2]
    with pytest.raises(RuntimeError, match="gradient 1 is not flat"):
        stepper.step_gradients([flat, crooked], None, None, True, True, True, None, None, [])
    stepper.step_gradients([None, flat], None, None, True, True, True, None, None, [])
    steps = given["values"][len(GLOBAL_FIELDS) :: len(LAYER_FIELDS)]
    assert steps.tolist() == [0.0, 1.0]


def test_one_thread_at_a_time(given: dict[str, Any]) -> None:
    size = 1 << 24
    given["parameters"] = [Parameter(torch.zeros(size))]
    given["tensors"] = [(0, size, 9, 0, 0)]
    given["sketch"] = torch.zeros(2, size // 512)
    stepper, gradient = bind(given), [torch.ones(size)]
    refused, stop = [], threading.Event()

    def step() -> None:
        while not stop.is_set():
            try:
                stepper.step_gradients(gradient, None, None, True, True, True, None, None, [])
            except RuntimeError as error:
                refused.append(str(error))
                stop.set()

    threads = [threading.Thread(target=step) for _ in range(2)]
    for thread in threads:
        thread.start()
    stop.wait(60)
    stop.set()
    for thread in threads:
        thread.join()
    assert refused
    assert "step it from one thread at a time" in refused[0]
    stepper.step_gradients(gradient, None, None, True, True, True, None, None, [])


# ---- lists that stand in both languages -------------------------------------------------


@pytest.mark.parametrize("name", LISTS)
def test_lists_that_differ_are_told_with_the_command_that_rebuilds(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    extension = _extension.load()
    assert getattr(extension, name) == LISTS[name]
    parameter = given["parameters"][0]
    parameter.grad = torch.ones_like(parameter)
    theirs = {**LISTS["ENUMS"], "select": ("above", "below")} if name == "ENUMS" else ("steps",)
    monkeypatch.setattr(extension, name, theirs)
    model = torch.nn.ParameterList([parameter])
    amplifier = Amplifier(model, backend="cpu")
    with pytest.raises(RuntimeError, match=rf"has {name} .*: rebuild gradamp_fast: .* pip install"):
        amplifier.step()


def test_lists_that_an_older_extension_lacks() -> None:
    with pytest.raises(RuntimeError, match=r"has LAYER_FIELDS None.*rebuild gradamp_fast"):
        _extension.check_lists(ModuleType("old"), {"LAYER_FIELDS": LAYER_FIELDS})
