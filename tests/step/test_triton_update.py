"""Updates by the Triton backend in triton's interpreter, against the definition.

``test_in_the_interpreter`` in test_triton.py runs these tests too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from cases import COMPLEX, REALS, Place, Stream, bare, put, reals, same_bits
from torch import Tensor, nn

from gradamp_fast import Amplifier, optim, reference
from gradamp_fast.call import Call, Updated
from gradamp_fast.model.walk import find_layers
from gradamp_fast.options import Options
from gradamp_fast.reference.state import State

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

PLACE = Place("triton", "cpu")
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


def steps_of(rule: tuple[Any, Groups], backend: str = "triton", **options: Any) -> Steps:
    from gradamp_fast.backends.torch import TorchBackend
    from gradamp_fast.backends.triton import TritonBackend

    kinds = {"torch": TorchBackend, "triton": TritonBackend}
    shapes, dtypes = options.pop("shapes", SHAPES), options.pop("dtypes", DTYPES)
    model = model_of(shapes, dtypes)
    return Steps(model, optimizer_of(model, rule), kinds[backend], **(QUICK | options))


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


# ---- against the definition ---------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("timing", ["lagged", "exact"])
def test_every_rule_and_dtype(rule: tuple[Any, Groups], timing: str) -> None:
    steps = steps_of(rule, timing=timing, factor=1.7)
    stream, before = Stream(steps.model), None
    for _ in range(4):
        gradients = stream.next()
        before = {name: gradient.clone() for name, gradient in gradients.items()}
        check_step(steps, gradients)
        for name, parameter in steps.model.named_parameters():
            assert same_bits(parameter.grad, before[name])
    assert steps.state.column("selected").any()
    assert not steps.state.column("selected").all()


@pytest.mark.parametrize("rule", [RULES["momentum"], RULES["adamw"]], ids=["sgd", "adamw"])
@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_sizes(rule: tuple[Any, Groups], dtype: torch.dtype) -> None:
    """Alone: without layers nothing is measured."""
    shapes = {f"m{size}.w": (size,) for size in SIZES}
    steps = steps_of(rule, shapes=shapes, dtypes=dtype, include=["m4096.w"])
    stream = Stream(steps.model)
    for _ in range(2):
        check_step(steps, stream.next())


@each_rule
def test_a_scale_and_gradients_that_are_missing(rule: tuple[Any, Groups]) -> None:
    steps = steps_of(rule, exclude="c.w", factor=3.0)
    stream, scale = Stream(steps.model), torch.tensor([128.0])
    for step in range(4):
        gradients: dict[str, Tensor | None] = dict(stream.next())
        if step == 2:
            gradients["b.w"] = None
        check_step(steps, gradients, grad_scale=scale, walked=True, unscale=step % 2 == 0)


def test_a_learning_rate_on_the_device() -> None:
    for dtype in (torch.float32, torch.float64):
        by_value, by_pointer = (steps_of(RULES["some momentum"]) for _ in range(2))
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


# ---- steps that do not count ----------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("timing", ["lagged", "exact"])
def test_found_inf_on_entry_changes_nothing(rule: tuple[Any, Groups], timing: str) -> None:
    steps = steps_of(rule, timing=timing)
    stream = Stream(steps.model)
    steps(stream.next())
    before = contents(steps)
    steps(stream.next(), found_inf=torch.ones(()))
    assert same(contents(steps), before)
    assert steps.state.scalar("skipped_steps") == 1


@pytest.mark.parametrize("rule", [RULES["momentum"], RULES["adamw"]], ids=["sgd", "adamw"])
@pytest.mark.parametrize("options", [{"timing": "exact"}, {"max_norm": 1.0}, {}], ids=str)
def test_a_gradient_that_is_not_finite(rule: tuple[Any, Groups], options: dict[str, Any]) -> None:
    """It reaches its parameter, unless updates wait for what is measured."""
    steps = steps_of(rule, **options)
    stream, found_inf = Stream(steps.model), torch.zeros(())
    steps(stream.next())
    before, gradients = contents(steps), stream.next()
    gradients["b.w"].view(-1)[1024] = float("nan")
    steps(gradients, found_inf=found_inf)
    assert found_inf == 1
    assert steps.state.scalar("skipped_steps") == 1
    if options:
        assert same(contents(steps), before)
    else:
        spoilt = steps.model.b.w.isnan()
        assert spoilt[1024]
        assert spoilt.sum() == 1
        assert all(of is not None and of.steps == 2 for of in steps.updated())


# ---- multipliers --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "momentum", "nesterov", "some momentum"])
@pytest.mark.parametrize("options", [{"factor": 1 / 3}, {"timing": "exact"}], ids=str)
def test_sgd_equals_sgd_on_gradients_multiplied_before(name: str, options: dict[str, Any]) -> None:
    from gradamp_fast.backends.triton import TritonBackend

    dtypes = {name: (torch.float32, torch.float64)[i % 2] for i, name in enumerate(SHAPES)}
    together = steps_of(RULES[name], dtypes=dtypes, **options)
    apart = steps_of(RULES[name], dtypes=dtypes, exclude="[!d]*")
    rules = Options.make(QUICK | options).rules()
    plan = find_layers(apart.model, Options.make(QUICK | options))
    amplify = TritonBackend(plan, State(plan, rules.factor, torch.device("cpu")), rules)
    streams = Stream(together.model), Stream(apart.model)
    for _ in range(4):
        together(streams[0].next())
        gradients = streams[1].next()
        put(apart.model, gradients)
        amplify.step(Call())
        apart(gradients)
        assert same(contents(together), contents(apart))
    assert together.state.column("amplified_steps").any()


@pytest.mark.parametrize("decoupled", [True, False])
def test_adams_multiplier_is_a_learning_rate(decoupled: bool) -> None:
    kind = ADAMW if decoupled else ADAM
    amplified = steps_of((kind, [{"lr": 0.01, "weight_decay": 0.125}]), factor=2.0)
    decay = 0.125 / 2 if decoupled else 0.125
    faster = steps_of((kind, [{"lr": 0.02, "weight_decay": decay}]))
    amplified.state.column("selected").fill_(1.0)
    for steps in (amplified, faster):
        steps(Stream(steps.model).next())
    assert same(contents(amplified), contents(faster))


NORMS: list[dict[str, Any]] = [{"max_norm": 0.5}, {"match_norm": True, "timing": "exact"}]


@pytest.mark.parametrize("rule", [RULES["momentum"], RULES["adamw"]], ids=["sgd", "adamw"])
@pytest.mark.parametrize("options", NORMS, ids=str)
def test_norms(rule: tuple[Any, Groups], options: dict[str, Any]) -> None:
    """Beside the definition; layers whose updates are multiplied count plain in the norm."""
    options = options | {"exclude": "c.w", "factor": 3.0, "dtypes": torch.float32}
    mine, theirs = (steps_of(rule, backend, **options) for backend in ("triton", "torch"))
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


def test_growth_under_adam_knows_no_surge() -> None:
    growth = {"grow": True, "factor": 1.5, "measure": "direction", "threshold": -0.3}
    for rule, infinite in ((RULES["adamw"], True), (RULES["momentum"], False)):
        mine, theirs = (
            steps_of(rule, backend, **growth, refresh=1) for backend in ("triton", "torch")
        )
        streams = Stream(mine.model), Stream(theirs.model)
        for _ in range(4):
            mine(streams[0].next())
            theirs(streams[1].next())
        least = mine.state.column("least_variance")
        assert least.isinf().all() if infinite else least.isfinite().any()
        torch.testing.assert_close(mine.state.layers, theirs.state.layers, rtol=1e-5, atol=1e-8)
        assert mine.state.column("settled").any()


# ---- memory ---------------------------------------------------------------------------------


def misaligned(tensor: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(tensor[:1]), tensor))[1:]


@each_rule
def test_tensors_anywhere_in_memory(rule: tuple[Any, Groups]) -> None:
    """Misaligned, transposed and strided, gradients and the rest, each in its own way."""
    shapes = {"a.w": (3000,), "b.w": (50, 60), "c.w": (40, 3)}
    straight = steps_of(rule, shapes=shapes, dtypes=torch.float32, factor=3.0)
    crooked = steps_of(rule, shapes=shapes, dtypes=torch.float32, factor=3.0)
    model = crooked.model
    model.a.w.data = misaligned(model.a.w.data)
    model.b.w.data = model.b.w.data.t().contiguous().t()
    streams = Stream(straight.model), Stream(model)
    for step in range(3):
        straight(streams[0].next())
        a, b, c = streams[1].next().values()
        if step == 1:
            a = misaligned(a)
            for state in crooked.updates.state.values():
                for key, value in state.items():
                    state[key] = misaligned(value) if value.shape == a.shape else value
        crooked({"a.w": a, "b.w": b, "c.w": torch.cat((c, c), dim=1)[:, :3]})
    for one, other in zip(contents(straight), contents(crooked), strict=True):
        assert same_bits(one, other.contiguous())


def test_the_grid_changes_no_bit() -> None:
    from gradamp_fast.backends.triton.step import step_kernel

    def outcome(programs: int) -> list[Tensor]:
        shapes = {"a.w": (9000,), "b.w": (4100,), "c.w": (5,)}
        steps = steps_of(RULES["adamw"], shapes=shapes, dtypes=torch.float32, max_norm=0.5)
        stream = Stream(steps.model)
        launches = steps.backend.launcher._launch
        steps(stream.next())
        launches.update(dict.fromkeys(launches, step_kernel[(programs,)]))
        steps(stream.next())
        return [*contents(steps), steps.state.values, steps.state.sketch]

    first, *others = (outcome(programs) for programs in (1, 3, 40))
    assert all(same(first, other) for other in others)


def test_what_became_of_a_tensor_is_followed() -> None:
    """New addresses, states and options are seen in the step that comes next."""

    def load(steps: Steps) -> None:
        steps.optimizer.load_state_dict(steps.optimizer.state_dict())

    def move(steps: Steps) -> None:
        for parameter in steps.model.parameters():
            parameter.data = parameter.data.clone()

    def replace(steps: Steps) -> None:
        for state in steps.updates.state.values():
            state["exp_avg"] = state["exp_avg"].clone()

    def slow_down(steps: Steps) -> None:
        steps.optimizer.param_groups[0]["lr"] /= 2

    def regroup(steps: Steps) -> None:
        moved = steps.optimizer.param_groups[0]["params"].pop()
        steps.optimizer.add_param_group({"params": [moved], "lr": 0.5})

    changes: list[Callable[[Steps], None]] = [load, move, replace, slow_down, regroup]
    steps = steps_of(RULES["adamw"])
    stream = Stream(steps.model)
    for change in changes:
        check_step(steps, stream.next())
        change(steps)
        check_step(steps, stream.next())


def test_versions_say_what_was_written() -> None:
    steps = steps_of(RULES["adamw"])
    stream = Stream(steps.model)
    steps(stream.next())
    for _ in range(2):
        gradients = stream.next()
        written = [t for of in steps.updated() if of for t in (of.parameter, *of.states, of.steps)]
        before, read = [t._version for t in written], [g._version for g in gradients.values()]
        steps(gradients)
        assert all(t._version > v for t, v in zip(written, before, strict=True))
        assert [g._version for g in gradients.values()] == read


def test_through_the_doors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attached, and the rest of the parameters alone; frozen ones with a gradient as well."""
    monkeypatch.setenv("GRADAMP_BACKEND", "triton")
    for rule in (RULES["nesterov"], RULES["adamw"]):
        ends = []
        for backend in ("torch", "triton"):
            monkeypatch.setenv("GRADAMP_BACKEND", backend)
            model = model_of({"a.w": (70, 60), "b.w": (33,), "c.w": (5,)}, torch.float32)
            model.c.w.requires_grad_(False)
            optimizer = optimizer_of(model, rule)
            amplifier = Amplifier(model, backend=backend, **QUICK)
            amplifier.attach(optimizer)
            stream = Stream(model)
            for _ in range(4):
                put(model, stream.next())
                optimizer.step()
            ends.append([p.detach() for p in model.parameters()])
            assert any(layer.selected for layer in amplifier.report().layers)
        for one, other in zip(*ends, strict=True):
            torch.testing.assert_close(one, other)
            assert one.isfinite().all()
