"""placement="backward": what flows out of selected layers, against chains worked out by hand."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Place, same_bits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gradamp_fast import Amplifier, Schedule
from gradamp_fast.backends.backward import BackwardSteps
from gradamp_fast.backends.torch import TorchBackend

# Everything is selected at the first measured step; every other step is amplified, by 3.
ALL: dict[str, Any] = {
    "placement": "backward", "measure": "variance", "threshold": 1e9, "min_steps": 1, "refresh": 1,
    "factor": 3.0, "measure_every": 2, "max_amplification": 1e9,
}  # fmt: skip


class Scale(nn.Module):
    """x * w: d loss / d x = w * d loss / d output."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([value, 2 * value]))

    def forward(self, x: Tensor, *, other: Tensor | None = None) -> Tensor:
        return x * self.w if other is None else x * self.w + other


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def started(model: nn.Module, loss: Callable[[], Tensor], **options: Any) -> Amplifier:
    """One plain step taken: what comes is amplified."""
    amplifier = Amplifier(model, **{**ALL, **options})
    gradients(model, loss)
    amplifier.step()
    return amplifier


def only(amplifier: Amplifier, *names: str) -> None:
    """As if the last decision had chosen these layers."""
    column = amplifier.bound.settled_state().column("selected")
    column.copy_(torch.tensor([float(name in names) for name in amplifier.bound.plan.layers]))
    amplifier.bound.written()


def ratios(
    model: nn.Module, loss: Callable[[], Tensor], *selected: str, **options: Any
) -> dict[str, float]:
    """By what each parameter's gradient is multiplied, the same for all its elements."""
    plain = gradients(model, loss)
    amplifier = started(model, loss, **options)
    only(amplifier, *selected)
    out = {}
    for name, gradient in gradients(model, loss).items():
        ratio = gradient / plain[name]
        torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio))
        out[name] = round(float(ratio.flatten()[0]), 5)
    return out


X = torch.tensor([[1.0, 2.0], [0.5, -3.0]])


def chain() -> nn.Sequential:
    return nn.Sequential(Scale(2.0), nn.Identity(), Scale(-1.5), nn.Identity(), Scale(0.5))


