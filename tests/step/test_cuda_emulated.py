"""The CUDA kernel's own source, compiled for the host, against the oracle.

Fibers stand for its threads and run in random order between barriers. This shows that the step
is right and does not depend on grid, tables, alignment or order; what the hardware does with
memory is for the tests on a GPU.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

import pytest
import torch
from cases import COMPLEX, REALS, SHAPES, Place, Stream, Twin, bare, digest, same_bits
from cuda.emulated import EmulatedBackend, compiled
from parts import CUTS, check_left_alone, check_parts

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
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    return compiled(compiler, tmp_path_factory.mktemp("emulated"))


@pytest.fixture(autouse=True)
def emulated(library: Any, monkeypatch: pytest.MonkeyPatch) -> type[EmulatedBackend]:
    class Fresh(EmulatedBackend):
        pass

    Fresh.library = library
    monkeypatch.setitem(backends._BACKENDS, "torch", Fresh)
    return Fresh


CASES = [(SETTINGS[i], dtype) for dtype in REALS for i in (0, 3)]
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
    for blocks, capacity, cooperative in ((1, 4000, True), (2, 4000, False), (5, 3, False)):
        emulated.blocks, emulated.capacity, emulated.seed = blocks, capacity, blocks
        emulated.cooperative = cooperative
        found.add(digest(HERE, options, MIXED))
    assert len(found) == 1


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


def test_launches(emulated: Any) -> None:
    model = bare({f"m{i}.w": (i % 3,) for i in range(30)})
    stream = Stream(model)
    for options, capacity, expected in (
        ({}, 4000, 1), ({}, 30, 1), ({}, 29, 2), ({"timing": "exact"}, 4000, 1),
        ({"timing": "exact"}, 29, 4),
    ):  # fmt: skip
        emulated.capacity = capacity
        amplifier = HERE.amplifier(model, **options)
        for parameter, value in zip(model.parameters(), stream.next().values(), strict=True):
            parameter.grad = value
        amplifier.step()
        assert emulated.launches == expected, (options, capacity)
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
