"""What is measured on: gradients of a list of shapes, and which of their layers are amplified."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from bench.shapes import Shapes, elements

FACTOR = 2.0  # a power of two: a step with it and one with 1 / FACTOR give the old bits again
ALIGNMENT = 64  # bytes


def layer_of(name: str) -> str:
    """The layer that a parameter of that name belongs to, as the default grouping has it."""
    return name.rpartition(".")[0]


def choose_layers(shapes: Shapes, fraction: float) -> frozenset[str]:
    """Layers that hold about ``fraction`` of the elements, scattered over the model."""
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        sizes[layer_of(name)] = sizes.get(layer_of(name), 0) + prod(shape)
    names = list(sizes)
    random.Random(0).shuffle(names)
    room = fraction * elements(shapes)
    chosen = []
    for name in names:
        if sizes[name] <= room:
            chosen.append(name)
            room -= sizes[name]
    return frozenset(chosen)


class _Holder(nn.Module):
    """Holds parameters and children, computes nothing."""


def holder(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model with these parameters and no memory for their values."""
    model = _Holder()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        module: nn.Module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, _Holder())
            module = module.get_submodule(part)
        value = torch.zeros((), dtype=dtype, device=device).expand(shape)
        module.register_parameter(leaf, nn.Parameter(value))
    return model


@dataclass(eq=False)
class Buffers:
    """One set of gradients, one after the other in one piece of memory.

    Each is a tensor of its own as far as autograd and the compiler can tell: no view of ``flat``.
    """

    flat: Tensor
    gradients: list[Tensor]
    flats: list[Tensor]  # the same gradients, one-dimensional
    amplified: bool = False  # the selected ones stand multiplied by FACTOR


@dataclass(eq=False)
class Workload:
    """Gradients of one list of shapes.

    Attributes:
        fraction: share of the elements that is meant to be amplified.
        layers: the layers that are.
        selected: whether each gradient belongs to one of them.
        sets: copies of the gradients. Going through all of them leaves none in a cache.
        pristine: the values before any step; kept if ``keep`` was set.
    """

    shapes: Shapes
    dtype: torch.dtype
    device: torch.device
    fraction: float
    copies: int
    keep: bool
    layers: frozenset[str] = field(init=False)
    selected: list[bool] = field(init=False)
    sets: list[Buffers] = field(init=False)
    pristine: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        self.layers = choose_layers(self.shapes, self.fraction)
        self.selected = [layer_of(name) in self.layers for name in self.shapes]
        self.sets = [self._buffers() for _ in range(self.copies)]
        self.fill()
        self.pristine = self.sets[0].flat.clone() if self.keep else None

    def fill(self) -> None:
        """Gives every set its values: normal ones, the same in all sets and every time."""
        first = self.sets[0]
        generator = torch.Generator(self.device).manual_seed(0)
        first.flat.normal_(0.0, 0.01, generator=generator)
        for buffers in self.sets:
            if buffers is not first:
                buffers.flat.copy_(first.flat)
            buffers.amplified = False

    def _buffers(self) -> Buffers:
        flat = torch.empty(sum(self._room()), dtype=self.dtype, device=self.device)
        flats = [from_dlpack(part) for part in self.views(flat)]
        shaped = [f.view(shape) for f, shape in zip(flats, self.shapes.values(), strict=True)]
        return Buffers(flat, shaped, flats)

    def _room(self) -> list[int]:
        """Elements from each gradient's beginning to the next one's."""
        step = ALIGNMENT // self.dtype.itemsize
        return [ceil(prod(shape) / step) * step for shape in self.shapes.values()]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The gradients in a piece of memory laid out like a set, one-dimensional."""
        sizes = [prod(shape) for shape in self.shapes.values()]
        parts = flat.split_with_sizes(self._room())
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    @property
    def elements(self) -> int:
        return elements(self.shapes)

    @property
    def gradient_bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def amplified_fraction(self) -> float:
        """The share of the elements that really is in the chosen layers."""
        sizes = [prod(shape) for shape in self.shapes.values()]
        chosen = sum(n for n, chosen in zip(sizes, self.selected, strict=True) if chosen)
        return chosen / self.elements


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: L2 of a GPU, L3 of a CPU (32 MiB if unknown)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = file.read_text().strip() if file.exists() else ""
    return int(text[:-1]) * 1024 if text.endswith("K") else 32 << 20


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    available = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return available[0] * 1024 if available else 4 << 30


def copies_for(gradient_bytes: int, device: torch.device, most: int = 64) -> int:
    """How many sets of gradients hold more than three times the cache, within a quarter of memory.

    Small sets are cut short at ``most``.
    """
    wanted = 3 * cache_bytes(device) // max(gradient_bytes, 1) + 2
    affordable = free_bytes(device) // 4 // max(gradient_bytes, 1)
    return max(1, min(wanted, affordable, most))


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether real tensors are equal bit by bit."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(
        torch.equal(x.view(kinds[x.itemsize]), y.view(kinds[y.itemsize]))
        for x, y in zip(a, b, strict=True)
    )