# ---- paths --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selected", "expected"),
    [
        ((), (1, 1, 1)),
        (("0",), (1, 1, 1)),  # nothing before it
        (("2",), (3, 1, 1)),
        (("4",), (3, 3, 1)),
        (("2", "4"), (9, 3, 1)),
        (("0", "2", "4"), (9, 3, 1)),
    ],
    ids=str,
)
def test_factors_compound_along_a_chain(selected: tuple, expected: tuple) -> None:
    """The layer's own gradient is not multiplied, that of layers before it is."""
    model = chain()
    found = ratios(model, lambda: model(X).square().sum(), *selected)
    assert tuple(found.values()) == expected


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = Scale(2.0), Scale(-1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y + self.body(y)


def test_only_the_branch_of_a_residual_block() -> None:
    """d/dy of y + body(y) is 1 + w; amplified 1 + 3 w."""
    model = Residual()
    plain = gradients(model, lambda: model(X).sum())
    amplifier = started(model, lambda: model(X).sum())
    only(amplifier, "body")
    found = gradients(model, lambda: model(X).sum())
    w = model.body.w.detach()
    torch.testing.assert_close(found["first.w"], plain["first.w"] * (1 + 3 * w) / (1 + w))
    assert torch.equal(found["body.w"], plain["body.w"])


def test_a_module_used_twice_counts_twice() -> None:
    first, again = Scale(2.0), Scale(0.5)
    model = nn.ModuleList([first, again])
    found = ratios(model, lambda: again(again(first(X))).sum(), "1")
    assert found["0.w"] == 9


def test_a_tied_parameter_belongs_to_its_first_module() -> None:
    model = chain()
    model[4].w = model[2].w
    plain = gradients(model, lambda: model(X).sum())
    amplifier = started(model, lambda: model(X).sum())
    assert amplifier.bound.plan.layers == ("0", "2")
    only(amplifier, "2")
    found = gradients(model, lambda: model(X).sum())
    torch.testing.assert_close(found["0.w"], 3 * plain["0.w"])
    torch.testing.assert_close(found["2.w"], plain["2.w"])


def test_frozen_early_layers_and_a_nested_module() -> None:
    class Outer(Scale):
        def __init__(self) -> None:
            super().__init__(1.5)
            self.inner = Scale(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * self.w)

    model = nn.Sequential(Scale(1.0).requires_grad_(False), Scale(2.0), Outer())
    found = ratios(model, lambda: model(X).sum(), "1", "2", "2.inner")
    assert found == {"1.w": 9, "2.w": 3, "2.inner.w": 1}


def test_several_inputs_tuples_and_keywords() -> None:
    class Pair(Scale):
        def forward(self, pair: tuple[Tensor, Tensor], x: Tensor, *, other: Tensor) -> Tensor:
            return (pair[0] + pair[1] + x + other) * self.w

    model = nn.ModuleList([*(Scale(value) for value in (1.0, 2.0, 3.0, 4.0)), Pair(0.5)])

    def loss() -> Tensor:
        a, b, c, d = (model[i](X) for i in range(4))
        return model[4]((a, b), c, other=d).sum()

    found = ratios(model, loss, "4")
    assert list(found.values()) == [3, 3, 3, 3, 1]


def test_a_module_that_overwrites_its_input_passes_on_what_it_got() -> None:
    class InPlace(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(self.w)

    first, second = Scale(2.0), InPlace(0.5)
    model = nn.ModuleList([first, second])
    found = ratios(model, lambda: second(first(X) + 1.0).sum(), "1")
    assert found["0.w"] == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant: bool) -> None:
    model = chain()

    def loss() -> Tensor:
        y = model[0](X)
        return checkpoint(lambda x: model[4](model[2](x)), y, use_reentrant=reentrant).sum()

    assert tuple(ratios(model, loss, "2", "4").values()) == (9, 3, 1)


def test_gradients_of_gradients() -> None:
    """A penalty on the gradient at the input: multiplied once in the loss, once flowing back."""
    model = nn.Sequential(Scale(0.5))
    amplifier = started(model, lambda: model(X).sum())
    x = X.clone().requires_grad_()
    [gradient] = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    torch.testing.assert_close(gradient, 3 * model[0].w.expand_as(X))
    [second] = torch.autograd.grad(gradient.sum(), model[0].w)
    torch.testing.assert_close(second, torch.full((2,), 6.0))
    assert amplifier.report().layers[0].selected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_factor_is_not_rounded_to_the_gradients_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(Scale(0.5), Scale(0.5)).to(dtype)
    x = torch.linspace(0.3, 2.0, 100, dtype=dtype).view(50, 2).requires_grad_()
    amplifier = started(model, lambda: model(x).sum(), factor=1.1)
    only(amplifier, "1")
    seen = []
    model[0].register_full_backward_hook(lambda module, into, out: seen.append(out[0]))
    model(x).sum().backward()
    flow = torch.ones(50, 2, dtype=dtype) * model[1].w.detach()
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (flow.to(precise) * torch.tensor(1.1, dtype=precise)).to(dtype)
    assert same_bits(seen[-1], expected)


def test_bf16_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 1))

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(X).float().sum()

    plain = gradients(model, loss)
    amplifier = started(model, loss, factor=4.0)
    only(amplifier, "1")
    found = gradients(model, loss)
    for name in plain:
        assert torch.equal(found[name], plain[name] * (4 if name[0] == "0" else 1)), name


# ---- which steps, and by how much ---------------------------------------------------


def first_ratios(amplifier: Amplifier, model: nn.Module, steps: int) -> list[float]:
    """By what the first layer's gradient is multiplied before each of the steps."""
    out = []
    for _ in range(steps):
        gradient = gradients(model, lambda: model(X).sum())["0.w"]
        out.append(round(float(gradient[0] / (X[:, 0].sum() * -0.75)), 4))
        amplifier.step()
    return out


def test_every_nth_step_is_plain_and_alone_is_counted(place: Place) -> None:
    if place.device != "cpu":
        pytest.skip("the inputs are on the CPU")
    model = chain()
    amplifier = place.amplifier(model, **{**ALL, "measure_every": 3, "refresh": 2})
    assert first_ratios(amplifier, model, 9) == [1, 1, 1, 1, 9, 9, 1, 9, 9]
    report = amplifier.report()
    assert (report.steps, report.skipped_steps) == (9, 0)
    assert [layer.steps for layer in report.layers] == [3, 3, 3]
    assert [layer.amplified_steps for layer in report.layers] == [4, 4, 4]
    assert report.layers[0].changed_at == 3


def test_the_cap_bounds_the_product() -> None:
    for selected, expected in ((("2",), 3.0), (("2", "4"), 4.0), (("0", "2", "4"), 4 ** (2 / 3))):
        model = chain()
        found = ratios(model, lambda m=model: m(X).sum(), *selected, max_amplification=4.0)
        assert found["0.w"] == pytest.approx(expected, abs=1e-4)
    model = chain()
    found = ratios(model, lambda: model(X).sum(), "2", "4", factor=0.1, max_amplification=4.0)
    assert found["0.w"] == pytest.approx(0.25, abs=1e-4)


def test_the_schedule_counts_all_steps() -> None:
    model = chain()
    schedule = Schedule([(2, 4), (5, 7, 2.0)], unit="step")
    amplifier = Amplifier(model, **{**ALL, "schedule": schedule})
    assert first_ratios(amplifier, model, 10) == [1, 1, 1, 9, 1, 4, 1, 1, 1, 1]


