"""Walks a model: its parameters, their names without wrappers, their layers."""

from __future__ import annotations

import fnmatch
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from torch import nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from ..options import Names, Options
from .plan import Member, Plan, make_plan

_FSDP_CHILD = "_fsdp_wrapped_module"
# Classes that wrap a model, by package and name: the child that holds it.
WRAPPERS = {
    ("torch", "DataParallel"): "module",
    ("torch", "DistributedDataParallel"): "module",
    ("torch", "FullyShardedDataParallel"): _FSDP_CHILD,
    ("torch", "OptimizedModule"): "_orig_mod",
    ("torch", "CheckpointWrapper"): "_checkpoint_wrapped_module",
    ("torch", "OffloadWrapper"): "_checkpoint_wrapped_module",
    ("lightning", "_FabricModule"): "_forward_module",
    ("lightning_fabric", "_FabricModule"): "_forward_module",
    ("opacus", "GradSampleModule"): "_module",
    ("deepspeed", "DeepSpeedEngine"): "module",
}


def _wrapped_child(kind: type[nn.Module]) -> str | None:
    """Name of the child that a class wraps; None if it is no wrapper."""
    keys = ((base.__module__.partition(".")[0], base.__name__) for base in kind.__mro__)
    return next((WRAPPERS[key] for key in keys if key in WRAPPERS), None)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers, which are known by their class.

    The first FSDP's stays: whether it shards, the wrapper alone knows.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not a {type(model).__name__}")
    while (name := _wrapped_child(type(model))) and name != _FSDP_CHILD:
        child = model._modules.get(name)
        if child is None:
            break
        model = child
    return model


Modules = Sequence[tuple[str, nn.Module]]


def named_parameters(
    model: nn.Module, modules: Modules | None = None
) -> Iterator[tuple[str, Parameter]]:
    """Every parameter once, under the first name that reaches it, in module order.

    Names come without what wrappers inserted. ``modules``: the model's, where they are at hand.
    """
    seen: set[int] = set()
    for prefix, module in find_modules(model) if modules is None else modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield prefix + name, parameter


