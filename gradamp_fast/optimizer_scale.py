"""Asks an optimizer whether its steps follow the size of a layer's gradients.

A constant factor on a layer's gradients moves the layer further under SGD and changes nothing
under Adam. Which kind an optimizer is, no list of names can know: its class is tried with its
own options on a few tiny parameters, once with a gradient and once with twice that for one of
them. Where the class cannot be tried so, its name decides.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import random
import sys
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

# Under these names others keep the optimizer that moves the parameters.
WRAPPED = ("optimizer", "base_optimizer", "_base_optimizer", "_optimizer", "optim")

# Names, or parts of names, of optimizers that divide a layer's scale out.
_BY_NAME = (
    "adam", "adagrad", "adadelta", "rmsprop", "rprop", "lion", "lamb", "lars", "muon", "adafactor",
    "shampoo", "soap", "adan", "adabelief", "adopt", "prodigy", "sophia", "novograd", "signsgd",
    "laprop", "mars", "kron",
)  # fmt: skip

_STEPS = 10  # some begin like SGD and adapt later: RAdam after five steps
_MEASURED = 3  # of these, the last
_LOWEST = 1.2  # felt: at least a small power of the gradient's size
_SIDE = 4  # of a tiny parameter, in each dimension
_WEIGHT, _GRADIENT = 0.1, 10.0  # so large that no state's initial value counts for long
_RATE = 1e-3  # in the place of one that is 0, as at the start of a warm-up

# What the trial leaves at torch's default: the speed of a step and the place of its state.
_NOT_TRIED = ("foreach", "fused", "capturable", "differentiable")
_DECAY = ("weight_decay", "wd", "weight_decay_rate")
_TINY = 1e-6  # a decay that moves nothing, and switches on what a decay does (LARS)

_known: weakref.WeakKeyDictionary[type[Optimizer], dict[str, float | None]] = (
    weakref.WeakKeyDictionary()
)


def follows_gradient_size(optimizer: Optimizer) -> bool:
    """Whether a layer goes further when its gradients are larger.

    True for SGD; False for Adam and its kin, under which a constant factor does nothing. Looks
    into wrappers. Takes a few milliseconds for each class and set of options.
    """
    optimizer = inside(optimizer)
    stretch = stretch_of(optimizer)
    return stretch >= _LOWEST if stretch is not None else not _named_invariant(optimizer)


def inside(optimizer: Any, through: Collection[str] = WRAPPED) -> Any:
    """The optimizer that moves the parameters, behind wrappers.

    ``through``: attributes by which one is followed that is an optimizer itself.
    """
    return _innermost(optimizer, through, set()) or optimizer


def _innermost(wrapper: Any, through: Collection[str], seen: set[int]) -> Optimizer | None:
    seen.add(id(wrapper))
    for name in through if isinstance(wrapper, Optimizer) else WRAPPED:
        inner = getattr(wrapper, name, None)
        if inner is not None and id(inner) not in seen:
            found = _innermost(inner, through, seen)
            if found is not None:
                return found
    return wrapper if isinstance(wrapper, Optimizer) else None


def stretch_of(optimizer: Optimizer) -> float | None:
    """How many times further a layer goes for twice the gradient; the least of all groups.

    1: not at all, 2: in proportion. None where the optimizer's class cannot be tried.
    """
    kind = type(optimizer)
    try:
        groups = [_options(optimizer, group) for group in optimizer.param_groups]
        shapes = [_shape(group["params"]) for group in optimizer.param_groups]
        arguments = _arguments(optimizer)
        device = _device(optimizer)
        key = repr((arguments, groups, shapes, device))
        known = _known.setdefault(kind, {})
        if key not in known:
            known[key] = _try(kind, arguments, groups, shapes, device)
        return known[key]
    except Exception:  # whatever a class raises that wants other arguments or other tensors
        return None


def _try(
    kind: type[Optimizer],
    arguments: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
) -> float | None:
    distinct = {repr(pair): pair for pair in zip(groups, shapes, strict=True) if pair[1]}
    if not distinct:
        return None
    ours: list[Parameter] = []
    with _undisturbed(device, ours):
        ways = []
        for size in (1.0, 2.0):
            torch.manual_seed(0)
            pairs = [(options, _parameters(shape, device)) for options, shape in distinct.values()]
            ours += [p for _, own in pairs for p in own]
            trial = kind([{**options, "params": own} for options, own in pairs], **arguments)
            ways.append(_ways(trial, [own for _, own in pairs], size))
        ratios = [float(twice / once) for once, twice in zip(*ways, strict=True)]
    return min(ratios) if all(map(math.isfinite, ratios)) else None


def _ways(trial: Optimizer, groups: Sequence[Sequence[Parameter]], size: float) -> list[Tensor]:
    """How far the first parameter of each group goes when its gradients are ``size`` as large."""
    generator = torch.Generator().manual_seed(1)
    two = [
        (group, own, [_GRADIENT * _drawn(own, generator) for _ in range(2)])
        for group in groups
        for own in group
    ]
    for group, own, gradients in two:
        if own is group[0]:
            gradients[:] = [gradient * size for gradient in gradients]
    for number in range(_STEPS):
        if number == _STEPS - _MEASURED:
            before = [group[0].detach().clone() for group in groups]
        for _, own, gradients in two:
            own.grad = gradients[number % 2].clone()
        trial.step()
    return [(group[0].detach() - old).norm() for group, old in zip(groups, before, strict=True)]


# ---- what is tried ------------------------------------------------------------------


def _arguments(optimizer: Optimizer) -> dict[str, Any]:
    """Arguments of the class, as this one was given them."""
    given: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(type(optimizer)).parameters.items())[1:]:
        if name in optimizer.defaults:
            given[name] = _tried(name, optimizer.defaults[name])
        elif parameter.default is inspect.Parameter.empty and hasattr(optimizer, name):
            given[name] = getattr(optimizer, name)
    return {name: value for name, value in given.items() if name not in _NOT_TRIED}


def _options(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a group; its learning rate is the one that the optimizer was made with."""
    options = {n: _tried(n, v) for n, v in group.items() if n not in ("params", *_NOT_TRIED)}
    if "lr" in options:
        options["lr"] = _tried("lr", optimizer.defaults.get("lr", options["lr"]))
    return options


