"""Models, dtypes, layouts, options and accidents drawn at random, against the oracle."""

from __future__ import annotations

from typing import Any

import torch
from cases import COMPLEX, REALS, Place, Twin, bare, layers_of, normal, reals
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layouts import every_other, misaligned, transposed
from torch import Tensor

MODULES = ("a", "b", "b.inner", "c")
LEAVES = ("weight", "bias")
SMALL = st.lists(st.integers(0, 9), max_size=3).map(tuple)
LONG = st.sampled_from([31, 33, 1009, 4095, 4096, 4097, 8193]).map(lambda n: (n,))

PARAMETERS = st.dictionaries(
    st.tuples(st.sampled_from(MODULES), st.sampled_from(LEAVES)).map(".".join),
    st.tuples(st.one_of(SMALL, SMALL, LONG), st.sampled_from([*REALS, *COMPLEX])),
    min_size=1,
    max_size=6,
)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    out: dict[str, Any] = {
        "factor": draw(st.sampled_from([0.5, 1.7, 2.0, 16.0])),
        "measure": draw(st.sampled_from(["fluctuation", "direction", "variance"])),
        "threshold": draw(st.sampled_from(["mean", "std", "quantile", 0.0, -1.5])),
        "select": draw(st.sampled_from(["below", "above"])),
        "decay": draw(st.sampled_from([None, 0.0, 0.5, 0.99])),
        "min_steps": draw(st.integers(1, 3)),
        "refresh": draw(st.one_of(st.integers(1, 3), st.just("epoch"))),
        "timing": draw(st.sampled_from(["lagged", "exact"])),
    }
    if out["threshold"] == "std" and draw(st.booleans()):
        out["num_std"] = draw(st.floats(0.1, 2.0))
    if out["threshold"] == "quantile" and draw(st.booleans()):
        out["quantile"] = draw(st.floats(0.05, 0.95))
    norm = draw(st.sampled_from([None, None, "match", "clip"]))
    if norm == "match":
        out["match_norm"] = True
    elif norm == "clip":
        out["max_norm"] = draw(st.sampled_from([1e-2, 1.0, 1e6]))
    if draw(st.booleans()):
        out["windows"] = draw(
            st.sampled_from([[(0, 2)], [(1, 3, 3.0), (4, 6)], [(2, 3, 0.25), (3, 9)]])
        )
        out["unit"] = draw(st.sampled_from(["step", "epoch"]))
    return out


def gradient(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shift = draw(st.sampled_from([0.0, 0.0, 3.0, -100.0]))
    scale = draw(st.sampled_from([1.0, 1e-3, 40.0]))
    value = ((normal(shape, dtype, generator) + shift) * scale).to(dtype)
    layouts = [torch.clone, misaligned]
    if value.dim() >= 1 and value.numel():
        layouts.append(every_other)
    if value.dim() >= 2:
        layouts.append(transposed)
    return draw(st.sampled_from(layouts))(value)


@given(data=st.data(), parameters=PARAMETERS, chosen=options())
@settings(max_examples=200)
def test_any_run(
    place: Place, data: st.DataObject, parameters: dict[str, Any], chosen: dict[str, Any]
) -> None:
    shapes = {name: shape for name, (shape, _) in parameters.items()}
    model = bare(shapes, {name: dtype for name, (_, dtype) in parameters.items()}, place.device)
    names = [name for name, _ in model.named_parameters()]
    order = [name for name, module in model.named_modules() if module._parameters]
    excluded = data.draw(st.lists(st.sampled_from(names), max_size=len(names) - 1, unique=True))
    by_layer = layers_of([name for name in names if name not in excluded])
    layers = {name: by_layer[name] for name in order if name in by_layer}
    selection = {"exclude": excluded} if excluded else {}
    twin = Twin(model, place, layers, excluded, **selection, **chosen)

    twin.set_epoch(0)
    for step in range(data.draw(st.integers(2, 7))):
        if step and data.draw(st.booleans()):
            twin.set_epoch(data.draw(st.integers(0, 4)))
        absent = data.draw(st.sets(st.sampled_from(names), max_size=len(names) - 1))
        gradients = {
            name: gradient(data.draw, shapes[name], parameters[name][1], step).to(place.device)
            for name in names
            if name not in absent
        }
        accident = data.draw(st.sampled_from([None] * 5 + ["nan", "found_inf"]))
        hit = [name for name in gradients if gradients[name].numel() and name not in excluded]
        if accident == "nan" and hit:
            victim = reals(gradients[data.draw(st.sampled_from(hit))])
            place_of = tuple(data.draw(st.integers(0, size - 1)) for size in victim.shape)
            victim[place_of] = data.draw(st.sampled_from([torch.nan, torch.inf]))
        amp: dict[str, Any] = {}
        if data.draw(st.booleans()):
            scale = data.draw(st.sampled_from([0.5, 3.0, 64.0]))
            amp["grad_scale"] = torch.tensor([scale], device=place.device)
            amp["unscale"] = data.draw(st.booleans())
        if accident == "found_inf" or data.draw(st.booleans()):
            flag = 1.0 if accident == "found_inf" else 0.0
            amp["found_inf"] = torch.tensor([flag], device=place.device)
        twin.step(gradients, **amp)
