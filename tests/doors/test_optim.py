"""The fused optimizers alone, in the place of torch's classes: against those, on a twin model."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from cases import COMPLEX, REALS, Place, same_bits, torchs_optimizer_cases
from torch import Tensor, nn
from torch.nn import Parameter

import gradamp_fast
from gradamp_fast import optim

pytestmark = pytest.mark.usefixtures("alone_too")
optim_db = torchs_optimizer_cases()

KINDS = [optim.SGD, optim.Adam, optim.AdamW]
MOMENTUM = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}
BOTH: list[tuple[Any, dict[str, Any]]] = [
    (optim.SGD, MOMENTUM),
    (optim.AdamW, {"lr": 0.1, "amsgrad": True}),
]
both = pytest.mark.parametrize(("kind", "options"), BOTH, ids=["SGD", "AdamW"])
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def theirs(kind: type[torch.optim.Optimizer]) -> Any:
    """torch's class of the same name."""
    return getattr(torch.optim, kind.__name__)


SHAPES = ((7, 5), (), (4099,), (3, 4, 3, 3), (0, 3))


def parameters(
    dtype: torch.dtype = torch.float64, device: str = "cpu", shapes: Sequence[Any] = SHAPES
) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype))
        for shape in shapes
    ]


def give(*lists: Sequence[Tensor], seed: int, leave_out: Iterable[int] = ()) -> None:
    """The same gradients to all; none to those left out."""
    for own in lists:
        generator = torch.Generator().manual_seed(seed)
        for index, p in enumerate(own):
            dtype = torch.complex128 if p.is_complex() else torch.float64
            drawn = torch.randn(p.shape, generator=generator, dtype=dtype).to(p.device, p.dtype)
            drawn = torch.empty_like(p).copy_(drawn)
            p.grad = None if index in leave_out else drawn.detach()


def close(ours: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """To the rounding of a few steps, in the parameters' own precision or fp32 at least."""
    for p, q in zip(ours, others, strict=True):
        unit = torch.finfo(p.dtype).eps
        torch.testing.assert_close(p, q, rtol=16 * unit, atol=16 * unit)


def close_state(ours: Any, others: Any, mine: Sequence[Any], other: Sequence[Any]) -> None:
    for p, q in zip(mine, other, strict=True):
        state, expected = ours.state.get(p, {}), others.state.get(q, {})
        assert state.keys() == {k for k, v in expected.items() if v is not None}
        for key, value in state.items():
            assert value.dtype == expected[key].dtype, key
            close([value], [expected[key].to(value.device)])


# ---- constructors -------------------------------------------------------------------


@each_kind
def test_constructors_are_torchs(kind: Any) -> None:
    left_out = {"foreach", "fused", "differentiable"}
    ours, others = (inspect.signature(k).parameters for k in (kind, theirs(kind)))
    expected = {n: (p.default, p.kind) for n, p in others.items() if n not in left_out}
    expected.pop("decoupled_weight_decay", None)
    found = {n: (p.default, p.kind) for n, p in ours.items()}
    found.pop("decoupled_weight_decay", None)
    assert found == expected
    assert list(found) == list(expected)
    assert issubclass(kind, theirs(kind))
    for name in left_out:
        with pytest.raises(TypeError, match=name):
            kind(parameters(), **{name: False})


@each_kind
def test_errors_of_construction_are_torchs(kind: Any) -> None:
    [info] = [i for i in optim_db if i.optim_cls is theirs(kind)]
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        if "foreach" in case.optimizer_error_input.kwargs:
            continue
        given = case.optimizer_error_input
        params = parameters() if given.params is None else given.params
        warns = issubclass(case.error_type, Warning)
        expected = (pytest.warns if warns else pytest.raises)(
            case.error_type, match=case.error_regex
        )
        with expected:
            kind(params, **given.kwargs)
        if given.params is None:
            assert all(p.grad is None for p in params)
    with pytest.raises(ValueError, match="empty parameter list"):
        kind([])
    optimizer = kind(parameters())
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        optimizer.add_param_group({"params": optimizer.param_groups[0]["params"]})


# ---- option sets --------------------------------------------------------------------


def option_sets(kind: Any) -> list[dict[str, Any]]:
    """What torch tests its class with; none asks for foreach, fused or differentiable."""
    [info] = [i for i in optim_db if i.optim_cls is theirs(kind)]
    found = [i.kwargs for on in ("cpu", "cuda", "mps") for i in info.optim_inputs_func(device=on)]
    assert not any({"foreach", "fused", "differentiable"} & set(given) for given in found)
    return found


CASES = [(kind, given) for kind in KINDS for given in option_sets(kind)]
CASES += [(optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True, "eps": 1e-3})]


