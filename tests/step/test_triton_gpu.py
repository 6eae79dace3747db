"""The Triton backend on a GPU: beside the CUDA backend, and beside itself in two launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import REALS, SHAPES, Place, Stream, bare, put, same_bits, why_not

PLACE = Place("triton", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_not(PLACE) is not None, reason=str(why_not(PLACE))),
]
QUICK: dict[str, Any] = {"min_steps": 2, "refresh": 2, "decay": 0.9}
WIDE = {**SHAPES, "wider.weight": (1031, 1030)}
DTYPES = {name: REALS[index % len(REALS)] for index, name in enumerate(WIDE)}
RULES: list[dict[str, Any]] = [
    {"factor": 1 / 3},
    {"timing": "exact", "threshold": "quantile"},
    {"timing": "exact", "measure": "direction", "max_norm": 0.5},
    {"measure": "variance", "match_norm": True},
]


def run(place: Place, options: dict[str, Any], launches: int = 1) -> list[Any]:
    """What eight steps leave: selections, then gradients."""
    model = bare(WIDE, DTYPES, place.device)
    amplifier, stream, left = place.amplifier(model, **QUICK, **options), Stream(model), []
    for _ in range(8):
        put(model, stream.next())
        amplifier.prepare()
        if launches == 2:
            amplifier.bound._backend.launcher.cooperative = False
        amplifier.step()
        left.append([layer.selected for layer in amplifier.report().layers])
        left += [parameter.grad.clone() for parameter in model.parameters()]
    return left


@pytest.mark.parametrize("options", RULES, ids=str)
def test_beside_the_cuda_backend(options: dict[str, Any]) -> None:
    """The same decisions; the same bits where no norm enters the multiplier."""
    other = Place("cuda", "cuda")
    if reason := why_not(other):
        pytest.skip(reason)
    from_norm = "max_norm" in options or "match_norm" in options
    for mine, theirs in zip(run(PLACE, options), run(other, options), strict=True):
        if isinstance(mine, list):
            assert mine == theirs
        elif from_norm:
            torch.testing.assert_close(mine, theirs)
        else:
            assert same_bits(mine, theirs)


@pytest.mark.parametrize("options", RULES[1:], ids=str)
def test_two_launches_have_equal_bits(options: dict[str, Any]) -> None:
    for one, two in zip(run(PLACE, options), run(PLACE, options, launches=2), strict=True):
        assert one == two if isinstance(one, list) else same_bits(one, two)


def test_compiles_once() -> None:
    """Neither new addresses nor a scale nor another model of the same dtypes compile anew."""
    from gradamp_fast.backends.triton.step import step_kernel

    def compiled() -> int:
        return sum(len(caches[0]) for caches in step_kernel.device_caches.values())

    run(PLACE, {})
    before = compiled()
    model = bare({"a.w": (33,), "b.w": (70000,)}, {"a.w": REALS[0], "b.w": REALS[3]}, "cuda")
    amplifier, stream = PLACE.amplifier(model), Stream(model)
    for _ in range(3):
        put(model, stream.next())
        amplifier.step(grad_scale=torch.ones(1, device="cuda"))
    assert compiled() == before + 1
    run(PLACE, {})
    assert compiled() == before + 1
