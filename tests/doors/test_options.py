"""Options: ranges, nearest names, dict round trip."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from cases import bare
from torch import nn

from gradamp_fast import Amplifier, Schedule
from gradamp_fast.options import Options

DEFAULTS = {
    "grow": False,
    "max_factor": None,
    "factor": 2.0,
    "measure": "fluctuation",
    "threshold": "mean",
    "select": "below",
    "placement": "gradient",
    "measure_every": None,
    "max_amplification": None,
    "seed": None,
    "decay": 0.99,
    "min_steps": 100,
    "refresh": 100,
    "schedule": None,
    "timing": "lagged",
    "match_norm": False,
    "max_norm": None,
    "group_by": "module",
    "exclude_bias_and_norm": False,
    "error_if_nonfinite": False,
    "backend": "auto",
}


GROWING = {
    "grow": True,
    "factor": 1.4,
    "measure": "direction",
    "threshold": 0.0,
    "decay": 0.9,
    "min_steps": 50,
    "refresh": 10,
}


@pytest.mark.parametrize("expected", [DEFAULTS, DEFAULTS | GROWING], ids=["fixed", "growing"])
def test_defaults(expected: dict[str, Any]) -> None:
    options = Options(grow=expected["grow"])
    assert {name: getattr(options, name) for name in expected} == expected
    assert Amplifier(bare({"a.w": (3,)}), grow=expected["grow"]).options == options


def test_what_is_given_is_not_a_default() -> None:
    """Whichever way it grows, an option that has the other one's default keeps it."""
    names = [name for name in GROWING if name != "grow"]
    given = {name: DEFAULTS[name] for name in names}
    options = Options(grow=True, **given)
    assert {name: getattr(options, name) for name in names} == given
    assert options.rules().max_factor == 1024.0
    assert Options(grow=True, max_factor=4).rules().max_factor == 4.0


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().factor = 3.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"factor": 1.0}, ("factor", "1.0")),
        ({"factor": 0.0}, ("factor", "0.0")),
        ({"factor": -2.0}, ("factor", "-2.0")),
        ({"factor": math.inf}, ("factor", "inf")),
        ({"factor": math.nan}, ("factor", "nan")),
        ({"measure": "fluctuatoin"}, ("measure", "fluctuatoin", "fluctuation")),
        ({"measure": "varience"}, ("measure", "varience", "variance", "direction")),
        ({"threshold": "meen"}, ("threshold", "meen", "mean", "quantile")),
        ({"threshold": math.nan}, ("threshold", "nan")),
        ({"threshold": math.inf}, ("threshold", "inf")),
        ({"select": "bellow"}, ("select", "bellow", "below", "above")),
        ({"threshold": "std", "num_std": 0.0}, ("num_std", "0.0")),
        ({"threshold": "std", "num_std": -1.0}, ("num_std", "-1.0")),
        ({"threshold": "std", "num_std": math.inf}, ("num_std", "inf")),
        ({"num_std": 1.0}, ("num_std", "threshold", "std")),
        ({"threshold": "quantile", "num_std": 1.0}, ("num_std", "threshold")),
        ({"threshold": "quantile", "quantile": 0.0}, ("quantile", "0.0")),
        ({"threshold": "quantile", "quantile": 1.0}, ("quantile", "1.0")),
        ({"threshold": "std", "quantile": 0.5}, ("quantile", "threshold")),
        ({"threshold": 0.5, "quantile": 0.5}, ("quantile", "threshold")),
        ({"seed": 1}, ("seed", "measure", "random")),
        ({"measure": "random", "seed": -1}, ("seed", "-1")),
        ({"measure": "random", "seed": 2**32}, ("seed", str(2**32))),
        ({"measure": "random", "seed": 0.5}, ("seed", "0.5")),
        ({"placement": "backwards"}, ("placement", "backwards", "backward")),
        ({"measure_every": 5}, ("measure_every", "5", "placement")),
        ({"max_amplification": 5.0}, ("max_amplification", "5.0", "placement")),
        ({"placement": "backward", "measure_every": 1}, ("measure_every", "1")),
        ({"placement": "backward", "max_amplification": 1.0}, ("max_amplification", "1.0")),
        ({"placement": "backward", "timing": "exact"}, ("timing", "exact", "placement")),
        ({"placement": "backward", "match_norm": True}, ("match_norm", "True", "placement")),
        ({"placement": "backward", "group_by": "tensor"}, ("group_by", "tensor", "placement")),
        ({"decay": 1.0}, ("decay", "1.0")),
        ({"decay": -0.1}, ("decay", "-0.1")),
        ({"decay": math.nan}, ("decay", "nan")),
        ({"min_steps": 0}, ("min_steps", "0")),
        ({"min_steps": 1.5}, ("min_steps", "1.5")),
        ({"refresh": 0}, ("refresh", "0")),
        ({"refresh": "epochs"}, ("refresh", "epochs", "epoch")),
        ({"timing": "laged"}, ("timing", "laged", "lagged", "exact")),
        ({"match_norm": True, "max_norm": 1.0}, ("match_norm", "max_norm")),
        ({"max_norm": 0.0}, ("max_norm", "0.0")),
        ({"max_norm": -1.0}, ("max_norm", "-1.0")),
        ({"max_norm": math.nan}, ("max_norm", "nan")),
        ({"group_by": "modul"}, ("group_by", "modul", "module", "tensor")),
        ({"backend": "cudda"}, ("backend", "cudda", "cuda", "triton")),
        ({"grow": 1}, ("grow", "1", "True or False")),
        ({"grow": True, "factor": 1.0}, ("factor", "1.0", "nothing would grow")),
        ({"grow": True, "factor": 0.5}, ("factor", "0.5", "nothing would grow")),
        ({"grow": True, "match_norm": True}, ("match_norm", "grow=True", "takes back")),
        ({"grow": True, "placement": "backward"}, ("placement", "grow=True", "compound")),
        ({"grow": True, "measure": "random"}, ("measure", "grow=True", "agree")),
        (
            {"grow": True, "schedule": Schedule([(0, 3), (5, 9, 0.5)])},
            ("schedule", "(5, 9, 0.5)", "grow=True"),
        ),
        ({"grow": True, "max_factor": 1.0}, ("max_factor", "1.0")),
        ({"grow": True, "max_factor": math.inf}, ("max_factor", "inf")),
        ({"max_factor": 4.0}, ("max_factor", "4.0", "grow=True")),
        ({"facter": 2.0}, ("facter", "factor")),
        ({"min_step": 2}, ("min_step", "min_steps")),
        ({"schedule": [(0, 3)]}, ("schedule", "Schedule")),
    ],
    ids=str,
)
def test_out_of_range(given: dict[str, Any], words: tuple[str, ...]) -> None:
    """The message names option, value and range, and the nearest valid name."""
    with pytest.raises(ValueError, match=words[0]) as raised:
        Amplifier(bare({"a.w": (3,)}), **given)
    for word in words:
        assert word in str(raised.value), (word, str(raised.value))