def plain(given: dict[str, Any]) -> dict[str, Any]:
    """For torch on a CPU, which captures nothing there."""
    numbers = {n: v.item() if isinstance(v, Tensor) else v for n, v in given.items()}
    if "betas" in numbers:
        numbers["betas"] = tuple(float(b) for b in numbers["betas"])
    return {n: v for n, v in numbers.items() if n != "capturable"}


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
@pytest.mark.parametrize(("kind", "given"), CASES, ids=lambda x: getattr(x, "__name__", ""))
def test_option_sets(place: Place, kind: Any, given: dict[str, Any], attached: bool) -> None:
    mine, other = parameters(device=place.device), parameters(device=place.device)
    ours, others = kind(mine, **copy.deepcopy(given)), theirs(kind)(other, **plain(given))
    if attached:  # by a factor that never acts
        model = nn.ParameterList(mine)
        amplifier = place.amplifier(model, min_steps=1000)
        amplifier.attach(ours)
    for step in range(5):
        give(mine, other, seed=step, leave_out={1} if step == 2 else ())
        kept = [None if p.grad is None else p.grad.clone() for p in mine]
        ours.step()
        others.step()
        close(mine, other)
        close_state(ours, others, mine, other)
        for p, g in zip(mine, kept, strict=True):
            assert (p.grad is None) == (g is None)
            assert g is None or same_bits(p.grad, g)
    if attached:
        assert amplifier.report().steps == 5


@both
@pytest.mark.parametrize("dtype", [*REALS, *COMPLEX], ids=str)
def test_dtypes(place: Place, kind: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    """State has the parameter's dtype, and is rounded as torch's fused classes round it."""
    mine, other = parameters(dtype, place.device), parameters(dtype, place.device)
    ours = kind(mine, **options)
    # Before 2.14 torch's fused SGD on a CPU is wrong in 16 bits once there is momentum.
    broken = kind is optim.SGD and dtype.itemsize == 2 and torch.__version__ < "2.14"
    others = theirs(kind)(other, **options, fused=not (dtype.is_complex or broken))
    for step in range(3):
        give(mine, other, seed=step)
        ours.step()
        others.step()
        close(mine, other)
        close_state(ours, others, mine, other)


# ---- layouts ------------------------------------------------------------------------


def laid_out(tensor: Tensor, how: str) -> Tensor:
    if how == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if how == "every second":
        return torch.stack((tensor, tensor), -1).contiguous()[..., 0]
    if how == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor.contiguous()


LAYOUTS = ["contiguous", "channels_last", "every second", "transposed"]


@both
@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_parameter", LAYOUTS)
def test_layouts(
    place: Place, kind: Any, options: dict[str, Any], of_parameter: str, of_gradient: str
) -> None:
    """Elements meet their gradients wherever each lies, and stay where they are."""
    start = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(1)).to(place.device)
    p, q = Parameter(laid_out(start, of_parameter)), Parameter(start.clone())
    strides, address = p.stride(), p.data_ptr()
    ours, others = kind([p], **options), kind([q], **options)
    for step in range(3):
        give([p], [q], seed=step)
        p.grad = laid_out(p.grad, of_gradient)
        before = p._version
        ours.step()
        others.step()
        assert p._version > before
        assert same_bits(p, q)
        for key, value in ours.state[p].items():
            assert same_bits(value, others.state[q][key])
    assert (p.stride(), p.data_ptr()) == (strides, address)


# ---- state dicts --------------------------------------------------------------------


def stepped(kind: Any, options: dict[str, Any], steps: Iterable[int], **more: Any) -> Any:
    own = parameters()
    optimizer = kind(own, **options, **more)
    run(optimizer, steps)
    return optimizer


def run(optimizer: Any, steps: Iterable[int]) -> None:
    for step in steps:
        give(held(optimizer), seed=step)
        optimizer.step()


def held(optimizer: Any) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@both
@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("back", [False, True], ids=["from torch", "to torch"])
def test_checkpoints_go_both_ways(
    place: Place, kind: Any, options: dict[str, Any], how: dict[str, Any], back: bool
) -> None:
    """Three steps of one, three of the other, as six of torch's."""
    of = [lambda: stepped(kind, options, ()), lambda: stepped(theirs(kind), options, (), **how)]
    first, second = (make() for make in (of if back else reversed(of)))
    whole = of[1]()
    run(whole, range(6))
    run(first, range(3))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        for p, q in zip(held(second), held(first), strict=True):
            p.copy_(q)
    run(second, range(3, 6))
    close(held(second), held(whole))
    assert all(
        isinstance(second, theirs(kind)) and group.get("differentiable") is False
        for group in second.param_groups
    )