def find_modules(model: nn.Module) -> Modules:
    """As ``named_modules()``, in half the time; with what the names of parameters begin with."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    wrapped: dict[type[nn.Module], str | None] = {}
    left = [("", model)]
    while left:
        prefix, module = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((prefix, module))
        if not module._modules:
            continue
        kind = type(module)
        if kind not in wrapped:
            wrapped[kind] = _wrapped_child(kind)
        inserted = wrapped[kind]
        left += [
            (prefix if name == inserted else f"{prefix}{name}.", child)
            for name, child in reversed(module._modules.items())
            if child is not None
        ]
    return found


class Skeleton:
    """The modules and parameters that a model consists of, without keeping any of them alive.

    It is compared far faster than a model is walked. Parameters have to be kept alive by others.
    """

    def __init__(self, modules: Modules) -> None:
        self._modules = [weakref.ref(module) for _, module in modules]
        self._parts = self._look()

    @property
    def parts(self) -> int:
        """How many modules, children and parameters there are."""
        return len(self._modules) + len(self._parts or ())

    def stands(self) -> bool:
        """Whether every module still has the same children and parameters."""
        return self._look() == self._parts

    def _look(self) -> list[int] | None:
        """Ids, which name the same objects again for as long as these live."""
        parts: list[int] = []
        for reference in self._modules:
            module = reference()
            if module is None:
                return None
            parts += map(id, module._modules.values())
            parts += map(id, module._parameters.values())
        return parts


def find_layers(
    model: nn.Module,
    options: Options,
    excluded: Collection[int] = (),
    bound: Collection[int] = (),
    shares: Mapping[int, int] = {},
    check_names: bool = True,
    modules: Modules | None = None,
) -> Plan:
    """The plan of a model (not a wrapper).

    ``excluded`` and ``bound`` hold ids of parameters: those that are not to be amplified, and
    those that keep their place while they are frozen. ``shares``: ids to numbers of the optimizers
    that share the model out. ``check_names``: a glob has to match. ``modules``: the model's, where
    they are at hand.

    Raises ValueError if nothing is trainable, everything is excluded, a glob matches no
    parameter, or a lazy module has not made its parameters yet; TypeError for parameters sharded
    by the first FSDP, and for gradients that are kept in ``main_grad``.
    """
    _prepare_fsdp(model)
    included = _matcher("include", options.include, model, check_names)
    left_out = _matcher("exclude", options.exclude, model, check_names)
    kernels_alone = options.exclude_bias_and_norm
    layer_of = _grouping(options)
    members: list[Member] = []
    watched: list[Parameter] = []
    for name, parameter in named_parameters(model, modules):
        if is_lazy(parameter):
            raise ValueError(f"{name!r} has no shape yet: run the model forward once before")
        if not parameter.requires_grad and id(parameter) not in bound:
            watched.append(parameter)
            continue
        if getattr(parameter, "main_grad", None) is not None:
            raise TypeError(
                f"parameter {name!r} keeps its gradient in main_grad, as Megatron and Transformer "
                "Engine do, and what is in .grad means nothing: switch gradient accumulation "
                "fusion off, or freeze the parameter for the Amplifier"
            )
        unwanted = (
            id(parameter) in excluded
            or (left_out is not None and left_out(name))
            or (included is not None and not included(name))
            or (kernels_alone and parameter.ndim <= 1)
        )
        members.append((name, parameter, None if unwanted else layer_of(name)))
    if not members:
        raise ValueError("the model has no trainable parameter: nothing could be amplified")
    plan = make_plan(_shared_out(members, shares), watched)
    if plan.measured == 0:
        raise ValueError(
            "no trainable parameter is left to amplify: include, exclude, exclude_bias_and_norm, "
            'group_by or param_group["amplify"] rule out all of them'
        )
    return plan


def _shared_out(members: Sequence[Member], shares: Mapping[int, int]) -> Sequence[Member]:
    """Each optimizer's share of a layer under a name of its own: ``name``, ``name#2``, ...

    What no optimizer holds goes with the first.
    """
    if not shares:
        return members
    holders: dict[str, set[int]] = {}
    for _, parameter, layer in members:
        if layer is not None and id(parameter) in shares:
            holders.setdefault(layer, set()).add(shares[id(parameter)])
    rank = {
        (layer, number): place
        for layer, numbers in holders.items()
        for place, number in enumerate(sorted(numbers))
    }
    out = []
    for name, parameter, layer in members:
        place = rank.get((layer, shares.get(id(parameter), -1)), 0) if layer is not None else 0
        out.append((name, parameter, f"{layer}#{place + 1}" if place else layer))
    return out


def _prepare_fsdp(model: nn.Module) -> None:
    """Modules of ``fully_shard`` hold their DTensors from here on, not whole parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # then there is no such module
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
        elif isinstance(module, fsdp.FullyShardedDataParallel):
            whole = module.sharding_strategy == fsdp.ShardingStrategy.NO_SHARD
            for name, parameter in named_parameters(module):
                if isinstance(parameter, fsdp.FlatParameter) or not whole:
                    raise TypeError(
                        f"parameter {name!r} is sharded by FullyShardedDataParallel, whose flat "
                        "pieces do not tell which layer an element is of: use "
                        "torch.distributed.fsdp.fully_shard (FSDP2) instead"
                    )


def _grouping(options: Options) -> Callable[[str], str | None]:
    """The layer of a parameter, by its name."""
    if options.group_by == "module":
        return lambda name: name.rpartition(".")[0]
    return str if options.group_by == "tensor" else options.group_by


def _matcher(
    option: str, names: Names | None, model: nn.Module, check_names: bool
) -> Callable[[str], bool] | None:
    """A predicate over parameter names; None if the option is left out."""
    if names is None or callable(names):
        return names
    globs = list(names)
    known = [name for name, _ in named_parameters(model)]
    for glob in globs if check_names else ():
        if not fnmatch.filter(known, glob):
            raise ValueError(
                f"{option}={glob!r} matches no parameter; names look like {_examples(known)}"
            )
    return lambda name: any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _examples(known: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in list(known)[:3]) or "nothing: there are none"
