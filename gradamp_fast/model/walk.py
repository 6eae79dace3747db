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


def named_parameters(model: nn.Module) -> Iterator[tuple[str, Parameter]]:
    """Every parameter once, under the first name that reaches it, in module order.

    Names come without what wrappers inserted.
    """
    seen: set[int] = set()
    clean: dict[str, str] = {}  # of each module's path
    inserted: set[str] = set()
    wrapped: dict[type[nn.Module], str | None] = {}
    for path, module in model.named_modules():
        parent, _, own = path.rpartition(".")
        prefix = clean.get(parent, "")
        clean[path] = prefix if path in inserted else f"{prefix}.{own}" if prefix else own
        kind = type(module)
        if kind not in wrapped:
            wrapped[kind] = _wrapped_child(kind)
        if child := wrapped[kind]:
            inserted.add(f"{path}.{child}" if path else child)
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield f"{clean[path]}.{name}" if clean[path] else name, parameter


class Skeleton:
    """The modules and parameters that a model consists of, without keeping any of them alive.

    It is compared far faster than a model is walked. Parameters have to be kept alive by others.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [weakref.ref(module) for module in model.modules()]
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
) -> Plan:
    """The plan of a model (not a wrapper).

    ``excluded`` and ``bound`` hold ids of parameters: those that are not to be amplified, and
    those that keep their place while they are frozen. ``shares``: ids to numbers of the optimizers
    that share the model out. ``check_names``: a glob has to match.

    Raises ValueError if nothing is trainable, everything is excluded, a glob matches no
    parameter, or a lazy module has not made its parameters yet; TypeError for parameters sharded
    by the first FSDP, and for gradients that are kept in ``main_grad``.
    """
    _prepare_fsdp(model)
    included = _matcher("include", options.include, model, True, check_names)
    left_out = _matcher("exclude", options.exclude, model, False, check_names)
    members: list[Member] = []
    watched: list[Parameter] = []
    for name, parameter in named_parameters(model):
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
        layer: str | None = None
        unwanted = id(parameter) in excluded or left_out(name) or not included(name)
        if not unwanted and not (options.exclude_bias_and_norm and parameter.ndim <= 1):
            layer = _layer_of(name, options)
        members.append((name, parameter, layer))
    if not members:
        raise ValueError("the model has no trainable parameter: nothing could be amplified")
    plan = make_plan(_shared_out(members, shares), watched)
    if plan.measured == 0:
        raise ValueError(
            "no trainable parameter is left to amplify: include, exclude, exclude_bias_and_norm, "
            'group_by or param_group["amplify"] rule out all of them'
        )
    return plan


def _shared_out(members: Sequence[Member], shares: Mapping[int, int]) -> list[Member]:
    """Each optimizer's share of a layer under a name of its own: ``name``, ``name#2``, ...

    What no optimizer holds goes with the first.
    """
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


def _layer_of(name: str, options: Options) -> str | None:
    if callable(options.group_by):
        return options.group_by(name)
    return name if options.group_by == "tensor" else name.rpartition(".")[0]


def _matcher(
    option: str, names: Names | None, model: nn.Module, default: bool, check_names: bool
) -> Callable[[str], bool]:
    """A predicate over parameter names."""
    if names is None:
        return lambda name: default
    if callable(names):
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
