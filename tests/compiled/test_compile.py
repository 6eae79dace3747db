"""torch.compile: the step stands in the graph as one operator, and changes what eager changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import Place, same_bits
from torch import Tensor, nn

import gradamp_fast
from gradamp_fast import Amplifier
from gradamp_fast.call import Call
from gradamp_fast.model.plan import Plan
from gradamp_fast.ops import traced_step

QUICK = {"min_steps": 2, "refresh": 2, "decay": 0.9}
CPU = Place("cpu", "cpu")
TRACES_BACKWARD = hasattr(torch._dynamo.config, "trace_autograd_ops")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)]
    return nn.Sequential(*layers).to(device)


def batches(device: str = "cpu") -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        yield torch.randn(8, 12, generator=generator).to(device)


def outcome(model: nn.Module, amplifier: Amplifier) -> tuple[list[Tensor], list[Any]]:
    rows = amplifier.report().layers
    assert any(row.selected for row in rows)
    assert {row.steps for row in rows} == {6}
    return [p.detach().clone() for p in model.parameters()], [
        (row.name, row.steps, row.variance, row.score, row.selected) for row in rows
    ]


def assert_same(found: Any, expected: Any) -> None:
    assert found[1] == expected[1]
    assert all(same_bits(a, b) for a, b in zip(found[0], expected[0], strict=True))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """In one graph, with the operator functionalised and each kernel as in eager."""
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def train(
    place: Place,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
    what: str = "update",
    drop_in: bool = False,
) -> tuple[list[Tensor], list[Any]]:
    """Six steps of SGD written out; ``wrap`` compiles the update or the whole step."""
    model = network(place.device)
    parameters = list(model.parameters())
    options = {**QUICK, "backend": place.backend}
    if drop_in:  # its Amplifier is made outside
        (model(next(batches(place.device))) ** 2).mean().backward()
        amplifier = gradamp_fast.fused_amplify(model, **options)
        amplifier.reset()
        model.zero_grad()
    else:
        amplifier = Amplifier(model, **options)

    def update() -> None:
        if drop_in:
            gradamp_fast.fused_amplify(model, **options)
        else:
            amplifier.step()
        with torch.no_grad():
            torch._foreach_add_(parameters, [p.grad for p in parameters], alpha=-0.05)

    def backward(x: Tensor) -> None:
        (model(x) - x[:, :4].sin()).square().mean().backward()

    def whole(x: Tensor) -> None:
        backward(x)
        update()
        for p in parameters:
            p.grad = None

    step = wrap(whole if what == "whole" else update)
    for x in batches(place.device):
        if what == "whole":
            step(x)
        else:
            model.zero_grad()
            backward(x)
            step()
    return outcome(model, amplifier)


@pytest.mark.parametrize("drop_in", [False, True], ids=["amplifier", "drop-in"])
def test_an_update_in_one_graph(place: Place, drop_in: bool) -> None:
    assert_same(train(place, compiled, drop_in=drop_in), train(place, lambda f: f))


@pytest.mark.skipif(not TRACES_BACKWARD, reason="this torch does not trace backward()")
@pytest.mark.parametrize("drop_in", [False, True], ids=["amplifier", "drop-in"])
def test_a_whole_step_in_one_graph(place: Place, drop_in: bool) -> None:
    """Gradients that are no parameter's yet."""
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = train(place, compiled, "whole", drop_in)
    assert_same(found, train(place, lambda f: f))