@pytest.mark.parametrize(
    "given",
    [
        {"factor": 0.5},
        {"threshold": -3},
        {"threshold": "std", "num_std": 2.5},
        {"threshold": "quantile", "quantile": 0.99},
        {"measure": "random", "seed": 0},
        {"placement": "backward", "measure_every": 4, "max_amplification": 2.5},
        {"decay": 0},
        {"decay": None},
        {"min_steps": 1, "refresh": 1},
        {"refresh": "epoch"},
        {"max_norm": 1e-3},
        {"group_by": "tensor"},
        {"schedule": Schedule([(0, 3), (5, 9, 4.0)], unit="step")},
        {"grow": True},
        {"grow": True, "max_factor": 8, "factor": 2.0, "decay": None, "refresh": "epoch"},
        {"include": ["a*"]},
        {"include": "a*", "exclude": "b*"},
        {},
    ],
    ids=str,
)
def test_round_trip_through_json(given: dict[str, Any]) -> None:
    options = Options(**given)
    stored = json.loads(json.dumps(options.to_dict()))
    assert Options.from_dict(stored) == options


def test_unknown_key_of_a_stored_dict_is_refused() -> None:
    with pytest.raises(ValueError, match="factr"):
        Options.from_dict({**Options().to_dict(), "factr": 3.0})


def test_options_do_not_share_mutable_values() -> None:
    names = ["a*"]
    options = Options(include=names)
    names.append("b*")
    assert "b*" not in str(options.to_dict())


def test_model_without_trainable_parameters() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    model.weight.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="parameter"):
        Amplifier(model).step()
