"""Asked, not listed: does an optimizer's step follow the size of a layer's gradients?"""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from cases import torchs_optimizer_cases
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gradamp_fast.optimizer_scale import follows_gradient_size, inside, stretch_of

SGD_LIKE = {"SGD", "ASGD", "LBFGS"}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [
        nn.Parameter(torch.ones(7, 5, dtype=dtype)),
        nn.Parameter(torch.ones(3, 5, dtype=dtype)),
    ]


PLAIN = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
]


@pytest.mark.parametrize("rest", [{}, {"weight_decay": 0.1}, {"foreach": True, "maximize": True}])
@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
def test_torchs_own(kind: type[Optimizer], rest: dict[str, Any]) -> None:
    try:
        optimizer = kind(parameters(), lr=0.01, **rest)
    except TypeError:
        pytest.skip(f"{kind.__name__} does not take {rest}")
    before = repr(optimizer.state)
    assert follows_gradient_size(optimizer) == (kind.__name__ in SGD_LIKE)
    assert repr(optimizer.state) == before


def test_torchs_own_with_the_options_that_torch_tests_them_with() -> None:
    for info in torchs_optimizer_cases():
        for given in info.optim_inputs_func(device="cpu"):
            optimizer = info.optim_cls(parameters(), **given.kwargs)
            expected = info.optim_cls.__name__ in SGD_LIKE
            assert follows_gradient_size(optimizer) == expected, (info.name, given.desc)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_every_dtype(dtype: torch.dtype) -> None:
    assert stretch_of(torch.optim.SGD(parameters(dtype), lr=1e-3)) == pytest.approx(2, abs=1e-3)
    assert stretch_of(torch.optim.Adam(parameters(dtype))) == pytest.approx(1, abs=1e-3)


SEEN = {
    "adabelief": 1, "adadelta": 1, "adafactor": 1, "adafactorbv": 1, "adagrad": 1, "adam": 1,
    "adamax": 1, "adamp": 1, "adamw": 1, "adan": 1, "adopt": 1, "lamb": 1, "laprop": 1, "lion": 1,
    "mars": 1, "muon": 1, "nadamw": 1, "novograd": 1, "radam": 1, "rmsprop": 1, "sgd": 2,
    "sgdp": 2, "sgdw": 2, "momentum": 2, "nesterov": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_timms(name: str) -> None:
    optim = pytest.importorskip("timm.optim")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = optim.create_optimizer_v2(nn.Linear(5, 4), opt=name, lr=1e-3, weight_decay=0.05)
    assert stretch_of(inside(optimizer)) == pytest.approx(SEEN[name], abs=0.1)


def test_lars_adapts_where_there_is_a_decay() -> None:
    optim = pytest.importorskip("timm.optim")
    assert follows_gradient_size(optim.Lars(parameters(), lr=0.1))
    assert not follows_gradient_size(optim.Lars(parameters(), lr=0.1, weight_decay=1e-4))


def test_transformers() -> None:
    optimization = pytest.importorskip("transformers.optimization")
    assert stretch_of(optimization.Adafactor(parameters())) == pytest.approx(1, abs=1e-2)


class Heavy(torch.optim.AdamW):
    """Named as nothing else."""


class AdamLike(torch.optim.SGD):
    """Named after what it is not."""


class Root(Optimizer):
    """Goes by the square root of each layer's norm."""

    def __init__(self, params: Any, lr: float, *, power: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "power": power})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad / p.grad.norm() ** group["power"], alpha=group["lr"])


class Demanding(torch.optim.AdamW):
    """Cannot be made of options alone."""

    def __init__(self, params: Any, model: nn.Module) -> None:
        super().__init__(params)
        self.model_of_mine = model


def test_names_do_not_matter_where_the_class_can_be_tried() -> None:
    assert not follows_gradient_size(Heavy(parameters()))
    assert follows_gradient_size(AdamLike(parameters(), lr=0.1))
    assert stretch_of(Root(parameters(), lr=0.1)) == pytest.approx(2**0.5, rel=1e-3)
    assert stretch_of(Root(parameters(), 0.1, power=1.0)) == pytest.approx(1, rel=1e-3)


