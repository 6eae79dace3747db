"""Which part of a tensor this process holds, and which processes hold the others.

DTensor takes long to import: who does not use it does not import it.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Shard:
    """This process's part of a DTensor.

    Attributes:
        how: placements and shape of the mesh. Where these are equal, so are the cuts.
        starts: index in the whole tensor of every part's first element, counting the reals of a
            complex one; None if a part is not a run of elements that follow one another.
        index: which part this is; -1 if the process is not in the mesh.
        copies: processes that hold the same part.
        mesh: the processes that hold the parts.
    """

    how: str
    starts: tuple[int, ...] | None
    index: int = field(compare=False)
    copies: int
    mesh: DeviceMesh

    @property
    def first(self) -> int:
        """Index in the whole tensor of this part's first element; 0 if there is no such."""
        return 0 if self.starts is None or self.index < 0 else self.starts[self.index]


def is_dtensor(tensor: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # there if there is a DTensor
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def local(tensor: Any) -> Tensor:
    """The part of a DTensor that is here, in the same memory."""
    part: Tensor = tensor.to_local()
    return part.wait() if hasattr(part, "wait") else part  # of a collective under way


def shard_of(name: str, tensor: Tensor) -> Shard | None:
    """How a parameter is cut; None for a plain tensor. TypeError for a Partial placement."""
    if not is_dtensor(tensor):
        return None
    placements, mesh = tensor.placements, tensor.device_mesh  # type: ignore[attr-defined]
    refuse_partial(f"the parameter {name!r}", tensor)
    shape = tuple(mesh.shape)
    cut = [size for size, p in zip(shape, placements, strict=True) if not p.is_replicate()]
    coordinate = mesh.get_coordinate()
    index = -1
    if coordinate is not None:
        index = 0
        for size, placement, at in zip(shape, placements, coordinate, strict=True):
            if not placement.is_replicate():
                index = index * size + at
    return Shard(
        how=f"{', '.join(map(str, placements))} over {' x '.join(map(str, shape))}",
        starts=_starts(tensor, placements, cut),
        index=index,
        copies=math.prod(shape) // math.prod(cut),
        mesh=mesh,
    )


def refuse_partial(what: str, tensor: Any) -> None:
    if any(placement.is_partial() for placement in tensor.placements):
        raise TypeError(
            f"{what} has placements {tensor.placements}: its values are still to be summed over "
            "processes; redistribute it to Replicate() or Shard(0) before the step"
        )


def _starts(tensor: Tensor, placements: Iterable[Any], cut: list[int]) -> tuple[int, ...] | None:
    """Dimension 0 is cut as ``torch.chunk`` cuts it, once for each dimension of the mesh."""
    from torch.distributed.tensor import Shard as ShardPlacement

    if any(
        not p.is_replicate() and (type(p) is not ShardPlacement or p.dim != 0) for p in placements
    ):
        return None
    pieces = [(0, tensor.shape[0] if cut else 1)]
    for size in cut:
        finer = []
        for begin, end in pieces:
            step = -(-(end - begin) // size)
            edges = [min(begin + i * step, end) for i in range(size + 1)]
            finer += list(itertools.pairwise(edges))
        pieces = finer
    row = math.prod(tensor.shape[1:]) * (2 if tensor.is_complex() else 1)
    return tuple(begin * row for begin, _ in pieces)


# ---- processes ----------------------------------------------------------------------


def group_of(shards: Iterable[Shard]) -> dist.ProcessGroup:
    """The processes of all meshes together.

    Making it is a collective if they are neither all processes nor one mesh of one dimension.
    """
    meshes = {shard.mesh for shard in shards}
    ranks = {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}
    for mesh in meshes:
        if mesh.ndim == 1 and mesh.size() == len(ranks):
            return mesh.get_group()
    world = dist.group.WORLD
    assert world is not None
    if len(ranks) == world.size():
        return world
    return _subgroup(world, tuple(sorted(ranks)))


@functools.lru_cache(maxsize=64)
def _subgroup(world: dist.ProcessGroup, ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """Made once for each set of processes, not at each walk of the model."""
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)  # this process is one of them
    return group
