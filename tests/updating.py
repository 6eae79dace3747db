"""An optimizer's updates by a backend, and by the definition beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from cases import COMPLEX, REALS, Stream, bare, put, reals, same_bits
from torch import Tensor, nn

from gradamp_fast import optim, reference
from gradamp_fast.call import Call, Updated
from gradamp_fast.model.walk import find_layers
from gradamp_fast.options import Options
from gradamp_fast.reference.state import State

QUICK: dict[str, Any] = {"min_steps": 2, "refresh": 2, "decay": 0.9}
# A tile and more, runs of 16, less than a vector, no element; a block and one more or less.
SHAPES = {"a.w": (41, 103), "a.b": (3,), "b.w": (1025,), "c.w": (33,), "d.w": (0,), "d.b": ()}
DTYPES = dict(zip(SHAPES, (*REALS, *COMPLEX), strict=True))
SIZES = (0, 1, 2, 7, 31, 33, 255, 256, 511, 513, 1009, 1023, 1024, 1025, 4095, 4096, 4097, 8193)

Groups = Sequence[Mapping[str, Any]]
SGD, ADAM, ADAMW = optim.SGD, optim.Adam, optim.AdamW
# By a list of options, one for each group that the parameters are dealt out to.
RULES: dict[str, tuple[Any, Groups]] = {
    "plain": (SGD, [{"lr": 0.1}]),
    "momentum": (SGD, [{"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}]),
    "nesterov": (SGD, [{"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}]),
    "some momentum": (SGD, [{"lr": 0.1, "maximize": True}, {"lr": 0.3, "momentum": 0.5}]),
    "adam": (ADAM, [{"lr": 0.01, "weight_decay": 0.1}]),
    "adamw": (ADAMW, [{"lr": 0.01}, {"lr": 0.03, "weight_decay": 0.0, "betas": (0.0, 0.5)}]),
    "amsgrad": (ADAMW, [{"lr": 0.01, "amsgrad": True, "maximize": True}]),
    "some amsgrad": (ADAM, [{"lr": 0.01, "amsgrad": True}, {"lr": 0.02, "betas": (0.5, 0.9)}]),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def model_of(
    shapes: Mapping[str, Sequence[int]] = SHAPES,
    dtype: torch.dtype | Mapping[str, torch.dtype] = DTYPES,
) -> nn.Module:
    model, generator = bare(shapes, dtype), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = reals(parameter)
            flat.copy_(torch.randn(flat.shape, generator=generator, dtype=torch.float64))
    return model


def optimizer_of(model: nn.Module, rule: tuple[Any, Groups]) -> Any:
    kind, groups = rule
    parameters = list(model.parameters())
    parts = [parameters[index :: len(groups)] for index in range(len(groups))]
    return kind([{"params": part, **group} for part, group in zip(parts, groups, strict=True)])


class Steps:
    """One backend's steps over a model, with an optimizer's updates."""

    def __init__(self, model: nn.Module, optimizer: Any, backend: Any, **options: Any) -> None:
        rules = Options.make(options).rules()
        self.model, self.optimizer = model, optimizer
        self.updates = optimizer._parts()[0]
        self.plan = find_layers(model, Options.make(options))
        self.state = State(self.plan, rules.factor, torch.device("cpu"))
        layers = [optimizer.multiplies_update] * len(self.plan.layers)
        self.state.tell_updates(layers)
        self.rules, self.backend = rules, backend(self.plan, self.state, rules)

    def updated(self) -> list[Updated | None]:
        """As the optimizer sees them."""
        slots = self.plan.slots
        parameters = [slot.parameter for slot in slots]
        gradients = [parameter.grad for parameter in parameters]
        return self.updates.tensors([slot.name for slot in slots], parameters, gradients)

    def __call__(self, gradients: Mapping[str, Tensor | None], **call: Any) -> None:
        put(self.model, gradients)
        self.backend.step(Call(**call, update=self.updates))


def steps_of(rule: tuple[Any, Groups], backend: Any, **options: Any) -> Steps:
    """``backend``: the class."""
    shapes, dtypes = options.pop("shapes", SHAPES), options.pop("dtypes", DTYPES)
    model = model_of(shapes, dtypes)
    return Steps(model, optimizer_of(model, rule), backend, **(QUICK | options))


def contents(steps: Steps) -> list[Tensor]:
    """Parameters, states and counts."""
    updates, out = steps.updates, []
    for parameter in steps.model.parameters():
        state = updates.state.get(parameter, {})
        out += [parameter.detach(), *(state[key] for key in sorted(state))]
        if updates.counts is not None and parameter in updates.counts:
            out.append(updates.counts[parameter])
    return [tensor.clone() for tensor in out]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(same_bits, a, b))


def in_fp64(of: Updated) -> Updated:
    """A copy of what is updated, which the definition does not round."""
    parameter, *states = (t.to(torch.float64, copy=True) for t in (of.parameter, *of.states))
    return of._replace(parameter=parameter, states=tuple(states), steps=of.steps.clone())


def error(actual: Tensor, exact: Tensor, *sizes: Tensor) -> float:
    """The largest, in epsilons of the largest of ``sizes``, one for each element."""
    if actual.numel() == 0:
        return 0.0
    numbers = torch.finfo(actual.dtype)
    largest = torch.stack([size.abs().double() for size in sizes]).amax(dim=0)
    unit = numbers.eps * largest.clamp(min=numbers.smallest_normal)
    return float(((actual.double() - exact).abs() / unit).max())


def check_update(
    was: Updated, exact: Updated, of: Updated, gradient: Tensor, multiplier: float
) -> None:
    """Two epsilons of the largest number that goes into an element or comes out of it.

    Adam's update is of the size of the learning rate, whatever the gradient. A square has twice
    the error, and where fp64 is the dtype the definition errs as well.
    """
    h, p, most = of.hyper, exact.parameter, 4 if of.parameter.dtype == torch.float64 else 2
    g = gradient.double().abs() + (0.0 if h.decoupled else h.weight_decay) * was.parameter.abs()
    if h.rule == "sgd":
        taken, steps = [g], [h.lr * part for part in (g, *was.states)]
    else:
        square = (1 - h.beta2) * g.square()
        taken, steps = [(1 - h.beta1) * g, square, square], [torch.full_like(p, h.lr * multiplier)]
    assert error(of.parameter, p, p, was.parameter, *steps) <= most
    for index, (mine, theirs, before) in enumerate(
        zip(of.states, exact.states, was.states, strict=True)
    ):
        assert error(mine, theirs, theirs, before, taken[index]) <= most * (2 if index else 1)
    assert torch.equal(of.steps, exact.steps)


def check_step(steps: Steps, gradients: Mapping[str, Tensor | None], **call: Any) -> None:
    """One step against the definition on the same inputs."""
    put(steps.model, gradients)
    before = [of and in_fp64(of) for of in steps.updated()]
    exact = [of and in_fp64(of) for of in steps.updated()]
    standing = reference.standing(steps.state, steps.rules, Call(**call))
    steps(gradients, **call)
    own = standing.multipliers
    if steps.rules.exact:
        own = reference.multipliers(steps.state, steps.rules, standing.factor)
    after = steps.updated()
    for slot, was, expected, of in zip(steps.plan.slots, before, exact, after, strict=True):
        if was is None or expected is None or of is None:
            assert slot.parameter.grad is None
            assert of is expected is was
            continue
        flat = reals(slot.parameter.grad).flatten()
        multiplier = own[slot.layer] if slot.layer >= 0 else torch.ones_like(standing.inverse)
        reference.update(expected, flat, multiplier, standing.inverse, ~standing.skipped)
        check_update(was, expected, of, flat * standing.inverse, float(multiplier))


def check_rate_on_the_device(make: Callable[[], Steps]) -> None:
    """A learning rate behind an address is the same as one given by value."""
    for dtype in (torch.float32, torch.float64):
        by_value, by_pointer = make(), make()
        read = by_pointer.updates.hyper
        by_pointer.updates.hyper = lambda group, read=read, dtype=dtype: read(group)._replace(
            lr=torch.tensor(group["lr"], dtype=dtype)
        )
        for steps in (by_value, by_pointer):
            for group in steps.optimizer.param_groups:
                group["lr"] = float(torch.tensor(group["lr"]))
            stream = Stream(steps.model)
            for _ in range(2):
                steps(stream.next())
        assert same(contents(by_value), contents(by_pointer))


def check_followed(steps: Steps) -> None:
    """New addresses, states and options are seen in the step that comes next."""

    def load() -> None:
        steps.optimizer.load_state_dict(steps.optimizer.state_dict())

    def move() -> None:
        for parameter in steps.model.parameters():
            parameter.data = parameter.data.clone()

    def replace() -> None:
        for state in steps.updates.state.values():
            state["exp_avg"] = state["exp_avg"].clone()

    def slow_down() -> None:
        steps.optimizer.param_groups[0]["lr"] /= 2

    def regroup() -> None:
        moved = steps.optimizer.param_groups[0]["params"].pop()
        steps.optimizer.add_param_group({"params": [moved], "lr": 0.5})

    changes: list[Callable[[], None]] = [load, move, replace, slow_down, regroup]
    stream = Stream(steps.model)
    for change in changes:
        check_step(steps, stream.next())
        change()
        check_step(steps, stream.next())