def test_epochs_and_assigned_factors_are_followed_at_once() -> None:
    model = chain()
    amplifier = Amplifier(model, **{**ALL, "schedule": Schedule([(1, 2)])})
    amplifier.set_epoch(0)
    assert first_ratios(amplifier, model, 2) == [1, 1]
    amplifier.set_epoch(1)
    assert first_ratios(amplifier, model, 2) == [1, 9]
    amplifier.step()
    amplifier.factor = 2.0
    assert first_ratios(amplifier, model, 1) == [4]
    amplifier.reset()
    amplifier.set_epoch(1)
    assert first_ratios(amplifier, model, 2) == [1, 9]


def test_skipped_steps(place: Place) -> None:
    """An amplified step with a NaN changes counters alone; a plain one loses its measurement."""
    if place.device != "cpu":
        pytest.skip("the inputs are on the CPU")
    model = chain()
    amplifier = place.amplifier(model, **ALL)
    for step in range(6):
        gradients(model, lambda: model(X).sum())
        if step in (2, 3):
            model[0].w.grad[0] = torch.nan
        amplifier.step()
    report = amplifier.report()
    assert (report.steps, report.skipped_steps) == (6, 2)
    assert [layer.steps for layer in report.layers] == [2, 2, 2]
    assert [layer.amplified_steps for layer in report.layers] == [2, 2, 2]


def test_unscaling_and_clipping_are_done_in_every_step(place: Place) -> None:
    if place.device != "cpu":
        pytest.skip("the inputs are on the CPU")
    model = chain()
    amplifier = place.amplifier(model, **ALL, max_norm=1.0)
    scale, found_inf = torch.tensor([8.0]), torch.zeros(1)
    for _ in range(4):
        given = gradients(model, lambda: 8 * model(X).sum())
        amplifier.step(grad_scale=scale, found_inf=found_inf)
        norm = torch.cat(list(given.values())).double().norm() / 8
        assert amplifier.total_norm == pytest.approx(float(norm), rel=1e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, (given[name] / 8 / norm).float())
    gradients(model, lambda: model(X).sum())
    amplifier.step()
    gradients(model, lambda: model(X).sum())
    model[0].w.grad[0] = torch.inf
    amplifier.step(found_inf=found_inf)
    assert found_inf == 1


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), Residual2(8), nn.Linear(8, 1)
    )


class Residual2(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


TRAINED = {
    "placement": "backward", "measure_every": 3, "min_steps": 2, "refresh": 2, "decay": 0.9,
}  # fmt: skip


def trained(
    model: nn.Module, amplifier: Amplifier, steps: range, watch: Callable[[], None] = lambda: None
) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 2, generator=generator)
        gradients(model, lambda x=x: (model(x) - x[:, :1]).square().mean())
        watch()
        amplifier.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.05 * parameter.grad)


def test_scores_are_those_of_plain_gradients_of_the_same_weights() -> None:
    """Of a residual network in training: bit for bit, at each step that is measured."""
    model = network()
    amplifier = Amplifier(model, **TRAINED)
    twin = network()
    plain = Amplifier(
        twin, min_steps=2, refresh=2, decay=0.9, schedule=Schedule([(10**6, 10**7)], unit="step")
    )
    steps = 0

    def measure() -> None:
        nonlocal steps
        if steps % 3 == 0:
            generator = torch.Generator().manual_seed(steps)
            x = torch.randn(16, 2, generator=generator)
            copied = copy.deepcopy(before)
            for ours, theirs in zip(twin.parameters(), copied.parameters(), strict=True):
                ours.data.copy_(theirs.data)
            twin.load_state_dict(copied.state_dict())
            gradients(twin, lambda: (twin(x) - x[:, :1]).square().mean())
            plain.step()
        steps += 1

    for step in range(18):
        before = copy.deepcopy(model)
        trained(model, amplifier, range(step, step + 1), measure)
    ours, theirs = amplifier.report(), plain.report()
    assert [x.score for x in ours.layers] == [x.score for x in theirs.layers]
    assert [x.selected for x in ours.layers] == [x.selected for x in theirs.layers]
    assert any(x.selected for x in ours.layers)
    assert any(x.amplified_steps for x in ours.layers)


def test_a_resumed_run_continues_bit_for_bit() -> None:
    for stop in (7, 9, 11):
        whole = network()
        trained(whole, Amplifier(whole, **TRAINED), range(18))
        model = network()
        amplifier = Amplifier(model, **TRAINED)
        trained(model, amplifier, range(stop))
        stored = amplifier.state_dict()
        del amplifier
        again = network(1)
        again.load_state_dict(model.state_dict())
        resumed = Amplifier(again, **TRAINED)
        resumed.load_state_dict(stored)
        trained(again, resumed, range(stop, 18))
        assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))


