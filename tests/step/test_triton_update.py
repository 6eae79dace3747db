"""Updates by the Triton backend in triton's interpreter, against the definition.

``test_in_the_interpreter`` in test_triton.py runs these tests too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import REALS, Stream, put, same_bits
from torch import Tensor
from updating import (
    ADAM,
    ADAMW,
    QUICK,
    RULES,
    SHAPES,
    SIZES,
    Groups,
    Steps,
    check_followed,
    check_rate_on_the_device,
    check_step,
    contents,
    each_rule,
    model_of,
    optimizer_of,
    same,
)
from updating import steps_of as steps_by

from gradamp_fast import Amplifier
from gradamp_fast.call import Call
from gradamp_fast.model.walk import find_layers
from gradamp_fast.options import Options
from gradamp_fast.reference.state import State

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter


def steps_of(rule: tuple[Any, Groups], backend: str = "triton", **options: Any) -> Steps:
    from gradamp_fast.backends.torch import TorchBackend
    from gradamp_fast.backends.triton import TritonBackend

    kinds = {"torch": TorchBackend, "triton": TritonBackend}
    return steps_by(rule, kinds[backend], **options)


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
    check_rate_on_the_device(lambda: steps_of(RULES["some momentum"]))


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
    check_followed(steps_of(RULES["adamw"]))


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