def _tried(name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if name == "lr":
        return _RATE if value == 0 else value
    return min(value, _TINY) if name in _DECAY and isinstance(value, (int, float)) else value


def _shape(parameters: Sequence[Tensor]) -> tuple[int, ...]:
    """That of the group's largest parameter, made tiny."""
    if not parameters:
        return ()
    largest = max(parameters, key=Tensor.numel)
    return tuple(min(size, _SIDE) for size in largest.shape) or (1,)


def _device(optimizer: Optimizer) -> torch.device:
    """Where the class is tried: some from elsewhere run on their own device only."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    first = next(parameters, None)
    elsewhere = not type(optimizer).__module__.startswith("torch.")
    if first is not None and elsewhere and first.device.type == "cuda":
        return torch.device(first.device)
    return torch.device("cpu")


def _parameters(shape: Sequence[int], device: torch.device) -> list[Parameter]:
    """Two alike, for an optimizer that goes by all gradients together."""
    generator = torch.Generator().manual_seed(2)
    return [
        Parameter(_WEIGHT * torch.randn(tuple(shape), generator=generator).to(device))
        for _ in range(2)
    ]


def _drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)


def _named_invariant(optimizer: Optimizer) -> bool:
    names = [ancestor.__name__.lower() for ancestor in type(optimizer).__mro__]
    return any(known in name for name in names for known in _BY_NAME)


# ---- so that nobody notices ------------------------------------------------------------


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Compiled steps run as they are written: to compile them would take seconds."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    eager: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


@contextlib.contextmanager
def _undisturbed(device: torch.device, ours: Sequence[Parameter]) -> Iterator[None]:
    """Random states, hooks, warnings, modes and defaults are afterwards what they were.

    A class that steps an optimizer of others than ``ours`` is stopped before it does.
    """

    def stop(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        known = {id(p) for p in ours}
        if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError("the trial of an optimizer would step another one")

    numpy = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    hooks: tuple[dict[int, Any], ...] = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    kept = [dict(each) for each in hooks]
    on_gpu = [device] if device.type == "cuda" else []
    try:
        for each in hooks:
            each.clear()
        hooks[0][-1] = stop
        with (
            torch.random.fork_rng(on_gpu),
            contextlib.nullcontext() if torch.get_default_device() == device else device,
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            _uncompiled(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, items in zip(hooks, kept, strict=True):
            each.clear()
            each.update(items)
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])