class NoCopyToHost(TorchDispatchMode):
    """Raises where a device would have to be waited for."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        assert func._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero"), func
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device() -> None:
    model = chain()
    amplifier = started(model, lambda: model(X).sum())
    address = amplifier.bound._backend.multipliers[torch.float32].data_ptr()
    with NoCopyToHost():
        for epoch in range(2):
            amplifier.set_epoch(epoch)
            amplifier.factor = 2.0
            for _ in range(3):
                gradients(model, lambda: model(X).sum())
                amplifier.step()
    assert amplifier.bound._backend.multipliers[torch.float32].data_ptr() == address


# ---- hooks --------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_go_with_the_amplifier() -> None:
    model = chain()
    amplifier = started(model, lambda: model(X).sum())
    assert hooks(model) == 3
    del amplifier
    gc.collect()
    assert hooks(model) == 0


def test_the_model_is_not_kept_alive() -> None:
    model = chain()
    amplifier = Amplifier(model, **ALL)
    amplifier.prepare()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert amplifier.report().steps == 0


def test_models_pickled_when_hooks_had_another_home_still_load() -> None:
    model = chain()
    amplifier = started(model, lambda: model(X).sum())
    text = pickle.dumps(model, protocol=0)
    del amplifier
    here, before = b"cgradamp_fast.backends.backward\n_Hook", b"cgradamp_fast.placement\n_Hook"
    assert here in text
    again = pickle.loads(text.replace(here, before))
    assert again(X).equal(model(X))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_copies_of_the_model_are_plain(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = chain()
    plain = gradients(model, lambda: model(X).sum())
    amplifier = started(model, lambda: model(X).sum())
    twin = copied(model)
    assert gradients(model, lambda: model(X).sum())["0.w"].equal(9 * plain["0.w"])
    assert gradients(twin, lambda: twin(X).sum())["0.w"].equal(plain["0.w"])
    second = started(twin, lambda: twin(X).sum(), factor=2.0)
    assert gradients(twin, lambda: twin(X).sum())["0.w"].equal(4 * plain["0.w"])
    assert amplifier.report().steps == second.report().steps == 1


def test_the_whole_model_can_be_saved() -> None:
    model = chain()
    amplifier = started(model, lambda: model(X).sum())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(X), model(X))
    assert amplifier.report().steps == 1


def test_without_gradients_nothing_is_touched() -> None:
    model = chain()
    amplifier = started(model, lambda: model(X).sum())
    with torch.no_grad():
        assert model(X).equal(X * -1.5 * torch.tensor([1.0, 8.0]))
    assert model.eval()(X).grad_fn is not None
    assert amplifier.report().steps == 1


def test_replaced_and_moved_modules_are_followed() -> None:
    model = chain()
    amplifier = started(model, lambda: model(X).sum())
    model[2] = Scale(-1.5)
    amplifier.set_epoch(0)
    assert hooks(model) == 3
    assert gradients(model, lambda: model(X).sum())["0.w"].equal(
        9 * X.sum(0) * torch.tensor([-0.75, -3.0])
    )


def test_optimizers_that_hold_a_part_are_refused() -> None:
    model = chain()
    amplifier = Amplifier(model, **ALL)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    amplifier.attach(optimizer)
    gradients(model, lambda: model(X).sum())
    with pytest.raises(ValueError, match="one optimizer"):
        optimizer.step()


def test_sharded_gradients_are_refused() -> None:
    amplifier = Amplifier(chain(), **ALL)
    sharded: Any = SimpleNamespace(sharded=True)
    with pytest.raises(ValueError, match="sharded"):
        BackwardSteps(
            TorchBackend, sharded, amplifier.bound.settled_state(), amplifier.bound.rules, None
        )


def test_an_attached_optimizer() -> None:
    model = chain()
    plain = gradients(model, lambda: model(X).sum())
    amplifier = Amplifier(model, **ALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    amplifier.attach(optimizer)
    gradients(model, lambda: model(X).sum())
    optimizer.step()
    assert gradients(model, lambda: model(X).sum())["0.w"].equal(9 * plain["0.w"])
    optimizer.step()
    assert gradients(model, lambda: model(X).sum())["0.w"].equal(plain["0.w"])


def test_a_compiled_model() -> None:
    model = chain()
    plain = gradients(model, lambda: model(X).sum())
    amplifier = started(model, lambda: model(X).sum())
    compiled = torch.compile(model, backend="aot_eager")
    assert gradients(model, lambda: compiled(X).sum())["0.w"].equal(9 * plain["0.w"])
    amplifier.step()
    assert gradients(model, lambda: compiled(X).sum())["0.w"].equal(plain["0.w"])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()