@pytest.mark.slow
def test_inductor(place: Place) -> None:
    """Its own kernels round otherwise."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True)

    found, expected = train(place, wrap), train(place, lambda f: f)
    assert [row[-1] for row in found[1]] == [row[-1] for row in expected[1]]
    for mine, theirs in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["optimizer.step", "calls it", "closure"])
def test_attached(place: Place, how: str) -> None:
    """The hook runs before a compiled optimizer step as well, and after each closure."""

    def train(compile_it: bool) -> tuple[list[Tensor], list[Any]]:
        model = network(place.device)
        amplifier = place.amplifier(model, **QUICK)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        amplifier.attach(optimizer)
        step = (lambda: optimizer.step()) if how == "calls it" else optimizer.step
        if compile_it:
            step = torch.compile(step, backend="aot_eager")
        for x in batches(place.device):

            def closure(x: Tensor = x) -> Tensor:
                optimizer.zero_grad()
                loss = (model(x) - x[:, :4].sin()).square().mean()
                loss.backward()
                return loss

            if how == "closure":
                step(closure)
            else:
                closure()
                step()
        return outcome(model, amplifier)

    assert_same(train(True), train(False))


def test_attached_to_a_part_of_the_model() -> None:
    model = network()
    amplifier = CPU.amplifier(model, **QUICK)
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.05)
    amplifier.attach(optimizer)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for x in batches():
        model.zero_grad()
        model(x).square().mean().backward()
        step()
    assert [row.steps for row in amplifier.report().layers] == [0, 0, 6]


@pytest.mark.parametrize("overflow", [False, True])
def test_scale_and_found_inf_are_tensors_of_the_graph(place: Place, overflow: bool) -> None:
    gradients = []
    for wrap in (compiled, lambda f: f):
        model = network(place.device)
        amplifier = place.amplifier(model, **QUICK)
        scale = torch.full((1,), 8.0, device=place.device)
        found_inf = torch.zeros(1, device=place.device)
        step = wrap(lambda a=amplifier, s=scale, f=found_inf: a.step(grad_scale=s, found_inf=f))
        for x in batches(place.device):
            model.zero_grad()
            (8 * model(x).square().mean()).backward()
            step()
        assert found_inf.item() == 0
        if overflow:
            model[2].bias.grad[0] = torch.inf
        step()
        assert found_inf.item() == overflow
        assert amplifier.report().skipped_steps == overflow
        gradients.append([p.grad for p in model.parameters()])
    assert all(same_bits(a, b) for a, b in zip(*gradients, strict=True))


def test_a_parameter_without_gradient_and_one_that_freezes() -> None:
    model = network()
    amplifier = CPU.amplifier(model, **QUICK)
    step = compiled(amplifier.step)
    for index, x in enumerate(batches()):
        model.zero_grad()
        model[0].requires_grad_(index not in (2, 3))
        model(x).square().mean().backward()
        if index == 5:
            model[4].bias.grad = model[4].weight.grad = None
        step()
    assert [row.steps for row in amplifier.report().layers] == [4, 6, 5]


def test_a_layer_that_arrives_is_bound() -> None:
    model = network()
    amplifier = CPU.amplifier(model, **QUICK)
    step = compiled(amplifier.step)
    for index, x in enumerate(batches()):
        if index == 3:
            model.append(nn.Linear(4, 4))
            amplifier.rebind()
        model.zero_grad()
        model(x).square().mean().backward()
        step()
    assert [row.steps for row in amplifier.report().layers] == [6, 6, 6, 3]


def test_two_amplifiers_share_the_operator() -> None:
    amplifiers = []
    for seed in range(2):
        model = network()
        amplifier = CPU.amplifier(model, **QUICK)
        step = compiled(amplifier.step)
        for x in batches():
            model.zero_grad()
            (model(x) * (seed + 1)).square().mean().backward()
            step()
        amplifiers.append((model, amplifier))
    first, second = ([r.variance for r in a.report().layers] for _, a in amplifiers)
    assert [round(b / a) for a, b in zip(first, second, strict=True)] == [16, 16, 16]


def test_the_first_drop_in_call_is_made_outside_of_a_full_graph() -> None:
    model = network()
    model(next(batches())).square().mean().backward()

    def update() -> None:
        gradamp_fast.fused_amplify(model)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="fused_amplify"):
        compiled(update)()
    torch._dynamo.reset()
    step = torch.compile(update, backend="aot_eager")  # a graph that may break makes it
    for _ in range(3):
        step()
    assert gradamp_fast.fused_amplify(model).report().steps == 4


def test_gradients_of_several_processes_are_not_for_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    amplifier = Amplifier(network())
    monkeypatch.setattr(Plan, "sharded", True)
    with pytest.raises(RuntimeError, match="outside of the compiled function"):
        traced_step(amplifier.bound, Call())


def test_a_step_that_outlives_its_amplifier() -> None:
    state = [torch.zeros(1)] * 3
    with pytest.raises(RuntimeError, match="outlived its Amplifier"):
        torch.ops.gradamp_fast.step(-1, [], [], [], *state, None, None, True)


@pytest.mark.parametrize("scaled", [False, True])
def test_opcheck(place: Place, scaled: bool) -> None:
    """Schema, fake and functionalisation, as torch checks them."""
    model = network(place.device)
    amplifier = place.amplifier(model, **QUICK)
    for x in batches(place.device):
        model.zero_grad()
        model(x).square().mean().backward()
        amplifier.step()
    assert any(row.selected for row in amplifier.report().layers)
    state = amplifier.bound.settled_state()
    scalars = [torch.full((1,), v, device=place.device) for v in (4.0, 0.0)]
    gradients = [p.grad for p in model.parameters()][1:]
    arguments = (
        amplifier.bound.handle, [1, 2, 3, 4, 5], [0], gradients, state.values, state.sketch,
        state.parity, *(scalars if scaled else (None, None)), True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.gradamp_fast.step.default, arguments)
