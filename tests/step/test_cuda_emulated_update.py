"""Updates by the CUDA step's own source, compiled for the host, against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import REALS, Stream, same_bits
from cuda.emulated import EmulatedBackend
from torch import Tensor
from updating import (
    RULES,
    SIZES,
    Groups,
    Steps,
    check_followed,
    check_rate_on_the_device,
    check_step,
    contents,
    each_rule,
    same,
    steps_of,
)

from gradamp_fast.backends.torch import TorchBackend

pairs = pytest.mark.parametrize("rule", [RULES["momentum"], RULES["adamw"]], ids=["sgd", "adamw"])


@pytest.fixture
def emulated(emulated_library: Any) -> type[EmulatedBackend]:
    class Fresh(EmulatedBackend):
        pass

    Fresh.library = emulated_library
    return Fresh


@each_rule
@pytest.mark.parametrize("timing", ["lagged", "exact"])
def test_every_rule_and_dtype(emulated: Any, rule: tuple[Any, Groups], timing: str) -> None:
    """In one launch, whatever is updated; gradients are only read."""
    steps = steps_of(rule, emulated, timing=timing, factor=1.7)
    stream = Stream(steps.model)
    for emulated.seed in range(4):
        gradients = stream.next()
        before = {name: gradient.clone() for name, gradient in gradients.items()}
        check_step(steps, gradients)
        for name, parameter in steps.model.named_parameters():
            assert same_bits(parameter.grad, before[name])
    assert steps.state.column("selected").any()
    assert not steps.state.column("selected").all()


def test_launches(emulated: Any) -> None:
    for timing, cooperative, launches in (
        ("lagged", True, 1), ("exact", True, 1), ("exact", False, 2),
    ):  # fmt: skip
        emulated.cooperative = cooperative
        steps = steps_of(RULES["adamw"], emulated, timing=timing)
        steps(Stream(steps.model).next())
        assert emulated.launches() == launches


@pairs
@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_sizes(emulated: Any, rule: tuple[Any, Groups], dtype: torch.dtype) -> None:
    """Measured all of them, and but one."""
    shapes = {f"m{size}.w": (size,) for size in SIZES}
    for options in ({}, {"include": ["m4096.w"]}):
        steps = steps_of(rule, emulated, shapes=shapes, dtypes=dtype, **options)
        stream = Stream(steps.model)
        for _ in range(2):
            check_step(steps, stream.next())


@each_rule
def test_a_scale_and_gradients_that_are_missing(emulated: Any, rule: tuple[Any, Groups]) -> None:
    steps = steps_of(rule, emulated, exclude="c.w", factor=3.0)
    stream, scale = Stream(steps.model), torch.tensor([128.0])
    for step in range(4):
        gradients: dict[str, Tensor | None] = dict(stream.next())
        if step == 2:
            gradients["b.w"] = None
        check_step(steps, gradients, grad_scale=scale, walked=True, unscale=step % 2 == 0)


@each_rule
@pytest.mark.parametrize("timing", ["lagged", "exact"])
def test_found_inf_on_entry_changes_nothing(
    emulated: Any, rule: tuple[Any, Groups], timing: str
) -> None:
    steps = steps_of(rule, emulated, timing=timing)
    stream = Stream(steps.model)
    steps(stream.next())
    before = contents(steps)
    steps(stream.next(), found_inf=torch.ones(()))
    assert same(contents(steps), before)
    assert steps.state.scalar("skipped_steps") == 1


@pairs
@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"match_norm": True, "timing": "exact"}])
def test_norms(emulated: Any, rule: tuple[Any, Groups], options: dict[str, Any]) -> None:
    options = options | {"exclude": "c.w", "factor": 3.0, "dtypes": torch.float32}
    mine, theirs = (steps_of(rule, kind, **options) for kind in (emulated, TorchBackend))
    streams = Stream(mine.model), Stream(theirs.model)
    for _ in range(4):
        mine(streams[0].next())
        theirs(streams[1].next())
        torch.testing.assert_close(
            mine.state.scalar("total_norm"), theirs.state.scalar("total_norm"), rtol=1e-6, atol=0
        )
        for one, other in zip(contents(mine), contents(theirs), strict=True):
            torch.testing.assert_close(one, other)
    assert mine.state.column("amplified_steps").any()


@each_rule
def test_grid_tables_and_addresses_change_no_bit(emulated: Any, rule: tuple[Any, Groups]) -> None:
    """Nor does it matter that every tensor moves between two steps, by less than 16 bytes."""

    def outcome(blocks: int, large_table: bool, cooperative: bool, moves: bool) -> list[Tensor]:
        emulated.blocks, emulated.large_table, emulated.seed = blocks, large_table, blocks
        emulated.cooperative = cooperative
        steps = steps_of(rule, emulated, factor=3.0)
        stream = Stream(steps.model)
        for _ in range(3):
            steps(stream.next())
            if moves:
                move(steps)
        return [*contents(steps), steps.state.values, steps.state.sketch]

    settings = ((1, True, True, False), (2, False, True, True), (3, True, False, True))
    first, *others = (outcome(*setting) for setting in settings)
    assert all(same(first, other) for other in others)


def move(steps: Steps) -> None:
    """Every parameter and state to another place, one element from where an allocation begins."""
    for parameter in steps.model.parameters():
        parameter.data = moved(parameter.data)
        state = steps.updates.state[parameter]
        for key, value in state.items():
            if value.shape == parameter.shape and key != "step":
                state[key] = moved(value)


def moved(tensor: Tensor) -> Tensor:
    room = tensor.new_empty(tensor.numel() + 1)
    return room[1:].view(tensor.shape).copy_(tensor)


def test_a_learning_rate_on_the_device(emulated: Any) -> None:
    check_rate_on_the_device(lambda: steps_of(RULES["some momentum"], emulated))


def test_what_became_of_a_tensor_is_followed(emulated: Any) -> None:
    check_followed(steps_of(RULES["adamw"], emulated))