@both
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle", "one group more"])
def test_a_resumed_run_is_the_run(
    place: Place, kind: Any, options: dict[str, Any], how: str
) -> None:
    whole, first = (stepped(kind, options, range(3)) for _ in range(2))
    if how == "deepcopy":
        second = copy.deepcopy(first)
    elif how == "pickle":
        second = pickle.loads(pickle.dumps(first))
    else:
        second = stepped(kind, options, ())
        with torch.no_grad():
            for p, q in zip(held(second), held(first), strict=True):
                p.copy_(q)
        state = first.state_dict()
        if how == "one group more":  # and one that says what is amplified
            for group in state["param_groups"]:
                group["amplify"] = False
        second.load_state_dict(state)
    assert not any(p is q for p, q in zip(held(first), held(second), strict=True))
    for optimizer in (whole, second):
        if how == "one group more":
            optimizer.add_param_group({"params": parameters(shapes=[(3, 3)]), "lr": 0.01})
        run(optimizer, range(3, 6))
    for p, q in zip(held(whole), held(second), strict=True):
        assert same_bits(p, q)
        assert whole.state[p].keys() == second.state[q].keys()
        assert all(same_bits(v, second.state[q][k]) for k, v in whole.state[p].items())


# ---- parameters ---------------------------------------------------------------------


@both
def test_groups(place: Place, kind: Any, options: dict[str, Any]) -> None:
    """Hyper-parameters by group, changed on the way; parameters that come and go."""
    other_options = {"weight_decay": 0.5, "lr": 0.01, "maximize": True}
    if kind is optim.SGD:
        other_options |= {"momentum": 0.0, "dampening": 0.0}
    mine, other = parameters(), parameters()
    pair = []
    for k, own in ((kind, mine), (theirs(kind), other)):
        optimizer = k([{"params": own[:2]}, {"params": own[2:], **other_options}], **options)
        pair.append(optimizer)
    for step in range(9):
        for optimizer, own in zip(pair, (mine, other), strict=True):
            if step == 2:
                optimizer.param_groups[0]["lr"] *= 0.5
                optimizer.param_groups[1].update(
                    {"momentum": 0.5} if kind is optim.SGD else {"betas": (0.5, 0.6)}
                )
            if step == 4:
                own.append(Parameter(torch.ones(5, dtype=torch.float64)))
                optimizer.add_param_group({"params": own[-1:], "maximize": True})
            if step == 5:
                optimizer.state.clear()
            if step == 6:
                del optimizer.param_groups[1]["params"][1]
            if step == 7:
                optimizer.param_groups[0]["params"][0] = own[0] = Parameter(
                    torch.ones(2, 2, dtype=torch.float64)
                )
        give(mine, other, seed=step)
        for optimizer in pair:
            optimizer.step()
        close(mine, other)
        close_state(*pair, mine, other)


@both
def test_what_is_frozen_still_moves_by_its_gradient(
    place: Place, kind: Any, options: dict[str, Any]
) -> None:
    """As with torch's; with an amplifier too, which leaves it to the optimizer."""
    mine, other = parameters(), parameters()
    ours, others = kind(mine, **options), theirs(kind)(other, **options)
    model = nn.ParameterList(mine)
    amplifier = place.amplifier(model, min_steps=1000)
    for step in range(6):
        if step == 3:
            amplifier.attach(ours)
        for own in (mine, other):
            own[0].requires_grad_(step % 2 == 0)
        give(mine, other, seed=step)
        ours.step()
        others.step()
        close(mine, other)


@both
def test_parameters_that_are_moved(place: Place, kind: Any, options: dict[str, Any]) -> None:
    """The model is cast after its optimizer was made, and again when there is state; new .data."""
    mine, other = parameters(torch.float32), parameters(torch.float32)
    ours, others = kind(mine, **options), theirs(kind)(other, **options)
    for step in range(6):
        for optimizer, own in ((ours, mine), (others, other)):
            if step in (0, 3):
                for p in own:
                    p.data = p.data.double() if step == 0 else p.data.clone()
            if step == 4:
                own[2].data, own[2].grad = torch.ones(11, dtype=torch.float64), None
                optimizer.state.pop(own[2])
        give(mine, other, seed=step)
        ours.step()
        others.step()
        close(mine, other)