def test_names_decide_where_it_cannot() -> None:
    optimizer = Demanding(parameters(), nn.Linear(1, 1))
    assert stretch_of(optimizer) is None
    assert not follows_gradient_size(optimizer)
    assert stretch_of(torch.optim.SparseAdam(parameters())) is None


def test_the_least_of_all_groups() -> None:
    groups = [{"params": [p]} for p in parameters()]
    groups[0]["power"] = 1.0
    assert not follows_gradient_size(Root(groups, lr=0.1, power=0.0))
    assert follows_gradient_size(Root(groups[1:], lr=0.1, power=0.0))


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0), torch.tensor(0.1)])
def test_a_learning_rate_that_is_0_or_a_tensor(rate: Any) -> None:
    optimizer = torch.optim.SGD(parameters(), lr=rate, foreach=False)
    assert stretch_of(optimizer) == pytest.approx(2, rel=1e-3)
    assert optimizer.param_groups[0]["lr"] is rate


class Around:
    def __init__(self, inner: Any, name: str) -> None:
        setattr(self, name, inner)


@pytest.mark.parametrize("name", ["optimizer", "base_optimizer", "_base_optimizer", "optim"])
def test_through_wrappers(name: str) -> None:
    inner = torch.optim.Adam(parameters())
    assert inside(Around(Around(inner, name), "optimizer")) is inner
    assert not follows_gradient_size(Around(inner, name))  # type: ignore[arg-type]


def test_through_timms_lookahead() -> None:
    optim = pytest.importorskip("timm.optim")
    assert not follows_gradient_size(optim.Lookahead(torch.optim.Adam(parameters())))
    assert follows_gradient_size(optim.Lookahead(torch.optim.SGD(parameters(), lr=0.1)))


def test_an_optimizer_that_holds_itself() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    optimizer.optimizer = optimizer  # type: ignore[attr-defined]
    assert follows_gradient_size(optimizer)


class Noisy(torch.optim.SGD):
    """Draws from every generator there is."""

    def step(self, closure: Any = None) -> None:
        scale = 1 + 0.01 * (float(torch.rand(())) + random.random() + float(np.random.rand()))
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=group["lr"] * scale)


def test_nothing_global_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random states, hooks, gradients, modes, the optimizer itself."""
    own = parameters()
    optimizer = Noisy(own, lr=0.1)
    called: list[str] = []
    for when in ("pre", "post"):
        getattr(optimizer, f"register_step_{when}_hook")(lambda *_: called.append("own"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: called.append("global")),
        register_optimizer_step_post_hook(lambda *_: called.append("global")),
    ]
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    stored = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        assert stretch_of(optimizer) == pytest.approx(2, rel=1e-2)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        stretch_of(torch.optim.SGD(parameters(), lr=0.37))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert optimizer.state_dict() == stored
    assert all(p.grad is None for p in own)
    assert called == []
    for p in own:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert called == ["global", "own", "own", "global"]
    for handle in handles:
        handle.remove()


def test_other_defaults() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            optimizer = torch.optim.Adam([nn.Parameter(torch.ones(3, 4))], betas=(0.8, 0.9))
            assert stretch_of(optimizer) == pytest.approx(1, rel=1e-3)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_class_is_tried_once_for_the_same_options(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Counted(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, lr)
            made.append(self)

    for _ in range(48):
        assert follows_gradient_size(Counted(parameters()))
    assert len(made) == 48 + 2


def test_shapes() -> None:
    """Scalars, vectors, kernels, empty groups; Muon takes matrices only."""
    for shape in ((), (5,), (9, 1), (2, 3, 3, 3)):
        assert stretch_of(torch.optim.Adam([nn.Parameter(torch.ones(shape))])) == pytest.approx(
            1, rel=1e-2
        )
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    optimizer.add_param_group({"params": []})
    assert stretch_of(optimizer) == pytest.approx(2, rel=1e-3)
