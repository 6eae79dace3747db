"""Models, dtypes, layouts, options and accidents drawn at random, against the oracle."""

from __future__ import annotations

from typing import Any

import torch
from cases import COMPLEX, REALS, Place, Twin, bare, layers_of, normal, reals
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layouts import every_other, misaligned, transposed
from torch import Tensor, nn

NAMES = ("a.weight", "a.bias", "b.weight", "b.inner.weight", "c.weight", "c.bias", "d.weight")
SHAPES = [
    (), (0,), (1,), (31,), (33,), (64,), (1009,), (4095,), (4096,), (4097,), (8193,),
    (3, 5), (7, 0), (40, 9), (67, 65), (2, 1, 3), (8, 3, 3, 3),
]  # fmt: skip

PARAMETERS = st.dictionaries(
    st.sampled_from(NAMES),
    st.tuples(st.sampled_from(SHAPES), st.sampled_from([*REALS, *COMPLEX])),
    min_size=2,
)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    out: dict[str, Any] = {
        "factor": draw(st.sampled_from([0.5, 1.7, 2.0, 16.0])),
        "measure": draw(st.sampled_from(["fluctuation", "direction", "variance", "random"])),
        "threshold": draw(st.sampled_from(["mean", "std", "quantile", 0.0, -1.5, 2.0])),
        "select": draw(st.sampled_from(["below", "above"])),
        "decay": draw(st.sampled_from([None, 0.0, 0.5, 0.99])),
        "min_steps": draw(st.integers(1, 3)),
        "refresh": draw(st.sampled_from([1, 1, 2, 3, "epoch"])),
        "timing": draw(st.sampled_from(["lagged", "exact"])),
    }
    if out["measure"] == "random" and draw(st.booleans()):
        out["seed"] = draw(st.integers(0, 2**32 - 1))
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


def gradient(draw: st.DrawFn, parameter: nn.Parameter, index: int, step: int) -> Tensor:
    """Something that lasts and something that changes, in a drawn mixture, size and layout."""
    generator = torch.Generator().manual_seed(index)
    dtype = torch.complex128 if parameter.is_complex() else torch.float64
    lasting = normal(parameter.shape, dtype, generator) + draw(st.sampled_from([0.0, 3.0, -100.0]))
    changing = normal(parameter.shape, dtype, generator.manual_seed(100 * step + index))
    scale = draw(st.sampled_from([1.0, -1.0, 1e-3, 40.0]))
    value = ((lasting * draw(st.sampled_from([0, 0.3, 1])) + changing) * scale).to(parameter.dtype)
    layouts = [torch.clone, misaligned]
    if value.dim() >= 1 and value.numel():
        layouts.append(every_other)
    if value.dim() >= 2:
        layouts.append(transposed)
    return draw(st.sampled_from(layouts))(value).to(parameter.device)


@given(data=st.data(), parameters=PARAMETERS, chosen=options())
@settings(max_examples=100)
def test_any_run(
    place: Place, data: st.DataObject, parameters: dict[str, Any], chosen: dict[str, Any]
) -> None:
    shapes = {name: shape for name, (shape, _) in parameters.items()}
    model = bare(shapes, {name: dtype for name, (_, dtype) in parameters.items()}, place.device)
    names = [name for name, _ in model.named_parameters()]
    order = [name for name, module in model.named_modules() if module._parameters]
    excluded = data.draw(st.lists(st.sampled_from(names), max_size=1))
    by_layer = layers_of([name for name in names if name not in excluded])
    layers = {name: by_layer[name] for name in order if name in by_layer}
    selection = {"exclude": excluded} if excluded else {}
    twin = Twin(model, place, layers, excluded, **selection, **chosen)

    twin.set_epoch(0)
    for step in range(data.draw(st.integers(3, 7))):
        if data.draw(st.booleans()):
            twin.set_epoch(data.draw(st.integers(0, 4)))
        absent = data.draw(st.sampled_from([None, None, *names]))
        gradients = {
            name: gradient(data.draw, parameter, index, step)
            for index, (name, parameter) in enumerate(model.named_parameters())
            if name != absent
        }
        accident = data.draw(st.sampled_from([None] * 10 + ["nan", "found_inf"]))
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