def test_tied_parameters_move_once(place: Place) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        made[1].weight = made[0].weight
        return made

    mine, other = model(), model()
    ours = optim.AdamW(mine.parameters(), 0.1)
    others = torch.optim.AdamW(other.parameters(), 0.1)
    place.amplifier(mine, min_steps=1000).attach(ours)
    for _ in range(3):
        for module, optimizer in ((mine, ours), (other, others)):
            optimizer.zero_grad()
            module(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
    for p, q in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# ---- how it is called ----------------------------------------------------------------


@each_kind
def test_closures_hooks_and_schedules(kind: Any) -> None:
    own = parameters()
    optimizer = kind(own, 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> float:
        assert torch.is_grad_enabled()
        seen.append("closure")
        give(own, seed=0)
        return 7.5

    with torch.no_grad():
        assert optimizer.step(closure) == 7.5
        assert optimizer.step(closure=closure) == 7.5
    schedule.step()
    assert optimizer.step() is None
    assert seen == ["before", "closure", "after"] * 2 + ["before", "after"]
    other = parameters()
    expected = theirs(kind)(other, 0.1)
    give(other, seed=0)
    for _ in range(2):
        expected.step()
    expected.param_groups[0]["lr"] = 0.05
    expected.step()
    close(own, other)


@each_kind
def test_a_subclass_steps_once(kind: Any) -> None:
    class Own(kind):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    own, other = parameters(), parameters()
    for each in (Own(own, 0.1), kind(other, 0.1)):
        give(held(each), seed=0)
        each.step()
    assert all(same_bits(p, q) for p, q in zip(own, other, strict=True))


def test_the_profiler_knows_the_step() -> None:
    with torch.profiler.profile() as profile:
        stepped(optim.AdamW, {}, range(1))
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}


def test_a_plain_import_is_enough() -> None:
    assert gradamp_fast.optim is optim


def test_nothing_to_do(place: Place) -> None:
    """No gradients, or no parameters: nothing happens, as with torch's."""
    own = parameters()
    optimizer = optim.AdamW(own, 0.1)
    before = [p.detach().clone() for p in own]
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert all(same_bits(p, q) for p, q in zip(own, before, strict=True))
    assert not optimizer.state
    optimizer.param_groups[0]["params"] = []
    optimizer.step()
    optimizer.add_param_group({"params": own})
    give(own, seed=0)
    optimizer.step()
    assert not same_bits(own[0], before[0])


# ---- errors --------------------------------------------------------------------------


@both
@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
@pytest.mark.parametrize("named", [False, True], ids=["", "named"])
def test_a_sparse_gradient_is_refused_by_name(
    place: Place, kind: Any, options: dict[str, Any], attached: bool, named: bool
) -> None:
    """Nothing is changed then, in whichever part of the optimizer it is."""
    own = parameters()
    model = nn.ParameterList(own[:2])
    given = [(f"w{i}", p) for i, p in enumerate(own)] if named else own
    optimizer = kind(given, **options)
    if attached:
        amplifier = place.amplifier(model, min_steps=1000)
        amplifier.attach(optimizer)
    for bad in (0, 3):
        give(own, seed=0)
        own[bad].grad = own[bad].grad.to_sparse()
        before = [p.detach().clone() for p in own]
        name = "w" if named else "group 0"
        with pytest.raises(TypeError, match="sparse") as error:
            optimizer.step()
        assert name in str(error.value) or f"'{bad}'" in str(error.value)
        assert all(same_bits(p, q) for p, q in zip(own, before, strict=True))
        assert not any(float(s.sum()) for state in optimizer.state.values() for s in state.values())


@both
@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
@pytest.mark.parametrize(
    ("spoil", "kind_of_error"),
    [(lambda data: data.float(), TypeError), (lambda data: data[None], ValueError)],
    ids=["dtype", "shape"],
)
def test_a_gradient_that_does_not_fit_is_refused_by_name(
    place: Place,
    kind: Any,
    options: dict[str, Any],
    attached: bool,
    spoil: Any,
    kind_of_error: type[Exception],
) -> None:
    """A parameter that was given other data after backward(), or before its state was loaded."""
    own = parameters(device=place.device, shapes=[(3, 4), (4, 3)])
    optimizer = kind(own, **options)
    model = nn.ParameterList(own)
    if attached:
        amplifier = place.amplifier(model, min_steps=1000)
        amplifier.attach(optimizer)
    for step in range(2):  # there is no state yet, and there is
        give(own, seed=step)
        kept = own[1].data
        own[1].data = spoil(kept)
        before = [p.detach().clone() for p in own]
        with pytest.raises(kind_of_error, match=r"the gradient of .*1.* (is|has shape)"):
            optimizer.step()
        assert all(same_bits(p, q) for p, q in zip(own, before, strict=True))
        own[1].data = kept
        optimizer.state.clear()
        give(own, seed=step)
        optimizer.step()
