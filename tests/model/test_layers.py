"""Which parameters make up which layer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import Place, Stream, bare, put, same_bits
from torch import nn

from gradamp_fast import Amplifier

SHAPES = {
    "top": (4,),
    "stem.weight": (8, 5),
    "stem.bias": (8,),
    "stem.norm.weight": (8,),
    "head.weight": (3, 8),
    "head.bias": (3,),
}


def layer_sizes(amplifier: Amplifier, model: nn.Module) -> dict[str, int]:
    put(model, {n: torch.ones_like(p) for n, p in model.named_parameters() if p.requires_grad})
    amplifier.step()
    return {layer.name: layer.numel for layer in amplifier.report().layers}


def sizes(model: nn.Module, **options: Any) -> dict[str, int]:
    return layer_sizes(Amplifier(model, backend="torch", **options), model)


def test_by_module() -> None:
    found = sizes(bare(SHAPES))
    assert found == {"": 4, "stem": 48, "stem.norm": 8, "head": 27}
    assert list(found) == ["", "stem", "stem.norm", "head"]


def test_by_tensor() -> None:
    found = sizes(bare(SHAPES), group_by="tensor")
    assert found == {
        "top": 4, "stem.weight": 40, "stem.bias": 8, "stem.norm.weight": 8,
        "head.weight": 24, "head.bias": 3,
    }  # fmt: skip


def test_by_callable() -> None:
    """Parameter name to layer name; None excludes."""
    found = sizes(
        bare(SHAPES), group_by=lambda name: None if name == "top" else name.split(".")[-1]
    )
    assert found == {"weight": 72, "bias": 11}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"exclude": ["*bias"]}, {"": 4, "stem": 40, "stem.norm": 8, "head": 24}),
        ({"exclude": "stem.*"}, {"": 4, "head": 27}),
        ({"include": ["*.weight"]}, {"stem": 40, "stem.norm": 8, "head": 24}),
        ({"include": ["stem*"], "exclude": ["stem.norm.*"]}, {"stem": 48}),
        ({"include": lambda name: "head" in name}, {"head": 27}),
        ({"exclude": lambda name: "." in name}, {"": 4}),
        ({"exclude_bias_and_norm": True}, {"stem": 40, "head": 24}),
        ({"include": ["head.*", "top"], "exclude": ["head.bias"]}, {"": 4, "head": 24}),
    ],
)
def test_include_and_exclude(options: dict[str, Any], expected: dict[str, int]) -> None:
    assert sizes(bare(SHAPES), **options) == expected


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_matches_nothing(option: str) -> None:
    with pytest.raises(ValueError, match="steam"):
        sizes(bare(SHAPES), **{option: ["head.*", "steam.*"]})


def test_everything_excluded() -> None:
    with pytest.raises(ValueError, match="exclude"):
        sizes(bare(SHAPES), exclude=["*"])


def test_excluded_parameters_are_not_amplified(place: Place) -> None:
    model = bare(SHAPES, device=place.device)
    amplifier = place.amplifier(
        model, exclude=["stem.bias", "top"], measure="variance", min_steps=1, refresh=1,
        threshold=1e9,
    )  # fmt: skip
    stream = Stream(model)
    for step in range(2):
        gradients = stream.next()
        before = {n: g.clone() for n, g in gradients.items()}
        put(model, gradients)
        amplifier.step()
        for name, parameter in model.named_parameters():
            factor = 2 if step and name not in ("stem.bias", "top") else 1
            assert same_bits(parameter.grad, before[name] * factor), name


def test_frozen_parameters_belong_to_no_layer() -> None:
    model = bare(SHAPES)
    model.stem.weight.requires_grad_(False)
    model.head.requires_grad_(False)
    assert sizes(model) == {"": 4, "stem": 8, "stem.norm": 8}


def test_a_tied_parameter_belongs_to_the_first_layer_that_names_it(place: Place) -> None:
    model = bare({"embed.weight": (9, 4), "mid.weight": (5,), "head.bias": (9,)})
    model.head.weight = model.embed.weight
    model.to(place.device)
    amplifier = place.amplifier(
        model, measure="variance", min_steps=1, refresh=1, threshold=1e9, factor=3.0
    )
    for step in range(2):
        gradients = Stream(model, seed=step).next()
        before = gradients["embed.weight"].clone()
        put(model, gradients)
        amplifier.step()
        assert same_bits(model.head.weight.grad, before * (3 if step else 1))
    found = {layer.name: layer.numel for layer in amplifier.report().layers}
    assert found == {"embed": 36, "mid": 5, "head": 9}


def test_a_shared_module_is_one_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model.append(model[0])
    assert sizes(model) == {"0": 12}


def test_layers_without_parameters_do_not_exist() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3, affine=False))
    assert sizes(model) == {"0": 12}


def test_a_single_parameter_at_the_root() -> None:
    model = nn.Linear(3, 2)
    assert sizes(model) == {"": 8}


def test_wrapper_prefixes_are_stripped() -> None:
    """A compiled or data-parallel wrapper shows the same layers as the model."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 2)))
    plain = sizes(model)
    assert sizes(nn.DataParallel(model)) == plain
    assert sizes(torch.compile(model)) == plain
    model[1] = torch.compile(model[1])
    assert sizes(model) == plain


def test_globs_see_stripped_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3), torch.compile(nn.Sequential(nn.Linear(3, 2))))
    assert sizes(model, include=["1.0.*"]) == {"1.0": 8}


def test_a_module_called_module_is_not_a_wrapper() -> None:
    """Only a module that holds nothing else but ``module`` wraps it."""
    model = bare({"module.weight": (3,), "extra": (2,)})
    assert sizes(model) == {"": 2, "module": 3}


def test_no_warnings_for_a_usual_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sizes(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
