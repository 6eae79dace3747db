"""The CUDA step's own source, kernel and engine, compiled for the host, against the oracle.

Threads stand for its blocks, and fibers, which run in random order between barriers, for a block's
threads. This shows that the step is right and does not depend on grid, tables, alignment or order;
test_cuda_ordering.py shows that blocks wait for one another where they must.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import COMPLEX, REALS, SHAPES, Place, Stream, Twin, bare, digest, same_bits
from cuda.emulated import EmulatedBackend
from parts import CUTS, check_left_alone, check_parts
from test_grow import GROW, WAYS, Course
from test_grow import SHAPES as COURSE
from test_step import check_quantile

from gradamp_fast import backends

HERE = Place("torch", "cpu")  # what the fixture puts the emulated backend in the place of
MIXED = {**SHAPES, "empty": (0,), "tail.weight": (9, 455)}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"timing": "exact", "measure": "direction", "select": "above"},
    {"match_norm": True, "threshold": "std"},
    {"max_norm": 0.5, "timing": "exact", "measure": "variance"},
    {"measure": "random", "seed": 2**32 - 1, "threshold": "quantile"},
    {"threshold": "quantile", "decay": None, "group_by": "tensor", "max_norm": 3.0},
    {"windows": [(1, 3, 0.5), (4, 6)], "unit": "step", "threshold": 0.2},
    {
        "grow": True,
        "factor": 1.5,
        "measure": "direction",
        "threshold": -0.3,
        "refresh": 1,
        "decay": 0.9,
    },
]


@pytest.fixture(autouse=True)
def emulated(emulated_library: Any, monkeypatch: pytest.MonkeyPatch) -> type[EmulatedBackend]:
    class Fresh(EmulatedBackend):
        pass

    Fresh.library = emulated_library
    monkeypatch.setitem(backends._BACKENDS, "torch", Fresh)
    return Fresh


CASES = [
    pytest.param(SETTINGS[i], dtype, marks=pytest.mark.slow) for dtype in REALS for i in (0, 3)
]
CASES += [(options, "mixed") for options in SETTINGS]


@pytest.mark.parametrize(("options", "dtype"), CASES, ids=str)
def test_against_the_oracle(emulated: Any, options: dict, dtype: Any) -> None:
    every = (*REALS, *COMPLEX)
    of = {n: every[i % len(every)] if dtype == "mixed" else dtype for i, n in enumerate(MIXED)}
    model = bare(MIXED, of)
    chosen = {"min_steps": 2, "refresh": 2, **options}
    each = {name: [name] for name, _ in model.named_parameters()}
    layers = each if "group_by" in options else None
    twin = Twin(model, HERE, layers, **chosen)
    stream = Stream(model)
    for seed in range(4):
        emulated.seed = seed
        twin.step(stream.next())


@pytest.mark.parametrize("position", [148.5, 149.5])
def test_quantiles_of_many_scores(position: float) -> None:
    check_quantile(HERE, position)


@pytest.mark.parametrize("timing", ["lagged", "exact"])
def test_growth(emulated: Any, timing: str) -> None:
    """To the greatest factor, until it settles, and through a surge."""
    model = bare(COURSE)
    twin, course = Twin(model, HERE, max_factor=8.0, timing=timing, **GROW), Course(model, WAYS)
    for emulated.seed in range(34):
        twin.step(course.next())
    layers = {layer.name: layer for layer in twin.amplifier.report().layers}
    assert layers["a"].factor == 8.0
    assert layers["b"].settled


@pytest.mark.parametrize("options", SETTINGS[:4], ids=str)
@pytest.mark.parametrize("unscale", [True, False])
def test_scaled_and_skipped(emulated: Any, options: dict, unscale: bool) -> None:
    model = bare(SHAPES, {n: REALS[i % 4] for i, n in enumerate(SHAPES)})
    excluded = ("head.bias", "stem.weight")
    twin = Twin(model, HERE, None, excluded, min_steps=1, refresh=1, exclude=excluded, **options)
    stream, scale, found_inf = Stream(model), torch.full((1,), 512.0), torch.zeros(1)
    for step in range(5):
        gradients = stream.next()
        if step == 2:
            gradients["wide.weight"][200, 100] = torch.inf
        found_inf.fill_(step == 3)
        twin.step(gradients, grad_scale=scale, found_inf=found_inf, unscale=unscale)
        assert found_inf.item() == (step in (2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("options", [*SETTINGS[:2], {"match_norm": True}, SETTINGS[3]], ids=str)
def test_grid_tables_and_order_change_no_bit(emulated: Any, options: dict) -> None:
    found = set()
    for blocks, large_table, cooperative in (
        (1, True, True), (2, True, False), (3, True, True), (5, False, False),
    ):  # fmt: skip
        emulated.blocks, emulated.large_table, emulated.seed = blocks, large_table, blocks
        emulated.cooperative = cooperative
        found.add(digest(HERE, options, MIXED))
    assert len(found) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}], ids=str)
def test_alignment_changes_no_bit(emulated: Any, dtype: torch.dtype, options: dict) -> None:
    """Gradients at every offset from 16 bytes; nothing around them is touched."""
    sizes = {"a.w": (4096 + 512,), "b.w": (1,), "c.w": (3000,), "d.w": (131072,), "e.w": (4099,)}
    reference, step_of = None, torch.empty((), dtype=dtype).element_size()
    for offset in sorted({0, step_of, 8, 16 - step_of}):
        model = bare(sizes, dtype)
        amplifier = HERE.amplifier(
            model,
            measure="variance",
            min_steps=1,
            refresh=1,
            select="above",
            threshold=-1e9,
            **options,
        )
        stream, memory = Stream(model), {}
        for _ in range(2):
            for (name, parameter), value in zip(
                model.named_parameters(), stream.next().values(), strict=True
            ):
                whole = torch.full((value.numel() + 32,), 7.0, dtype=dtype)
                start = (-whole.data_ptr() % 16 + offset) // step_of
                parameter.grad = whole[start : start + value.numel()].copy_(value)
                memory[name] = (whole, start)
            amplifier.step()
        gradients = [p.grad.clone() for p in model.parameters()]
        for (whole, start), gradient in zip(memory.values(), gradients, strict=True):
            assert (whole[:start] == 7).all()
            assert (whole[start + gradient.numel() :] == 7).all()
        assert any(row.amplified_steps for row in amplifier.report().layers)
        if reference is None:
            reference = gradients
        assert all(same_bits(a, b) for a, b in zip(reference, gradients, strict=True))


@pytest.mark.parametrize("value", [1e12, -1e17, 3e-20])
@pytest.mark.parametrize("size", [33, 8193])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_elements_have_no_variance(value: float, size: int, dtype: torch.dtype) -> None:
    """Nor do they count as not finite, however large or small."""
    model = bare({"a.w": (size,)}, dtype)
    amplifier = HERE.amplifier(model)
    model.get_parameter("a.w").grad = torch.full((size,), value, dtype=dtype)
    amplifier.step()
    row = amplifier.report().layers[0]
    assert row.steps == 1
    assert 0 <= row.variance <= (1e-7 * value) ** 2


def test_launches(emulated: Any) -> None:
    model = bare({f"m{i}.w": (i % 3,) for i in range(30)})
    stream = Stream(model)
    for options, large_table, expected in (
        ({}, True, 1), ({}, False, 10), ({"timing": "exact"}, True, 1),
        ({"timing": "exact"}, False, 20),
    ):  # fmt: skip
        emulated.large_table = large_table
        amplifier = HERE.amplifier(model, **options)
        for parameter, value in zip(model.parameters(), stream.next().values(), strict=True):
            parameter.grad = value
        amplifier.step()
        assert emulated.launches() == expected, (options, large_table)
        del amplifier


@pytest.mark.parametrize(("numel", "starts"), CUTS)
@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_parts_of_a_sharded_gradient(
    emulated: Any, numel: int, starts: tuple[int, ...], dtype: Any
) -> None:
    check_parts(emulated, numel, starts, dtype)


def test_a_part_that_is_not_to_be_written(emulated: Any) -> None:
    for emulated.cooperative in (True, False):
        check_left_alone(emulated)
